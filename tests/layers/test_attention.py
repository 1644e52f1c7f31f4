"""Attention and its cache against plain loops in numpy."""

from __future__ import annotations

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from lmzoo.layers import CrossAttention, KeyValueCache, SelfAttention, attention_bias, recorded_attention
from lmzoo.layers.cache import write_slots

BATCH, LENGTH, HEADS, WIDTH = 2, 5, 2, 8


def make_layer(seed=0, width=WIDTH, **options):
    layer = SelfAttention(HEADS, **options)
    layer.build((None, None, width))
    random = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    return layer


def make_inputs(length=LENGTH, seed=1):
    return np.random.default_rng(seed).normal(size=(BATCH, length, WIDTH)).astype("float32")


def weights_of(layer, inputs, allowed, scale=None):
    """Weights [B, N, T, S] of the keys that `allowed` [B, T, S] lets each query see, one query and head at a time."""
    query, key, _ = np.split(inputs @ np.asarray(layer.qkv.kernel) + np.asarray(layer.qkv.bias), 3, axis=-1)
    size = inputs.shape[-1] // layer.num_heads
    scale = size**-0.5 if scale is None else scale
    weights = np.zeros((len(inputs), layer.num_heads, *allowed.shape[1:]))
    for row, head, place in np.ndindex(weights.shape[:3]):
        part, keys = slice(head * size, (head + 1) * size), np.flatnonzero(allowed[row, place])
        scores = key[row, keys, part] @ query[row, place, part] * scale
        scores = np.exp(scores - scores.max())
        weights[row, head, place, keys] = scores / scores.sum()
    return weights


def reference(layer, inputs, allowed, scale=None):
    """Attention of each query to the keys that `allowed` [B, T, S] lets it see."""
    output_kernel, output_bias = (np.asarray(each) for each in layer.output_projection.weights)
    value = np.split(inputs @ np.asarray(layer.qkv.kernel) + np.asarray(layer.qkv.bias), 3, axis=-1)[2]
    heads = np.stack(np.split(value, layer.num_heads, axis=-1), axis=1)  # [B, N, S, H]
    outputs = np.concatenate(list(np.moveaxis(weights_of(layer, inputs, allowed, scale) @ heads, 1, 0)), axis=-1)
    return outputs @ output_kernel + output_bias


CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))
PADDING = np.array([[True, True, True, True, False], [True, True, True, True, True]])
SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 2, 2, 3, 0]])
SAME = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"causal": False}, np.ones((BATCH, LENGTH, LENGTH), bool)),
        ({"causal": True}, np.broadcast_to(CAUSAL, (BATCH, LENGTH, LENGTH))),
        ({"causal": False, "key_mask": PADDING}, np.broadcast_to(PADDING[:, None], (BATCH, LENGTH, LENGTH))),
        ({"causal": True, "key_mask": PADDING}, CAUSAL & PADDING[:, None]),
        ({"causal": True, "segment_ids": SEGMENTS}, CAUSAL & SAME),
        ({"causal": False, "segment_ids": SEGMENTS, "key_mask": SEGMENTS > 0}, SAME & (SEGMENTS > 0)[:, None]),
    ],
)
def test_equals_the_reference(options, allowed):
    layer, inputs = make_layer(), make_inputs()
    slots = np.arange(LENGTH)
    bias = attention_bias(slots, slots, dtype="float32", **options)
    seen = allowed.any(-1)  # A query that sees nothing may give any number, but no NaN.
    outputs = np.asarray(layer(inputs, bias))
    assert np.isfinite(outputs).all()
    full = np.where(seen[..., None], allowed, True)
    np.testing.assert_allclose(outputs[seen], reference(layer, inputs, full)[seen], rtol=1e-4, atol=1e-5)


def test_scale_replaces_the_usual_one():
    layer, inputs = make_layer(scale=0.3), make_inputs()
    allowed = np.ones((BATCH, LENGTH, LENGTH), bool)
    np.testing.assert_allclose(layer(inputs), reference(layer, inputs, allowed, 0.3), rtol=1e-4, atol=1e-5)


def test_no_bias_where_nothing_is_hidden():
    assert attention_bias(np.arange(3), np.arange(3), dtype="float32", causal=False) is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hidden_keys_have_no_weight_in_any_dtype(dtype):
    bias = attention_bias(np.arange(4), np.arange(4), dtype=dtype, causal=True)
    assert keras.backend.standardize_dtype(bias.dtype) == dtype
    scores = tf.cast(tf.random.stateless_normal((1, 1, 4, 4), (1, 2), stddev=20.0), dtype)
    weights = np.asarray(tf.nn.softmax(tf.cast(scores + bias, "float32")))
    assert not weights[..., ~np.tril(np.ones((4, 4), bool))].any()
    hidden = attention_bias(np.arange(4), np.arange(4), dtype=dtype, causal=True, key_mask=np.zeros((1, 4), bool))
    assert np.isfinite(np.asarray(tf.nn.softmax(tf.cast(scores + hidden, "float32")))).all()


def test_dynamic_shapes():
    layer = make_layer()

    @tf.function(input_signature=[tf.TensorSpec((None, None, WIDTH)), tf.TensorSpec((None, None), tf.bool)])
    def run(inputs, mask):
        slots = tf.range(tf.shape(inputs)[1])
        return layer(inputs, attention_bias(slots, slots, dtype="float32", causal=True, key_mask=mask))

    for length in (1, 4, 5):
        inputs, mask = make_inputs(length), PADDING[:, :length]
        allowed = np.tril(np.ones((length, length), bool)) & mask[:, None]
        np.testing.assert_allclose(run(inputs, mask), reference(layer, inputs, allowed), rtol=1e-4, atol=1e-5)


def test_recorded_attention_is_that_of_each_layer_in_their_order():
    first, second, inputs = make_layer(0), make_layer(1), make_inputs()
    bias = attention_bias(np.arange(LENGTH), np.arange(LENGTH), dtype="float32", causal=True, key_mask=PADDING)
    allowed = CAUSAL & PADDING[:, None]

    @tf.function(input_signature=[tf.TensorSpec((BATCH, None, WIDTH))])
    def run(values):
        first(values, bias)
        with recorded_attention() as record:
            outputs = second(first(values, bias), bias)
        second(outputs, bias)
        assert len(record) == 2
        return record, outputs

    record, outputs = run(inputs)
    hidden = np.asarray(first(inputs, bias))
    for layer, values, weights in zip((first, second), (inputs, hidden), record, strict=True):
        np.testing.assert_allclose(weights, weights_of(layer, values, allowed), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs, run(inputs)[1])
    np.testing.assert_allclose(outputs, second(hidden, bias), rtol=1e-5, atol=1e-5)


def test_attention_is_recorded_in_float32_without_dropout_and_of_other_sequences_too():
    inputs = make_inputs()
    layer = SelfAttention(HEADS, dropout_rate=0.9, dtype="float16")
    cross = CrossAttention(HEADS, 3)
    cross.build((None, None, WIDTH))
    with recorded_attention() as record:
        layer(inputs, training=True)
        cross(inputs, *cross.keys_and_values(make_inputs(3, seed=5)))
    assert [(each.dtype, tuple(each.shape)) for each in record] == [
        (tf.float32, (BATCH, HEADS, LENGTH, LENGTH)),
        (tf.float32, (BATCH, HEADS, LENGTH, 3)),
    ]
    for each in record:
        np.testing.assert_allclose(np.sum(each, -1), 1.0, atol=1e-5)


def test_attention_is_recorded_only_where_it_is_asked_for():
    layer, inputs = make_layer(), make_inputs()
    specs = tf.TensorSpec((BATCH, LENGTH, WIDTH))

    def operations():
        graph = tf.function(lambda values: layer(values)).get_concrete_function(specs).graph
        return [operation.type for operation in graph.get_operations()]

    before = operations()
    with recorded_attention() as outer, pytest.raises(KeyError):  # noqa: PT012
        layer(inputs)
        with recorded_attention() as inner:
            layer(inputs)
        layer(inputs)
        thread = threading.Thread(target=layer, args=(inputs,))
        thread.start()
        thread.join()
        raise KeyError
    layer(inputs)
    assert (len(outer), len(inner)) == (2, 1)
    assert operations() == before


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads is 3, but must divide the model width, which is 8"):
        SelfAttention(3).build((None, None, 8))


def test_dropout_of_attention_weights_acts_in_training_only():
    layer, inputs = make_layer(dropout_rate=0.5), make_inputs()
    calm = np.asarray(layer(inputs))
    np.testing.assert_array_equal(calm, layer(inputs, training=False))
    assert np.abs(calm - layer(inputs, training=True)).max() > 1e-3


def test_config_round_trip():
    layer = SelfAttention(
        HEADS,
        scale=0.5,
        dropout_rate=0.1,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.5),
        output_initializer="zeros",
        dtype="mixed_bfloat16",
        name="attention",
    )
    config = layer.get_config()
    twin = SelfAttention.from_config(config)
    assert twin.get_config() == config
    twin.build((None, None, WIDTH))
    assert not np.any(twin.output_projection.kernel)
    assert twin.compute_dtype == "bfloat16"


# -- The cache.


def empty_cache(length, batch=BATCH, layers=1):
    return KeyValueCache.empty(batch, layers, HEADS, length, WIDTH // HEADS, "float32")


def attend_in_chunks(layer, inputs, mask, sizes, cache_length):
    """Reads `inputs` [B, T, D] in chunks of these sizes through a cache; returns all outputs."""
    cache, outputs, start = empty_cache(cache_length), [], 0
    for size in sizes:
        part = slice(start, start + size)
        cache = cache.reserve(mask[:, part])
        query_slots = tf.range(size) + cache.next_slot
        bias = attention_bias(query_slots, cache.slots, dtype="float32", causal=True, key_mask=cache.mask)
        output, cache = layer(inputs[:, part], bias, cache=cache, layer=0)
        cache = cache.advance(size)
        outputs.append(np.asarray(output))
        start += size
    return np.concatenate(outputs, axis=1), cache


@settings(max_examples=12)
@given(st.data())
def test_chunked_prefill_equals_one_prefill(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    spare = data.draw(st.integers(0, 3))
    length = sum(sizes)
    lengths = np.array([length, data.draw(st.integers(1, length))])
    mask = np.arange(length) < lengths[:, None]
    layer, inputs = make_layer(), make_inputs(length)
    allowed = np.tril(np.ones((length, length), bool)) & mask[:, None]
    expected = reference(layer, inputs, allowed)
    for split in (sizes, [length]):
        outputs, cache = attend_in_chunks(layer, inputs, mask, split, length + spare)
        np.testing.assert_allclose(outputs[mask], expected[mask], rtol=1e-4, atol=1e-4)
        assert int(cache.next_slot) == length
        np.testing.assert_array_equal(cache.mask, np.pad(mask, ((0, 0), (0, spare))))


@given(st.data())
def test_write_slots_equals_assignment(data):
    num_slots = data.draw(st.integers(1, 7))
    num_updates = data.draw(st.integers(1, num_slots))
    start = data.draw(st.integers(0, num_slots - num_updates))
    axis = data.draw(st.integers(0, 2))
    is_boolean = data.draw(st.booleans())
    shape = np.array([2, 3, 2])
    random = np.random.default_rng(0)

    def draw(length):
        shape[axis] = length
        values = random.integers(0, 2, shape).astype(bool) if is_boolean else random.normal(size=shape)
        return values if is_boolean else values.astype("float32")

    slots, updates = draw(num_slots), draw(num_updates)
    expected = slots.copy()
    np.moveaxis(expected, axis, 0)[start : start + num_updates] = np.moveaxis(updates, axis, 0)
    np.testing.assert_array_equal(write_slots(slots, updates, np.int32(start), axis=axis), expected)


def test_write_slots_with_dynamic_sizes():
    @tf.function(
        input_signature=[
            tf.TensorSpec((None, 2, None, 3)),
            tf.TensorSpec((None, 2, None, 3)),
            tf.TensorSpec((), tf.int32),
        ]
    )
    def write(slots, updates, start):
        return write_slots(slots, updates, start, axis=2)

    slots = np.zeros((2, 2, 6, 3), "float32")
    for num_updates in (1, 2):
        updates = np.random.default_rng(0).normal(size=(2, 2, num_updates, 3)).astype("float32")
        expected = slots.copy()
        expected[:, :, 3 : 3 + num_updates] = updates
        np.testing.assert_array_equal(write(slots, updates, 3), expected)


def test_the_cache_of_one_layer_leaves_the_others_alone():
    cache = empty_cache(3, layers=2)
    ones = np.ones((BATCH, HEADS, 1, WIDTH // HEADS), "float32")
    written = cache.write(1, ones, 2 * ones)
    assert not np.any(written.keys[0])
    assert not np.any(cache.keys[1])  # Updated by value.
    np.testing.assert_array_equal(written.keys[1][:, :, 0], ones[:, :, 0])
    np.testing.assert_array_equal(written.values[1][:, :, 0], 2 * ones[:, :, 0])
    assert not np.any(written.keys[1][:, :, 1:])


def test_the_cache_goes_through_loops():
    """Its shapes and dtypes stay what they were, with a batch size known only at run time."""

    @tf.function(input_signature=[tf.TensorSpec((), tf.int32)])
    def run(batch_size):
        cache = empty_cache(4, batch=batch_size)

        def step(cache):
            token = tf.ones((batch_size, 1), tf.bool)
            update = tf.ones((batch_size, HEADS, 1, WIDTH // HEADS))
            return (cache.reserve(token).write(0, update, update).advance(1),)

        return tf.while_loop(lambda cache: cache.next_slot < 3, step, (cache,))[0]

    for batch_size in (0, 2):
        cache = run(batch_size)
        assert isinstance(cache, KeyValueCache)
        np.testing.assert_array_equal(cache.mask, np.tile([[True, True, True, False]], (batch_size, 1)))
