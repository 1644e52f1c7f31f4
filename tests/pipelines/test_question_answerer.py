"""Answers, against a search over all spans of all windows in NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import CONTEXT_LENGTH, ScriptedReader, task_model, tiny_encoder, tiny_tokenizer

from lmzoo.pipelines import QuestionAnswerer

STRIDE, LONGEST, N_BEST, THRESHOLD = 5, 4, 6, 1.5
KINDS = ("wordpiece", "bpe")
CONTEXT = "the cat sat on the mat and that was that. naïve café, déjà vu 漢字 and 😀 " * 3


@pytest.fixture(scope="module")
def answerers():
    settings_ = {"stride": STRIDE, "max_answer_length": LONGEST, "window_batch_size": 2}
    model = ScriptedReader(tiny_encoder()).play(0)
    return {
        (kind, n_best, threshold): QuestionAnswerer(
            model, tiny_tokenizer(kind), n_best=n_best, no_answer_threshold=threshold, **settings_
        )
        for kind in KINDS
        for n_best in (1, N_BEST)
        for threshold in (None, THRESHOLD)
    }


def search(model, kind, question, context, threshold):
    """All answers as (rank, score, start, end), best first; an answer's span of tokens counts once."""
    windows = tiny_tokenizer(kind).encode_windows([question], [context], max_length=CONTEXT_LENGTH, stride=STRIDE)
    spans, nulls, totals = {}, [], [[], []]
    for ids, offsets in zip(windows.token_ids, windows.offsets, strict=True):
        start, end = model({"token_ids": np.array([ids], "int32")}).numpy()[0].T.astype("float64")
        inside = [place for place, (begin, _) in enumerate(offsets) if begin >= 0]
        nulls.append(start[0] + end[0])
        for total, logits in zip(totals, (start, end), strict=True):
            total += [logits[0], *logits[inside]]
        for first in inside:
            for last in inside:
                empty = any(offsets[place][0] == offsets[place][1] for place in (first, last))
                if 0 <= last - first < LONGEST and not empty:
                    # The tokens of one character have the same offsets, so their number tells them apart.
                    number = [
                        sum(offsets[other] == offsets[place] for other in inside[: inside.index(place)])
                        for place in (first, last)
                    ]
                    key = (offsets[first][0], offsets[last][1], *number, last - first)
                    spans[key] = max(spans.get(key, -np.inf), start[first] + end[last])
    log_total = sum(np.log(np.sum(np.exp(each))) for each in totals)
    answers = [(rank, np.exp(rank - log_total), *key[:2]) for key, rank in spans.items()]
    if threshold is not None or not answers:
        null = min(nulls)
        answers.append((null - (threshold or 0.0), np.exp(null - log_total), -1, -1))
    return sorted(answers, reverse=True)


texts = st.one_of(st.text(max_size=12), st.text("the cat é漢😀. ", max_size=90))


@pytest.mark.parametrize("threshold", [None, THRESHOLD])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), texts, texts)
def test_answers_are_those_of_a_search_over_all_spans(answerers, kind, threshold, seed, question, context):
    best, several = (answerers[kind, n_best, threshold] for n_best in (1, N_BEST))
    random = np.random.default_rng(seed)
    for table in best.model.tables:
        table.assign(random.normal(0.0, 2.0, table.shape).astype("float32"))
    expected = search(best.model, kind, question, context, threshold)
    actual = several(question, context)
    assert len(actual) == min(N_BEST, len(expected))
    for answer, (_, score, start, end) in zip(actual, expected, strict=False):
        assert answer["score"] == pytest.approx(score, rel=1e-3, abs=1e-6)
        assert (answer["start"], answer["end"]) == (start, end)
        assert answer["answer"] == ("" if start < 0 else context[start:end])
    assert best(question, context) == pytest.approx(actual[0])


def test_a_long_context_is_read_to_its_end(answerers):
    answerer = answerers["wordpiece", 1, None]
    for table in answerer.model.tables:
        table.assign(tf.zeros_like(table))
    word = answerer.tokenizer.token_to_id("vu")
    table = np.zeros(answerer.model.tables[0].shape, "float32")
    table[word] = 5.0
    answerer.model.tables[0].assign(table)
    for padding in range(0, 60, 3):
        context = "the " * padding + "vu" + " cat" * 20
        answer = answerer("that", context)
        assert (answer["answer"], answer["start"]) == ("vu", 4 * padding)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_those_of_the_tokenizer(answerers, kind):
    answerer = answerers[kind, 1, None]
    questions = ["the cat", "", "the cat " * 20, "é", "😀"]
    contexts = [CONTEXT, CONTEXT, CONTEXT, "", "mat"]
    windows = answerer._windows(tf.constant(questions), tf.constant(contexts))
    expected = tiny_tokenizer(kind).encode_windows(questions, contexts, max_length=CONTEXT_LENGTH, stride=STRIDE)
    assert len(expected.rows) > 10
    assert windows.row.numpy().tolist() == expected.rows
    lengths = windows.batch["padding_mask"].numpy().sum(1)
    rows = range(len(lengths))
    for name in ("token_ids", "token_type_ids"):
        values = windows.batch[name].numpy()
        assert [values[row, : lengths[row]].tolist() for row in rows] == getattr(expected, name)
    inside = windows.is_context.numpy()
    for row in rows:
        spans = [list(span) if span[0] >= 0 else None for span in expected.offsets[row]]
        found = windows.offsets.numpy()[row].tolist()
        assert [found[place] if inside[row, place] else None for place in range(lengths[row])] == spans
        assert not inside[row, lengths[row] :].any()


def test_a_threshold_decides_whether_there_is_an_answer():
    model = task_model("answers")
    answer = QuestionAnswerer(model, tiny_tokenizer())("the cat", "sat on the mat")
    assert answer["answer"]
    for threshold, expected in ((-1000.0, ""), (1000.0, answer["answer"])):
        answerer = QuestionAnswerer(model, tiny_tokenizer(), no_answer_threshold=threshold)
        assert answerer("the cat", "sat on the mat")["answer"] == expected


def test_the_number_of_windows_at_a_time_changes_nothing():
    model = task_model("answers")
    few, many = (
        QuestionAnswerer(model, tiny_tokenizer(), stride=3, n_best=3, window_batch_size=size) for size in (1, 100)
    )
    for one, other in zip(few("the cat", CONTEXT), many("the cat", CONTEXT), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"n_best": 0}, "n_best is 0"),
        ({"max_answer_length": 1.5}, "max_answer_length is 1.5"),
        ({"window_batch_size": 0}, "window_batch_size is 0"),
        ({"stride": -1}, "stride is -1"),
        ({"stride": 14}, r"stride is 14, but must lie in \[0, 14\)"),
    ],
)
def test_wrong_settings_are_named(settings_, message):
    with pytest.raises(ValueError, match=message):
        QuestionAnswerer(task_model("answers"), tiny_tokenizer(), **settings_)


def test_questions_are_as_many_as_contexts(answerers):
    with pytest.raises(ValueError, match="2 of question and 1 of context"):
        answerers["bpe", 1, None](["a", "b"], ["c"])
