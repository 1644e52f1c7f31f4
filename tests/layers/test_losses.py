"""The chunked loss against the plain one: values, gradients, and what it must never hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from lmzoo.layers import losses, token_cross_entropy

VOCAB, WIDTH = 29, 8
OPTIONS = list(itertools.product((0.0, 0.1), (0.0, 0.01), (False, True), (False, True)))


def make_inputs(num_tokens, vocab_size=VOCAB, width=WIDTH, seed=0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(num_tokens, width)).astype("float32")
    table = random.normal(size=(vocab_size, width)).astype("float32")
    bias = random.normal(size=vocab_size).astype("float32")
    labels = random.integers(0, vocab_size, num_tokens).astype("int32")
    weights = (random.random(num_tokens) * random.integers(0, 2, num_tokens)).astype("float32")
    return hidden, table, bias, labels, weights


def plain_loss(hidden, table, bias, labels, weights, label_smoothing=0.0, z_loss=0.0):
    """Loss and number of hits from logits [tokens, vocab], in the type of its inputs."""
    logits = tf.matmul(hidden, table, transpose_b=True) + (0.0 if bias is None else bias)
    vocab_size = table.shape[0]
    target = (1.0 - label_smoothing) * tf.one_hot(labels, vocab_size, dtype=logits.dtype) + label_smoothing / vocab_size
    values = -tf.reduce_sum(target * tf.nn.log_softmax(logits), axis=-1)
    values += z_loss * tf.square(tf.reduce_logsumexp(logits, axis=-1))
    hits = tf.cast(tf.argmax(logits, axis=-1, output_type=tf.int32) == labels, logits.dtype)
    return tf.reduce_sum(weights * values), tf.reduce_sum(weights * hits)


def value_and_gradients(loss, hidden, table, bias):
    """loss(hidden, table, bias) -> (value, hits), and the gradients of 3 * value."""
    sources = [tf.constant(each) for each in (hidden, table, bias) if each is not None]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        value, hits = loss(sources[0], sources[1], sources[2] if bias is not None else None)
        objective = 3.0 * value
    return value.numpy(), hits.numpy(), [each.numpy() for each in tape.gradient(objective, sources)]


def compare(num_tokens, *, with_bias=True, training=True, tolerance=2e-5, chunk_tokens=None, seed=0, **options):
    hidden, table, bias, labels, weights = make_inputs(num_tokens, seed=seed)
    bias = bias if with_bias else None
    exact = [None if each is None else each.astype("float64") for each in (hidden, table, bias)]
    expected = value_and_gradients(
        lambda *args: plain_loss(*args, labels, weights.astype("float64"), **options), *exact
    )

    def chunked(hidden, table, bias):
        sums = token_cross_entropy(
            hidden, table, labels, weights, bias=bias, training=training, chunk_tokens=chunk_tokens, **options
        )
        np.testing.assert_allclose(sums.weight, weights.sum(), rtol=1e-6)
        return sums.loss, sums.correct

    actual = value_and_gradients(chunked, hidden, table, bias)
    np.testing.assert_allclose(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6)
    for one, other in zip(actual[2], expected[2], strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize(("label_smoothing", "z_loss", "with_bias", "training"), OPTIONS)
def test_equals_the_plain_loss(label_smoothing, z_loss, with_bias, training):
    compare(
        13,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        with_bias=with_bias,
        training=training,
        chunk_tokens=5,
    )


@settings(max_examples=15)
@given(num_tokens=st.integers(1, 40), chunk_tokens=st.integers(1, 50), seed=st.integers(0, 99), training=st.booleans())
def test_any_chunk_size_gives_the_same(num_tokens, chunk_tokens, seed, training):
    compare(num_tokens, chunk_tokens=chunk_tokens, seed=seed, training=training, label_smoothing=0.1, z_loss=0.01)


@pytest.mark.parametrize("block_rows", [1, 7, 28])
def test_the_table_in_blocks_gives_the_same(block_rows, monkeypatch):
    monkeypatch.setattr(losses, "_TABLE_BLOCK_BYTES", block_rows * WIDTH * 4)
    assert len(losses.table_blocks(VOCAB, WIDTH)) == -(-VOCAB // block_rows)
    compare(13, chunk_tokens=4)


def graph_loss(num_tokens=None, jit_compile=False, training=True, **options):
    """A compiled function (hidden, table, bias, labels, weights) -> loss, correct, gradients."""

    def run(hidden, table, bias, labels, weights):
        with tf.GradientTape() as tape:
            tape.watch([hidden, table, bias])
            sums = token_cross_entropy(hidden, table, labels, weights, bias=bias, training=training, **options)
        return sums.loss, sums.correct, tape.gradient(sums.loss, [hidden, table, bias])

    specs = [
        tf.TensorSpec((num_tokens, WIDTH)),
        tf.TensorSpec((VOCAB, WIDTH)),
        tf.TensorSpec((VOCAB,)),
        tf.TensorSpec((num_tokens,), tf.int32),
        tf.TensorSpec((num_tokens,)),
    ]
    return tf.function(run, input_signature=specs, jit_compile=jit_compile, autograph=False)


@pytest.mark.parametrize("training", [False, True])
def test_dynamic_number_of_tokens(training):
    run = graph_loss(training=training, label_smoothing=0.1, z_loss=0.01)
    for num_tokens in (0, 1, 3, 8, 9, 40):
        inputs = make_inputs(num_tokens)
        loss, correct, gradients = run(*inputs)
        eager = graph_loss(num_tokens, training=training, label_smoothing=0.1, z_loss=0.01).python_function(
            *map(tf.constant, inputs)
        )
        np.testing.assert_allclose(loss, eager[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(correct, eager[1], rtol=1e-6)
        for one, other in zip(gradients, eager[2], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 24])
def test_compiled_by_xla(num_tokens):
    options = {"chunk_tokens": 7, "label_smoothing": 0.1, "z_loss": 0.01}
    inputs = make_inputs(num_tokens, seed=3)
    loss, correct, gradients = graph_loss(num_tokens, jit_compile=True, **options)(*inputs)
    expected = graph_loss(num_tokens, **options)(*inputs)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(correct, expected[1], rtol=1e-6)
    for one, other in zip(gradients, expected[2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_no_tokens_at_all(training):
    loss, correct, gradients = graph_loss(0, training=training)(*make_inputs(0))
    assert float(loss) == float(correct) == 0.0
    assert all(not np.any(each) for each in gradients)


@pytest.mark.parametrize("training", [False, True])
def test_a_label_of_weight_zero_may_be_anything(training):
    hidden, table, bias, labels, weights = make_inputs(13)
    assert (weights == 0).any()
    run = graph_loss(13, training=training)
    expected = run(hidden, table, bias, labels, weights)
    for strange in (-100, VOCAB, 2**31 - 1):
        actual = run(hidden, table, bias, np.where(weights == 0, strange, labels).astype("int32"), weights)
        for one, other in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
            np.testing.assert_array_equal(one, other)
            assert np.isfinite(one).all()


def test_no_weight_gives_zero_and_no_gradient():
    hidden, table, bias, labels, _ = make_inputs(13)
    run = graph_loss(13, label_smoothing=0.1, z_loss=0.01)
    loss, correct, gradients = run(hidden, table, bias, labels, np.zeros(13, "float32"))
    assert float(loss) == float(correct) == 0.0
    assert all(not np.any(each) for each in gradients)


def test_hidden_states_keep_their_leading_shape():
    hidden, table, _, labels, weights = make_inputs(12)
    flat = token_cross_entropy(hidden, table, labels, weights)
    rows = token_cross_entropy(hidden.reshape(3, 4, WIDTH), table, labels.reshape(3, 4), weights.reshape(3, 4))
    np.testing.assert_array_equal(flat, rows)


def test_large_logits_stay_finite():
    hidden, table, bias, labels, weights = make_inputs(13)
    loss, _, gradients = graph_loss(13)(1e4 * hidden, table, bias, labels, weights)
    assert np.isfinite(loss)
    assert all(np.isfinite(each).all() for each in gradients)


def test_a_tie_counts_in_training_only():
    hidden, table = np.zeros((4, WIDTH), "float32"), np.ones((VOCAB, WIDTH), "float32")
    labels, weights = np.array([0, 1, 2, 3], "int32"), np.ones(4, "float32")
    assert token_cross_entropy(hidden, table, labels, weights, training=True).correct == 4.0
    assert token_cross_entropy(hidden, table, labels, weights, training=False).correct == 1.0  # argmax is token 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision_inputs(dtype, training):
    hidden, table, bias, labels, weights = make_inputs(40)
    half = [tf.cast(each, dtype) for each in (0.5 * hidden, table, bias)]
    exact = [tf.cast(each, "float64").numpy() for each in half]  # The same numbers: only the sums differ.
    expected = value_and_gradients(lambda *args: plain_loss(*args, labels, weights.astype("float64")), *exact)

    def chunked(*args):
        sums = token_cross_entropy(*args[:2], labels, weights, bias=args[2], training=training, chunk_tokens=16)
        assert {each.dtype for each in sums} == {tf.float32}
        return sums.loss, sums.correct

    value, _, gradients = value_and_gradients(chunked, *half)
    tolerance = 2e-2 if dtype == "bfloat16" else 3e-3
    np.testing.assert_allclose(value, expected[0], rtol=tolerance)
    for one, other, source in zip(gradients, expected[2], half, strict=True):
        assert one.dtype == source.dtype.as_numpy_dtype
        assert np.linalg.norm(one.astype("float64") - other) < tolerance * np.linalg.norm(other)


def shapes_in(function):
    """Shapes of all tensors in a concrete function and in the functions that it calls."""
    todo, seen = [function.graph], set()
    while todo:
        graph = todo.pop()
        for operation in graph.get_operations():
            yield from (tuple(output.shape.as_list()) for output in operation.outputs if output.shape.rank is not None)
            for attribute in operation.node_def.attr.values():
                for name in [attribute.func.name, *(each.name for each in attribute.list.func)]:
                    if name and name not in seen:
                        seen.add(name)
                        todo.append(graph._get_function(name).graph)


def holds_all_logits(shapes, num_tokens, vocab_size):
    return any(np.prod(shape) >= num_tokens * vocab_size for shape in shapes if all(shape))


@pytest.mark.parametrize("training", [False, True])
def test_all_logits_are_never_held(training):
    num_tokens = 64

    def plain(hidden, table, bias, labels, weights):
        with tf.GradientTape() as tape:
            tape.watch([hidden, table, bias])
            value, _ = plain_loss(hidden, table, bias, labels, weights)
        return value, tape.gradient(value, [hidden, table, bias])

    run = graph_loss(num_tokens, training=training, chunk_tokens=16, label_smoothing=0.1, z_loss=0.01)
    specs = run.input_signature
    assert holds_all_logits(shapes_in(tf.function(plain).get_concrete_function(*specs)), num_tokens, VOCAB)
    shapes = set(shapes_in(run.get_concrete_function()))
    assert (16, VOCAB) in shapes
    assert not holds_all_logits(shapes, num_tokens, VOCAB)


def test_the_default_chunks_are_bounded():
    """At the width of GPT-2, 8 rows of 512 tokens go through in chunks of 384 or fewer."""
    specs = [tf.TensorSpec((4096, 768)), tf.TensorSpec((5000, 768)), tf.TensorSpec((4096,), tf.int32)]

    def run(hidden, table, labels):
        return token_cross_entropy(hidden, table, labels, tf.ones((4096,)), training=True).loss

    shapes = set(shapes_in(tf.function(run).get_concrete_function(*specs)))
    widest = max(shape[0] for shape in shapes if len(shape) == 2 and shape[1] == 5000)
    assert widest <= 384
