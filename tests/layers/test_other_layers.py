"""Embeddings, positions and feed-forward networks."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest

from lmzoo.layers import FeedForward, LearnedPositions, TokenEmbedding
from lmzoo.layers.positions import token_positions


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def test_token_embedding_looks_up_in_the_table_that_it_gives_to_the_head():
    layer = TokenEmbedding(7, 4)
    layer.build()
    table = normal((7, 4))
    layer.embeddings.assign(table)
    ids = np.array([[0, 6, 3]])
    np.testing.assert_array_equal(layer(ids), table[ids])
    np.testing.assert_array_equal(layer.head_table(), table)
    assert len(layer.weights) == 1


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_token_embedding_in_mixed_precision(dtype):
    layer = TokenEmbedding(7, 4, dtype=dtype)
    layer.build()
    compute = layer.compute_dtype
    assert layer.embeddings.dtype == "float32"
    outputs = layer(np.array([[1, 2]]))
    assert keras.backend.standardize_dtype(outputs.dtype) == compute
    assert keras.backend.standardize_dtype(layer.head_table().dtype) == compute


def test_learned_positions():
    layer = LearnedPositions(5, 4)
    layer.build()
    table = np.asarray(layer.embeddings)
    positions = np.array([[0, 4, 1], [2, 2, 0]])
    np.testing.assert_array_equal(layer(positions), table[positions])
    np.testing.assert_array_equal(layer(np.arange(3)), table[:3])


@pytest.mark.parametrize(
    ("mask", "num_before", "expected"),
    [
        ([1, 1, 1, 0, 0], None, [0, 1, 2, 2, 2]),
        ([0, 0, 1, 1, 1], None, [0, 0, 0, 1, 2]),
        ([0, 0, 0, 0, 0], None, [0, 0, 0, 0, 0]),
        ([1, 1, 0, 0, 0], 7, [7, 8, 8, 8, 8]),
        ([0, 1, 0, 0, 0], 0, [0, 0, 0, 0, 0]),
    ],
)
def test_token_positions_count_real_tokens(mask, num_before, expected):
    before = None if num_before is None else np.array([num_before], "int32")
    positions = token_positions(np.array([mask], bool), before)
    np.testing.assert_array_equal(positions, [expected])


def exact_gelu(x):
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def tanh_gelu(x):
    return x * 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu": exact_gelu,
    "gelu_tanh": tanh_gelu,
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feedforward_and_its_config(activation):
    layer = FeedForward(6, activation=activation, kernel_initializer="random_normal", name="mlp")
    layer = FeedForward.from_config(layer.get_config())
    layer.build((None, None, 4))
    weights = [normal(variable.shape, seed) for seed, variable in enumerate(layer.weights)]
    layer.set_weights(weights)
    inputs = normal((2, 3, 4), seed=9)
    expected = ACTIVATIONS[activation](inputs @ weights[0] + weights[1]) @ weights[2] + weights[3]
    # The two GELUs differ by more than this.
    np.testing.assert_allclose(layer(inputs), expected, rtol=1e-5, atol=1e-5)
    assert layer.name == "mlp"


@pytest.mark.parametrize(
    "layer",
    [
        TokenEmbedding(7, 4, embeddings_initializer=keras.initializers.RandomNormal(stddev=0.5), name="tokens"),
        LearnedPositions(5, 4, embeddings_initializer="zeros", dtype="mixed_bfloat16"),
        FeedForward(6, activation="relu", output_initializer="zeros", dtype="bfloat16"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_config_round_trip(layer):
    config = layer.get_config()
    assert type(layer).from_config(config).get_config() == config
