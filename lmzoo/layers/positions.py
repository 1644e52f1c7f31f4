"""How a model knows where in its document a token stands."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

Tensor = Any


class LearnedPositions(keras.layers.Layer):
    """A learned vector for each position.

    Shapes:
        positions [B, T] or [T] int32 in [0, context_length); returns [B, T, D] or [T, D].

    Args:
        context_length: number of positions.
        model_dim: D.
        embeddings_initializer: of the table [context_length, D].
    """

    def __init__(
        self, context_length: int, model_dim: int, *, embeddings_initializer: Any = "uniform", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.context_length = context_length
        self.model_dim = model_dim
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)

    def build(self, input_shape: Any = None) -> None:
        """Creates the table; the shape of the inputs does not matter."""
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.context_length, self.model_dim),
            initializer=self.embeddings_initializer,
            autocast=False,
        )

    def call(self, positions: Tensor) -> Tensor:
        """Rows of the table."""
        return ops.cast(ops.take(self.embeddings, positions, axis=0), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "context_length": self.context_length,
            "model_dim": self.model_dim,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
        }


class RelativePositionBias(keras.layers.Layer):
    """A learned number for each head and each distance between a query and a key, distances far apart sharing one.

    Half of the buckets are for single distances, the others for ranges that grow with the distance, up to
    `max_distance`; all that lies beyond shares the last. Without causality, half of all are for keys that come later.

    Shapes:
        query_slots [T] and key_slots [S] int32; returns [1, N, T, S] in the compute dtype.

    Args:
        num_heads: N.
        num_buckets: rows of the table [num_buckets, N], an even number.
        max_distance: where the last bucket begins.
        causal: whether keys that come later are never attended to, so that they need no buckets.
        embeddings_initializer: of the table.

    Reference:
        Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
        section 2.1, and the released code.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        causal: bool,
        embeddings_initializer: Any = "uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.causal = causal
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)

    def build(self, input_shape: Any = None) -> None:
        """Creates the table; the shape of the inputs does not matter."""
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.num_buckets, self.num_heads),
            initializer=self.embeddings_initializer,
            autocast=False,
        )

    def call(self, query_slots: Tensor, key_slots: Tensor) -> Tensor:
        """What is added to the scores."""
        distances = ops.expand_dims(key_slots, 0) - ops.expand_dims(query_slots, 1)  # [T, S]
        # By a table: a logarithm at the edge of a bucket may come out on either side, depending on who computes it.
        places = ops.clip(distances, -self.max_distance, self.max_distance) + self.max_distance
        bias = ops.take(self.embeddings, ops.take(self.buckets(), places, axis=0), axis=0)  # [T, S, N]
        return ops.cast(ops.expand_dims(ops.transpose(bias, (2, 0, 1)), 0), self.compute_dtype)

    def buckets(self) -> np.ndarray:
        """Rows of the table [2 * max_distance + 1] int32, for distances from -max_distance to max_distance."""
        distances = np.arange(-self.max_distance, self.max_distance + 1)
        num_buckets, later = self.num_buckets, np.zeros_like(distances)
        if self.causal:
            distances = np.maximum(-distances, 0)
        else:
            num_buckets //= 2
            later, distances = num_buckets * (distances > 0), np.abs(distances)
        exact = num_buckets // 2
        ratio = np.log(np.maximum(distances, 1).astype("float32") / exact) / math.log(self.max_distance / exact)
        far = np.minimum(exact + (ratio * (num_buckets - exact)).astype("int32"), num_buckets - 1)
        return (later + np.where(distances < exact, distances, far)).astype("int32")

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "causal": self.causal,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
        }


def token_positions(token_mask: Tensor, num_before: Tensor | None = None) -> Tensor:
    """Counts the real tokens of each row, so that padding on either side leaves positions as they were.

    Shapes:
        token_mask [B, T] bool, num_before [B] int32 tokens read earlier; returns [B, T] int32. Padding on the left
        gets position 0.
    """
    count = ops.cumsum(ops.cast(token_mask, "int32"), axis=1)
    if num_before is not None:
        count = count + ops.expand_dims(num_before, 1)
    return ops.maximum(count - 1, 0)


def take_positions(hidden: Tensor, places: Tensor) -> Tensor:
    """The hidden states of some tokens of each row, by their places in it.

    Shapes:
        hidden [B, T, D], places [B, M] int32 in [0, T); returns [B, M, D].
    """
    rows, length, width = ops.shape(hidden)
    places = places + ops.expand_dims(ops.arange(rows, dtype="int32") * length, 1)  # [B, M], among all rows' tokens
    return ops.take(ops.reshape(hidden, (-1, width)), places, axis=0)  # [B, M, D]
