"""Whatever is asked of what was exported is answered, or refused with an InvalidArgument error."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from tiny_encoders import CONTEXT_LENGTH as ENCODER_CONTEXT
from tiny_encoders import task_model, tiny_encoder
from tiny_encoders import tiny_tokenizer as encoder_tokenizer
from tiny_pipeline import CONTEXT_LENGTH, PROMPTS, shared_model, tiny_tokenizer
from tiny_text_to_text import SOURCES, tiny_t5
from tiny_text_to_text import tiny_tokenizer as t5_tokenizer

from lmzoo.pipelines import MaskFiller, TextClassifier, TextGenerator, TextToText

NEW = 6
InvalidArgument = tf.errors.InvalidArgumentError
# Exporting one of each kind takes long, and what they have in common is tested with the first.
KINDS = ("gpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "classifier", "filler")))


@functools.cache
def pipeline(name):
    return {
        "gpt": lambda: TextGenerator(shared_model(), tiny_tokenizer(), NEW, top_p=0.9, seed=3),
        "t5": lambda: TextToText(tiny_t5(), t5_tokenizer(), NEW, num_beams=2, num_return_sequences=2),
        "classifier": lambda: TextClassifier(task_model("single_label"), encoder_tokenizer()),
        "filler": lambda: MaskFiller(tiny_encoder(), encoder_tokenizer(), 2),
    }[name]()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles")
    return functools.cache(lambda name: tf.saved_model.load(str(pipeline(name).export(directory / name))))


# ---- step by step


def stepwise(loaded, outputs, num_tokens=NEW):
    """Greedy tokens [B, n] from the outputs of `prefill` on."""
    tokens = []
    for _ in range(num_tokens):
        token_ids = tf.argmax(outputs["logits"], axis=-1, output_type=tf.int32)[:, None]
        tokens.append(token_ids.numpy()[:, 0])
        cache = {name: value for name, value in outputs.items() if name != "logits"}
        outputs = loaded.signatures["decode"](token_ids=token_ids, **cache)
    return np.stack(tokens, axis=1), outputs


def until_end(rows, end):
    return [row[: row.index(end) + 1] if end in row else row for row in rows.tolist()]


def gpt_prefilled(loaded, rows):
    lengths = [len(row) for row in rows]
    padded = [row + [7] * (max(lengths) - len(row)) for row in rows]
    return loaded.prefill(tf.constant(padded), tf.constant(lengths))


def gpt_rows():
    rows = [tiny_tokenizer().encode(text)[-30:] for text in PROMPTS]
    return [row or [0] for row in rows]


def test_a_loop_around_prefill_and_decode_gives_what_generate_does(bundle):
    rows, loaded = gpt_rows(), bundle("gpt")
    tokens, _ = stepwise(loaded, gpt_prefilled(loaded, rows))
    expected = shared_model().generate(rows, NEW, temperature=0).numpy()
    assert until_end(tokens, 0) == until_end(expected, 0)


def test_rows_that_are_at_different_tokens_share_a_batch(bundle):
    rows, loaded = gpt_rows(), bundle("gpt")
    first, begun = stepwise(loaded, gpt_prefilled(loaded, rows[:1]), 2)
    fresh = gpt_prefilled(loaded, rows[2:4])
    both = {name: tf.concat([begun[name], fresh[name]], 0) for name in fresh}
    tokens, _ = stepwise(loaded, both, 4)
    expected = shared_model().generate([rows[0], *rows[2:4]], NEW, temperature=0).numpy()
    assert first[0].tolist() + tokens[0].tolist() == expected[0].tolist()
    assert tokens[1:].tolist() == expected[1:, :4].tolist()


@pytest.mark.slow
def test_an_encoder_decoder_goes_step_by_step_too(bundle):
    source = pipeline("t5")._source(tf.constant(SOURCES))
    loaded = bundle("t5")
    tokens, outputs = stepwise(loaded, loaded.prefill(source["token_ids"], source["padding_mask"]), NEW - 1)
    rows = [ids[mask] for ids, mask in zip(source["token_ids"].numpy(), source["padding_mask"].numpy(), strict=True)]
    expected = tiny_t5().generate(rows, NEW - 1, temperature=0).numpy()
    assert until_end(tokens, 1) == until_end(expected, 1)
    with pytest.raises(InvalidArgument, match=rf"= {NEW} is not in \[0, {NEW}\)"):
        stepwise(loaded, outputs, 1)


def test_a_row_without_tokens_starts_as_an_empty_text_does(bundle):
    loaded = bundle("gpt")
    expected, _ = stepwise(loaded, gpt_prefilled(loaded, [[0]]), 3)
    for token_ids, lengths in (([[]], [0]), ([[5, 6]], [0]), ([[5, 6]], [-9])):
        outputs = loaded.prefill(tf.constant(token_ids, tf.int32, [1, len(token_ids[0])]), tf.constant(lengths))
        assert stepwise(loaded, outputs, 3)[0].tolist() == expected.tolist()
    longer = loaded.prefill(tf.constant([[5, 6]]), tf.constant([99]))
    np.testing.assert_allclose(longer["logits"], gpt_prefilled(loaded, [[5, 6]])["logits"], atol=1e-6)


# ---- scores


def plain_score(text, continuation):
    """Of a causal model: from the logits of the whole, token by token."""
    before, whole = (tiny_tokenizer().encode(each) for each in (text.rstrip(), text + continuation))
    first = len(before)
    if first == 0:
        whole, first = [0, *whole], 1
    cut = max(0, len(whole) - 1 - CONTEXT_LENGTH)
    whole, first = whole[cut:], max(first - cut, 1)
    labels = whole[first:]
    if not labels:
        return 0.0, 0, True
    logits = shared_model()(np.array([whole[:-1]])).numpy()[0, first - 1 :]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = logits.argmax(-1).tolist() == labels
    return log_probs[np.arange(len(labels)), labels].sum(), len(labels), best


def test_the_score_of_a_continuation_is_the_sum_over_its_tokens(bundle):
    greedy = TextGenerator(shared_model(), tiny_tokenizer(), NEW, temperature=0)
    pairs = [
        ("the cat", " sat on"),
        ("the cat ", "sat on"),
        ("", "the mat"),
        ("a b", ""),
        ("", ""),
        ("x" * 100, " the mat"),
        ("the", "x" * 100),
        ("naïve", " 漢字 😀"),
        ("the cat sat", greedy("the cat sat", max_new_tokens=2)),
    ]
    texts, continuations = zip(*pairs, strict=True)
    outputs = bundle("gpt").score(tf.constant(texts), tf.constant(continuations))
    expected = [plain_score(*pair) for pair in pairs]
    np.testing.assert_allclose(outputs["log_likelihood"], [each[0] for each in expected], rtol=1e-5, atol=1e-4)
    assert outputs["num_tokens"].numpy().tolist() == [each[1] for each in expected]
    assert outputs["is_greedy"].numpy().tolist() == [each[2] for each in expected]
    assert pipeline("gpt").score("the cat", " sat on")["num_tokens"] == expected[0][1]


@pytest.mark.slow
def test_an_answer_is_scored_without_its_end(bundle):
    pairs = [("the cat", "a th"), ("", "漢字 and the mat"), ("naïve", "")]
    outputs = bundle("t5").score(*(tf.constant(column) for column in zip(*pairs, strict=True)))
    for number, (text, answer) in enumerate(pairs):
        labels = t5_tokenizer().encode(answer)
        source = np.array([[*t5_tokenizer().encode(text), 1]])
        logits = tiny_t5()({"token_ids": source, "decoder_token_ids": np.array([[0, *labels]])}).numpy()[0, :-1]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = log_probs[np.arange(len(labels)), labels].sum()
        assert outputs["log_likelihood"].numpy()[number] == pytest.approx(expected, abs=1e-4)
        assert outputs["num_tokens"][number] == len(labels)


def test_as_many_texts_as_continuations(bundle):
    with pytest.raises(ValueError, match="there are 2 texts and 1 continuations"):
        pipeline("gpt").score(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="must both be a str"):
        pipeline("gpt").score("a", ["c"])
    with pytest.raises(InvalidArgument):
        bundle("gpt").score(tf.constant(["a", "b"]), tf.constant(["c", "d", "e"]))


# ---- guards


TEXTS = ["", "the cat", "x" * 900, " \n", "a\0b"]
BYTES = [b"caf\xc3", b"\xff\xfe\xfd", b"\xf0\x9f\x98", b"\xed\xa0\x80"]


@pytest.mark.parametrize("name", KINDS)
def test_any_texts_are_answered_and_so_are_none(bundle, name):
    loaded = bundle(name)
    for signature, function in loaded.signatures.items():
        specs = function.structured_input_signature[1]
        strings = {each for each, spec in specs.items() if spec.dtype == tf.string}
        if not strings:
            continue
        others = {each: tf.constant([2], spec.dtype) for each, spec in specs.items() if each not in strings}
        for texts in ([], TEXTS, BYTES):
            column = tf.constant(texts, tf.string, [len(texts)])
            outputs = function(**dict.fromkeys(strings, column), **others)
            assert all(value.shape[0] == len(texts) for value in outputs.values()), (name, signature)
            for value in outputs.values():
                for item in value.numpy().ravel().tolist():
                    assert not isinstance(item, bytes) or item.decode() is not None
                    assert not isinstance(item, float) or np.isfinite(item)


def id_inputs(name, token_ids):
    token_ids = tf.constant(token_ids, tf.int32)
    inputs = {"token_ids": token_ids}
    if name != "gpt":
        inputs["padding_mask"] = tf.ones_like(token_ids, tf.bool)
    if name == "t5":
        inputs["decoder_token_ids"] = tf.zeros_like(token_ids)
    if name in ("classifier", "filler"):
        inputs["token_type_ids"] = tf.zeros_like(token_ids)
    return inputs


@pytest.mark.parametrize("name", KINDS)
def test_ids_outside_the_vocabulary_are_refused(bundle, name):
    loaded = bundle(name)
    size = pipeline(name).model.config.vocab_size
    for signature in ("tokens", "prefill", "encode"):
        if signature not in loaded.signatures:
            continue
        function = loaded.signatures[signature]
        wanted = function.structured_input_signature[1]
        for bad in (-1, size, 2**31 - 1, -(2**31)):
            inputs = {**id_inputs(name, [[1, bad, 2]]), "lengths": tf.constant([3])}
            with pytest.raises(InvalidArgument, match=rf"indices\[0,1\] = {bad} is not in \[0, {size}\)"):
                function(**{each: inputs[each] for each in wanted})
        inputs = {**id_inputs(name, np.zeros([0, 3])), "lengths": tf.zeros([0], tf.int32)}
        outputs = function(**{each: inputs[each] for each in wanted})
        assert all(value.shape[0] == 0 for value in outputs.values())


@pytest.mark.slow
def test_other_ids_are_refused_too(bundle):
    inputs = id_inputs("classifier", [[1, 2]])
    with pytest.raises(InvalidArgument, match=r"= 2 is not in \[0, 2\)"):
        bundle("classifier").signatures["tokens"](**{**inputs, "token_type_ids": tf.constant([[0, 2]])})
    inputs = id_inputs("t5", [[1, 2]])
    with pytest.raises(InvalidArgument, match=r"= -1 is not in \[0, 40\)"):
        bundle("t5").signatures["tokens"](**{**inputs, "decoder_token_ids": tf.constant([[0, -1]])})
    prefilled = gpt_prefilled(bundle("gpt"), [[5]])
    cache = {name: value for name, value in prefilled.items() if name != "logits"}
    with pytest.raises(InvalidArgument, match=r"= 300 is not in \[0, 300\)"):
        bundle("gpt").signatures["decode"](token_ids=tf.constant([[300]]), **cache)


@pytest.mark.parametrize("name", [kind for kind in KINDS if kind is not KINDS[1]])
def test_rows_longer_than_the_context_are_refused(bundle, name):
    size = CONTEXT_LENGTH if name == "gpt" else ENCODER_CONTEXT
    function = bundle(name).signatures["tokens"]
    function(**id_inputs(name, np.ones([1, size])))
    with pytest.raises(InvalidArgument, match="is not in"):
        function(**id_inputs(name, np.ones([1, size + 1])))


def test_a_full_cache_takes_no_more(bundle):
    loaded = bundle("gpt")
    full = gpt_prefilled(loaded, [[5] * CONTEXT_LENGTH])
    with pytest.raises(InvalidArgument, match=rf"= {CONTEXT_LENGTH} is not in \[0, {CONTEXT_LENGTH}\)"):
        stepwise(loaded, full, 1)
    with pytest.raises(InvalidArgument, match="is not in"):
        gpt_prefilled(loaded, [[5] * (CONTEXT_LENGTH + 1)])


@pytest.mark.parametrize("name", KINDS[:2])
def test_a_request_gets_no_more_tokens_than_the_pipeline_gives(bundle, name):
    whole = pipeline(name)(PROMPTS)
    for limit in (2**31 - 1, NEW + 1, 0, -5):
        texts = bundle(name).generate(tf.constant(PROMPTS), max_new_tokens=tf.constant([limit]))["text"]
        assert [text.decode() for text in texts.numpy()] == (whole if limit > NEW else [""] * len(PROMPTS))


def test_no_temperature_can_break_a_request(bundle):
    greedy = pipeline("gpt")(PROMPTS, temperature=0)
    for value in (-1.0, float("nan"), 0.0):
        texts = bundle("gpt").generate(tf.constant(PROMPTS), temperature=tf.constant([value]))["text"]
        assert [text.decode() for text in texts.numpy()] == greedy
    absurd = {"temperature": [float("inf")], "top_k": [0], "top_p": [float("nan")]}
    inputs = {
        name: tf.constant(value, pipeline("gpt")._request_inputs.defaults[name].dtype) for name, value in absurd.items()
    }
    assert bundle("gpt").generate(tf.constant(PROMPTS), **inputs)["text"].shape == [len(PROMPTS)]
