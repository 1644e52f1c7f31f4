"""What encoder-decoders have beside the others: cross-attention, gates, relative positions, and how they start."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from lmzoo.layers import (
    CrossAttention,
    FeedForward,
    KeyValueCache,
    RelativePositionBias,
    SelfAttention,
    SideBySideNormal,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def softmax(scores):
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def randomized(layer, seed=0):
    for number, variable in enumerate(layer.trainable_variables):
        variable.assign(normal(*variable.shape, seed=seed + number))
    return layer


def cross_attention(**options):
    layer = CrossAttention(3, 5, **options)
    layer.build((None, None, 8))
    return randomized(layer)


@pytest.mark.parametrize(("scale", "use_bias"), [(None, True), (1.0, False), (0.3, True)])
def test_cross_attention_is_the_formula(scale, use_bias):
    layer = cross_attention(scale=scale, use_bias=use_bias)
    inputs, memory, bias = normal(2, 4, 8), normal(2, 6, 8, seed=1), normal(2, 1, 4, 6, seed=2)

    def project(dense, values):
        return values @ np.asarray(dense.kernel) + (np.asarray(dense.bias) if use_bias else 0.0)

    def heads(values):
        return values.reshape(2, -1, 3, 5).transpose(0, 2, 1, 3)

    both = project(layer.key_value, memory)
    query, key, value = (heads(each) for each in (project(layer.query, inputs), both[..., :15], both[..., 15:]))
    scores = query @ key.swapaxes(2, 3) * (5**-0.5 if scale is None else scale) + bias
    expected = project(layer.output_projection, (softmax(scores) @ value).transpose(0, 2, 1, 3).reshape(2, 4, 15))
    np.testing.assert_allclose(layer(inputs, *layer.keys_and_values(memory), bias), expected, rtol=1e-4, atol=1e-4)


def test_rows_that_share_a_memory_attend_as_if_each_had_its_own():
    layer = cross_attention()
    inputs, memory, bias = normal(6, 1, 8), normal(2, 5, 8, seed=1), normal(2, 1, 1, 5, seed=2)
    repeated = layer(inputs, *layer.keys_and_values(np.repeat(memory, 3, axis=0)), np.repeat(bias, 3, axis=0))
    shared = layer(inputs, *layer.keys_and_values(memory), bias)
    np.testing.assert_allclose(shared, repeated, rtol=1e-5, atol=1e-5)
    assert layer(inputs[:0], *layer.keys_and_values(memory[:0]), bias[:0]).shape == (0, 1, 8)


def test_heads_need_not_share_out_the_width():
    layer = SelfAttention(3, head_dim=5, use_bias=False)
    layer.build((None, None, 8))
    assert {tuple(each.shape) for each in layer.weights} == {(8, 45), (15, 8)}
    assert layer(normal(2, 4, 8)).shape == (2, 4, 8)


@pytest.mark.parametrize(
    "layer", [CrossAttention(3, 5, scale=1.0), RelativePositionBias(2, causal=True, num_buckets=8)]
)
def test_layers_round_trip_through_their_config(layer):
    config = layer.get_config()
    twin = type(layer).from_config(config)
    assert twin.get_config() == config


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_gate_multiplies_what_is_activated(activation):
    layer = FeedForward(7, activation=activation, gated=True, use_bias=False)
    layer.build((None, 4))
    randomized(layer)
    inputs, kernel = normal(3, 4), np.asarray(layer.up.kernel)
    assert kernel.shape == (4, 14)
    activated = inputs @ kernel[:, :7]
    activated = np.maximum(activated, 0) if activation == "relu" else activated / (1 + np.exp(-activated))
    expected = activated * (inputs @ kernel[:, 7:]) @ np.asarray(layer.down.kernel)
    np.testing.assert_allclose(layer(inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_a_projection_in_float32_does_not_overflow(policy):
    """Whatever type its weights are stored in."""
    for output_dtype in ("float32", None):
        layer = FeedForward(64, activation="relu", use_bias=False, output_dtype=output_dtype, dtype=policy)
        layer.build((None, 4))
        layer.up.kernel.assign(np.full((4, 64), 8.0))
        layer.down.kernel.assign(np.full((64, 4), 40.0))
        assert layer.down.kernel.dtype == layer.variable_dtype
        outputs = np.asarray(layer(np.ones((1, 4), "float16")))
        if output_dtype is None:
            assert np.isinf(outputs).all()
        else:
            np.testing.assert_allclose(outputs, np.full((1, 4), 4 * 8 * 64 * 40.0))


def test_dropout_stands_between_the_projections():
    layer = FeedForward(51, activation="relu", use_bias=False, dropout_rate=0.5)
    layer.build((None, 4))
    layer.up.kernel.assign(np.ones((4, 51)))
    layer.down.kernel.assign(np.ones((51, 4)))
    inputs = np.ones((1, 4), "float32")
    np.testing.assert_allclose(layer(inputs, training=False), np.full((1, 4), 4 * 51.0))
    dropped = np.asarray(layer(inputs, training=True))
    assert 0 < dropped[0, 0] < 8 * 51
    assert dropped[0, 0] % 8 == 0  # Each number that stays is 4, times 2; 51 of 4 are no multiple of 8.


@pytest.mark.parametrize("causal", [True, False])
def test_relative_positions(causal):
    """Near distances have buckets of their own, far ones share; what comes later has none, or the other half."""
    layer = RelativePositionBias(3, num_buckets=8, max_distance=20, causal=causal)
    layer.build()
    table = np.asarray(layer.embeddings)
    bias = np.asarray(layer(np.arange(40), np.arange(40)))
    assert bias.shape == (1, 3, 40, 40)

    def bucket(query, key):
        """The row of the table that the numbers of a place come from."""
        (row,) = np.flatnonzero((np.abs(table - bias[0, :, query, key]) < 1e-7).all(axis=1))
        return row

    backward = [bucket(39, 39 - distance) for distance in range(40)]
    exact = 4 if causal else 2
    assert backward[:exact] == list(range(exact))
    assert backward == sorted(backward)
    assert set(backward[20:]) == {7 if causal else 3}
    forward = [bucket(0, distance) for distance in range(1, 40)]
    assert forward == ([0] * 39 if causal else [4 + row for row in backward[1:]])
    np.testing.assert_array_equal(layer(np.array([7]), np.arange(40)), bias[:, :, 7:8])


def test_a_cache_takes_rows_in_any_order_and_repeated():
    cache = KeyValueCache.empty(2, 1, 2, 4, 3, "float32")
    cache = cache.write(0, normal(2, 2, 1, 3), normal(2, 2, 1, 3, seed=1))
    cache = cache.reserve(np.array([[True], [False]])).advance(1)
    taken = cache.take(np.array([1, 0, 0]))
    for one, other in ((taken.keys[0], cache.keys[0]), (taken.values[0], cache.values[0]), (taken.mask, cache.mask)):
        np.testing.assert_array_equal(one, np.asarray(other)[[1, 0, 0]])
    assert int(taken.next_slot) == 1


def test_projections_side_by_side_start_with_deviations_of_their_own():
    initializer = SideBySideNormal((0.1, 1.0, 10.0))
    twin = keras.initializers.deserialize(keras.initializers.serialize(initializer))
    keras.utils.set_random_seed(0)
    for each in (initializer, twin):
        kernel = np.asarray(each((200, 90)))
        deviations = [part.std() for part in np.split(kernel, 3, axis=1)]
        np.testing.assert_allclose(deviations, (0.1, 1.0, 10.0), rtol=0.05)
        assert abs(np.corrcoef(kernel[:, :30].ravel(), kernel[:, 30:60].ravel())[0, 1]) < 0.05
