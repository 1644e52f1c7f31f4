"""What all pipelines that read whole texts have in common: how they are called, and what they refuse."""

import numpy as np
import pytest
import tensorflow as tf
from tiny_encoders import CONTEXT_LENGTH, TEXTS, task_model, tiny_encoder, tiny_tokenizer, without_twin

from lmzoo.pipelines import MaskFiller, QuestionAnswerer, TextClassifier, TextEmbedder, TokenClassifier

MASKED = [f"{text[:20]} [MASK] {text[20:]}" for text in TEXTS]
CLASSES = {
    "classifier": (TextClassifier, lambda: task_model("single_label")),
    "tagger": (TokenClassifier, lambda: task_model("tokens")),
    "embedder": (TextEmbedder, lambda: task_model("embeddings")),
    "filler": (MaskFiller, tiny_encoder),
    "answerer": (QuestionAnswerer, lambda: task_model("answers")),
}


@pytest.fixture(scope="module", params=CLASSES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(name):
    pipeline_class, model = CLASSES[name]
    return pipeline_class(model(), tiny_tokenizer())


@pytest.fixture(scope="module")
def columns(name):
    texts = MASKED if name == "filler" else TEXTS
    return (["the cat"] * len(texts), texts) if name == "answerer" else (texts,)


def same(one, other):
    """Equal but for how sums of floats are rounded."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, str | bytes | int):
        return one == other
    return np.allclose(one, other, atol=1e-5)


def test_a_text_gives_the_same_alone_and_among_others(pipeline, columns):
    results = list(pipeline(*columns))
    assert len(results) == len(TEXTS)
    rows = list(zip(*columns, strict=True))
    assert same(results, [pipeline(*row) for row in rows])
    many = [columns * 9 for columns in columns]
    assert same(list(pipeline(*many, batch_size=7)), results * 9), "results must keep the order of the texts"
    assert same(list(pipeline(*(iter(column) for column in columns))), results)


def test_no_texts_are_fine(pipeline, columns):
    nothing = tf.zeros([0], tf.string)
    assert len(pipeline(*([] for _ in columns))) == 0
    assert {value.shape[0] for value in pipeline(*(nothing for _ in columns)).values()} == {0}


def test_tensors_give_the_outputs_of_the_one_graph(pipeline, columns):
    outputs = pipeline(*(tf.constant(column) for column in columns))
    assert {value.shape[0] for value in outputs.values()} == {len(TEXTS)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)] * len(columns))
    def around(*texts):
        return pipeline(*texts)

    again = around(*(tf.constant(column) for column in columns))
    assert all(same(outputs[name].numpy().tolist(), again[name].numpy().tolist()) for name in outputs)
    assert pipeline._run.experimental_get_tracing_count() == 1


def test_bytes_that_are_no_utf8_count_as_replacement_characters(pipeline, columns):
    broken = [b"caf\xc3 [MASK]", b"\xff\xfe [MASK]", b"a\x00b [MASK]", b"\xed\xa0\x80 the cat [MASK]"]
    first = [tf.constant(["the cat"] * 4)] * (len(columns) - 1)
    mended = tf.constant([text.decode(errors="replace") for text in broken])
    results, expected = pipeline(*first, tf.constant(broken)), pipeline(*first, mended)
    assert all(same(results[name].numpy().tolist(), expected[name].numpy().tolist()) for name in results)
    more = ["the cat"] * (len(columns) - 1)
    assert same(pipeline(*more, "a\ud800b [MASK]"), pipeline(*more, "a\ufffdb [MASK]"))


@pytest.mark.parametrize("text", [b"bytes", 3, ["a", b"bytes"], [None], tf.constant("a"), tf.constant([1])])
def test_what_is_no_text_is_refused(pipeline, columns, text):
    with pytest.raises(TypeError):
        pipeline(*[text] * len(columns))


@pytest.mark.parametrize("max_length", [0, -3, CONTEXT_LENGTH + 1, 8.0, True])
def test_a_length_that_the_model_cannot_read_is_refused(name, max_length):
    pipeline_class, model = CLASSES[name]
    with pytest.raises(ValueError, match=f"{max_length}"):
        pipeline_class(model(), tiny_tokenizer(), max_length=max_length)


def test_special_tokens_that_leave_no_room_are_refused(name, columns):
    pipeline_class, model = CLASSES[name]
    with pytest.raises(ValueError, match="max_length=1"):
        pipeline_class(model(), tiny_tokenizer(), max_length=1)(*columns)


def test_a_tokenizer_that_does_not_fit_is_refused(name):
    pipeline_class, model = CLASSES[name]
    with pytest.raises(ValueError, match="no in-graph twin: its model is WordLevel"):
        pipeline_class(model(), without_twin())
    small = tiny_encoder(vocab_size=50)
    model = small if name == "filler" else type(model())(small, **({"labels": ("a", "b")} if name == "tagger" else {}))
    with pytest.raises(ValueError, match=r"tokens \(tokenizer.vocab_size\).* 50 \(config.vocab_size\)"):
        pipeline_class(model, tiny_tokenizer())


def test_a_model_of_another_task_is_refused(name):
    pipeline_class, _ = CLASSES[name]
    other = task_model("single_label" if name != "classifier" else "tokens")
    with pytest.raises(ValueError, match=type(other).__name__):
        pipeline_class(other, tiny_tokenizer())


def test_batches_hold_one_text_at_least(pipeline, columns):
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipeline(*columns, batch_size=0)
