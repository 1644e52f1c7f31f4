"""How a model knows where in its document a token stands."""

from __future__ import annotations

from typing import Any

import keras
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
