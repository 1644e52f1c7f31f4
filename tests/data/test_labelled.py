import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmzoo.data.labelled import WINDOW_BATCHES, Examples, LabelledBatches, Ragged
from lmzoo.data.labelled_answers import encode_answers
from lmzoo.data.labelled_texts import encode_similar, encode_tags, encode_texts, find_labels, find_tags
from lmzoo.data.records import Records
from lmzoo.data.tokenizers import Tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "new", "york", "unbelievable", "mr"]
PAD = 7


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter([" ".join(WORDS), "who wrote it?", ". , -"] * 3), kind="wordpiece", vocab_size=200)


def examples_of(lengths, pairs=False):
    rows = [[100 + number] * length for number, length in enumerate(lengths)]
    inputs = {"token_ids": Ragged(rows)}
    if pairs:
        inputs["pair_token_ids"] = Ragged(rows[::-1])
    ones = np.ones(len(rows), np.float32)
    return Examples(inputs, np.arange(len(rows), dtype=np.int32), ones, PAD, np.arange(len(rows)))


LENGTHS = np.random.default_rng(0).integers(1, 40, 203)


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 2**31), st.integers(0, 3)
)
def test_every_epoch_has_each_example_once(lengths, batch_size, seed, epoch):
    batches = LabelledBatches(examples_of(lengths), batch_size, seed=seed)
    batches = LabelledBatches(batches.examples, batch_size, seed=seed, start=epoch * batches.batches_per_epoch)
    labels, counts = [], []
    for step in range(batches.num_batches):
        inputs, label, weights = batches.batch_at(step)
        assert inputs["token_ids"].shape[1] % 8 == 0
        assert inputs["padding_mask"].any(axis=1).all()
        labels += label[weights > 0].tolist()
        counts.append(int(weights.sum()))
        for row, number in zip(inputs["token_ids"][weights > 0], label[weights > 0], strict=True):
            assert row[: lengths[number]].tolist() == [100 + number] * lengths[number]
            assert set(row[lengths[number] :].tolist()) <= {PAD}
    assert sorted(labels) == list(range(len(lengths)))
    assert sorted(counts)[1:] == [batch_size] * (len(counts) - 1)


def test_a_batch_depends_on_its_number_alone():
    examples = examples_of(LENGTHS)
    whole = LabelledBatches(examples, 8, seed=3, num_batches=60)
    late = LabelledBatches(examples_of(LENGTHS), 8, seed=3, start=40, num_batches=20)
    for step in (19, 0, 7):
        np.testing.assert_array_equal(late.rows_at(step), whole.rows_at(step + 40))
    per_epoch = whole.batches_per_epoch
    assert per_epoch == 26
    assert not np.array_equal(whole.rows_at(0), whole.rows_at(per_epoch))
    assert not np.array_equal(whole.rows_at(0), LabelledBatches(examples, 8, seed=4).rows_at(0))
    with pytest.raises(IndexError, match="no batch 60; there are 60"):
        whole.batch_at(60)


def test_rows_of_a_batch_are_about_equally_long_and_batches_come_in_any_order():
    lengths = np.random.default_rng(1).integers(1, 100, 4000)
    batches = LabelledBatches(examples_of(lengths), 16, seed=0)
    sizes = [batches.batch_at(step)[0]["token_ids"].size for step in range(batches.num_batches)]
    assert sum(sizes) < 1.15 * lengths.sum()
    widths = np.array(sizes) / 16
    assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.2
    assert len(lengths) > WINDOW_BATCHES * 16  # Windows keep a batch from holding all of the longest ones.
    longest = [batches.rows_at(int(step)) for step in np.argsort(widths)[-2:]]
    assert min(int(lengths[rows].min()) for rows in longest) < 100


def test_without_shuffling_examples_go_by_length():
    batches = LabelledBatches(examples_of(LENGTHS), 8, shuffle=False, num_batches=52)
    rows = np.concatenate([batches.rows_at(step) for step in range(26)])
    assert (np.diff(LENGTHS[rows[rows >= 0]]) >= 0).all()
    assert (rows[-5:] == -1).all()
    np.testing.assert_array_equal(batches.rows_at(0), batches.rows_at(26))


@pytest.mark.parametrize("width", [None, 40])
def test_the_dataset_holds_the_batches_and_its_shards_hold_their_parts(width):
    batches = LabelledBatches(examples_of(LENGTHS, pairs=True), 8, seed=1, start=20, num_batches=9, width=width)
    spec = batches.dataset().element_spec
    assert spec[0]["pair_padding_mask"].shape.as_list() == [8, width]
    assert spec[1].shape.as_list() == [8]
    wholes = list(batches.dataset().as_numpy_iterator())
    assert len(wholes) == len(batches.dataset()) == 9
    made = []
    shards = [list(batches.dataset(2, shard, 2, made.append).as_numpy_iterator()) for shard in range(2)]
    assert sorted(made) == sorted(list(range(18)) * 2)
    for step, (inputs, labels, weights) in enumerate(wholes):
        expected = batches.batch_at(step)
        np.testing.assert_array_equal(labels, expected[1])
        np.testing.assert_array_equal(weights, expected[2])
        parts = [shards[shard][2 * step + replica] for shard in range(2) for replica in range(2)]
        assert list(inputs) == ["token_ids", "padding_mask", "pair_token_ids", "pair_padding_mask"]
        for name, values in inputs.items():
            np.testing.assert_array_equal(values, expected[0][name])
            np.testing.assert_array_equal(np.concatenate([part[0][name] for part in parts]), values)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), labels)


def test_batches_that_cannot_be():
    examples = examples_of([3, 4])
    with pytest.raises(ValueError, match="batch_size: 0; it must be at least 1"):
        LabelledBatches(examples, 0)
    with pytest.raises(ValueError, match="width: 3; the longest example has 4 tokens"):
        LabelledBatches(examples, 2, width=3)
    with pytest.raises(ValueError, match="must be a multiple of 1 x 2 parts"):
        LabelledBatches(examples, 3).dataset(replicas=2)
    with pytest.raises(ValueError, match="no examples"):
        LabelledBatches(examples_of([]), 3)


# -- Texts.


def encode(records, tokenizer, **changes):
    given = {"text": "text", "pair": None, "label": "label", "problem": "single_label", "max_length": 16}
    return encode_texts(Records(records), tokenizer, **{**given, **changes})


def test_texts_and_labels(tokenizer):
    records = [{"text": "alpha beta", "label": 10}, {"text": "gamma", "label": 9}, {"text": "mr", "label": True}]
    labels = find_labels(Records(records), "label")
    assert labels == ("1", "9", "10")
    examples = encode(records, tokenizer, labels=labels)
    assert examples.labels.tolist() == [2, 1, 0]
    assert tokenizer.decode(examples.inputs["token_ids"][0], skip_special_tokens=False) == "[CLS] alpha beta [SEP]"
    assert list(examples.inputs) == ["token_ids"]
    short = encode(records, tokenizer, labels=labels, max_length=3)
    assert short.lengths.tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match=r"record 1: 'label' has '10', which is none of the labels \['1', '9'\]"):
        encode(records, tokenizer, labels=("1", "9"))
    with pytest.raises(ValueError, match=r"record 1: the field 'label' is 0.5; it must be a string or an integer"):
        encode([{"text": "mr", "label": 0.5}], tokenizer, labels=("1",))


def test_pairs_have_token_types(tokenizer):
    examples = encode([{"text": "alpha", "other": "beta mr", "label": "a"}], tokenizer, pair="other", labels=("a",))
    assert examples.inputs["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 1]
    assert examples.lengths.tolist() == [6]  # Not twice.
    inputs, _, _ = LabelledBatches(examples, 1).batch_at(0)
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]
    assert inputs["padding_mask"].tolist() == [[True] * 6 + [False] * 2]


def test_several_labels_and_numbers(tokenizer):
    many = [{"text": "mr", "label": ["b", "a"]}, {"text": "mr", "label": "c, a"}, {"text": "mr", "label": []}]
    labels = find_labels(Records(many), "label", "multi_label")
    assert labels == ("a", "b", "c")
    examples = encode(many, tokenizer, labels=labels, problem="multi_label")
    assert examples.labels.tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0]]
    numbers = [{"text": "mr", "label": "2.5"}, {"text": "mr", "label": -1}]
    assert find_labels(Records(numbers), "label", "regression") == ("score",)
    examples = encode(numbers, tokenizer, labels=("score",), problem="regression")
    assert examples.labels.tolist() == [[2.5], [-1.0]]
    assert LabelledBatches(examples, 2).dataset().element_spec[1].shape.as_list() == [2, 1]
    for wrong in ("much", float("nan"), [], None):
        with pytest.raises(ValueError, match=r"record 1: the field 'label' is .* must be a finite number"):
            encode([{"text": "mr", "label": wrong}], tokenizer, labels=("score",), problem="regression")


def test_pairs_to_compare(tokenizer):
    rows = [{"text": "alpha", "pair": "beta gamma", "score": 5}, {"text": "mr", "pair": "new york", "score": 2.5}]
    fields = {"text": "text", "pair": "pair", "max_length": 8}
    examples = encode_similar(Records(rows), tokenizer, score="score", max_score=5.0, **fields)
    assert examples.labels.tolist() == [1.0, 0.5]
    assert tokenizer.decode(examples.inputs["pair_token_ids"][0]) == "beta gamma"
    assert examples.lengths.tolist() == [7, 7]
    with pytest.raises(ValueError, match=r"record 1: the score is 5, but must lie in \[-1, 1\]; set max_score"):
        encode_similar(Records(rows), tokenizer, score="score", max_score=1.0, **fields)
    assert encode_similar(Records(rows), tokenizer, score=None, max_score=1.0, **fields).labels.dtype == np.int32


# -- Words.


def encode_words(rows, tokenizer, labels=("O", "B-LOC", "I-LOC"), max_length=32):
    return encode_tags(Records(rows), tokenizer, tokens="tokens", tags="tags", labels=labels, max_length=max_length)


def test_a_word_is_labelled_at_its_first_piece(tokenizer):
    rows = [
        {"tokens": ["Unbelievablenew", "\u200b", "new-york", "zzz", "."], "tags": ["O", "O", "B-LOC", "I-LOC", "O"]}
    ]
    examples = encode_words(rows, tokenizer)
    ids, weights, labels = examples.inputs["token_ids"][0], examples.weights[0], examples.labels[0]
    pieces = [tokenizer.id_to_token(number) for number in ids]
    first = [piece for piece, weight in zip(pieces, weights, strict=True) if weight]
    assert weights[0] == weights[-1] == 0.0
    assert len(pieces) > len(first) + 2  # There are words of several pieces.
    assert "unbelievablenew".startswith(first[0])
    assert "new".startswith(first[1])
    assert examples.words[0].tolist()[-1] == 4
    assert labels[weights > 0].tolist()[1] == 1
    assert not labels[weights == 0].any()
    assert examples.tags([labels], ("O", "B-LOC", "I-LOC")) == [rows[0]["tags"]]


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([*WORDS, "new-york", "\u200b", "ÄÖ", "zz.", "漢字"]), st.integers(0, 2)),
            min_size=1,
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(12, 40),
)
def test_no_word_is_lost_however_long_a_record_is(tokenizer, rows, max_length):
    labels = ("O", "B-LOC", "I-LOC")
    invisible = {"\u200b"}
    records = [
        {"tokens": [word for word, _ in row], "tags": ["O" if word in invisible else labels[tag] for word, tag in row]}
        for row in rows
    ]
    examples = encode_words(records, tokenizer, labels, max_length)
    assert examples.lengths.max() <= max_length
    known = [examples.labels[number] for number in range(len(examples))]
    assert examples.tags(known, labels) == [record["tags"] for record in records]


def test_tags_are_checked(tokenizer):
    rows = [{"tokens": ["mr"], "tags": ["B-PER"]}]
    assert find_tags(Records([*rows, {"tokens": ["a"], "tags": ["O"]}]), "tags") == ("O", "B-PER")
    with pytest.raises(ValueError, match="'tags' has 'B-PER', which is none of the labels"):
        encode_words(rows, tokenizer)
    with pytest.raises(ValueError, match="record 1: 1 words and 2 tags; there must be a tag for each word"):
        encode_words([{"tokens": ["mr"], "tags": ["O", "O"]}], tokenizer)


# -- Answers.

CONTEXT = "alpha beta gamma delta new york. unbelievable mr alpha, beta - gamma delta"


def encode_questions(rows, tokenizer, max_length=20, stride=4):
    return encode_answers(
        Records(rows), tokenizer, question="question", context="context", answers="answers",
        max_length=max_length, stride=stride,
    )  # fmt: skip


def question(answer, context=CONTEXT):
    answers = [{"text": answer, "answer_start": context.index(answer)}] if answer else []
    return {"question": "who wrote it?", "context": context, "answers": answers}


def perfect_logits(examples, width=24):
    """Scores that name the labels."""
    logits = []
    for start, end in examples.labels:
        scores = np.full((width, 2), -4.0)
        scores[start, 0] = scores[end, 1] = 4.0
        logits.append(scores)
    return logits


def test_every_word_of_a_long_context_can_be_found(tokenizer):
    rows = [question(answer) for answer in ("alpha", "new york", "unbelievable", "gamma delta", "-", "")]
    rows[3]["answers"] = {"text": ["gamma delta"], "answer_start": [CONTEXT.rindex("gamma delta")]}
    examples = encode_questions(rows, tokenizer)
    assert len(examples) > len(rows)
    assert examples.lengths.max() <= 20
    found = examples.answers(perfect_logits(examples), max_answer_length=12, n_best=1, no_answer_threshold=0.0)
    assert [best[0].text for best in found] == ["alpha", "new york", "unbelievable", "gamma delta", "-", ""]
    assert found[3][0].start == CONTEXT.rindex("gamma delta")
    assert examples.gold == (("alpha",), ("new york",), ("unbelievable",), ("gamma delta",), ("-",), ())
    assert not examples.labels[examples.records == 5].any()


def test_the_best_answer_is_that_of_a_search_over_all_spans(tokenizer):
    examples = encode_questions([question("new york"), question("delta")], tokenizer)
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=(24, 2)) for _ in range(len(examples))]
    limit = 3
    found = examples.answers(logits, max_answer_length=limit, n_best=5, no_answer_threshold=None)
    for record in range(2):
        spans = {}
        for number in np.flatnonzero(examples.records == record):
            starts, ends, scores = examples.starts[number], examples.ends[number], logits[number]
            for one in range(len(starts)):
                for two in range(one, min(one + limit, len(starts))):
                    if starts[one] >= 0 and starts[two] >= 0:
                        key = (int(starts[one]), int(ends[two]))
                        spans[key] = max(spans.get(key, -np.inf), scores[one, 0] + scores[two, 1])
        expected = sorted(spans.values(), reverse=True)[:5]
        np.testing.assert_allclose([answer.score for answer in found[record]], expected)
        for answer in found[record]:
            assert answer.text == CONTEXT[answer.start : answer.end]
            assert spans[answer.start, answer.end] == pytest.approx(answer.score)


def test_no_answer_needs_more_than_the_threshold(tokenizer):
    examples = encode_questions([question("new york")], tokenizer)
    logits = perfect_logits(examples)
    for scores in logits:
        scores[0] = 4.5  # No answer scores 9 in every window, the answer 8.
    assert len(logits) > 1

    def best(threshold, n_best=2):
        settings = {"max_answer_length": 9, "n_best": n_best, "no_answer_threshold": threshold}
        return [answer.text for answer in examples.answers(logits, **settings)[0]]

    assert best(0.9) == ["", "new york"]
    assert best(1.1)[0] == best(None)[0] == "new york"
    assert best(0.9, n_best=1) == [""]
    logits[-1][0] = 0.0  # The window that says so least counts.
    assert best(0.9)[0] == "new york"


def test_answers_are_checked(tokenizer):
    row = question("delta")
    row["answers"][0]["answer_start"] += 1
    with pytest.raises(ValueError, match=r"record 1: the answer 'delta' does not begin at character 18 .* 'elta '"):
        encode_questions([row], tokenizer)
    with pytest.raises(ValueError, match="record 1: the answers must be objects"):
        encode_questions([{**row, "answers": [1]}], tokenizer)
    with pytest.raises(ValueError, match=r"stride=9: it must lie in \[0, 8\)"):
        encode_questions([question("delta")], tokenizer, stride=9)
