"""Token embedding whose table is also the output head."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

Tensor = Any


class TokenEmbedding(keras.layers.Layer):
    """Rows of one table, looked up on the way in; `head_table` is what the output head multiplies with.

    Shapes:
        token_ids [B, T] int32; returns [B, T, D].

    Args:
        vocab_size: V.
        model_dim: D.
        embeddings_initializer: of the table [V, D].

    Reference:
        Press and Wolf 2017, "Using the Output Embedding to Improve Language Models".
    """

    def __init__(
        self, vocab_size: int, model_dim: int, *, embeddings_initializer: Any = "uniform", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.model_dim = model_dim
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)

    def build(self, input_shape: Any = None) -> None:
        """Creates the table; the shape of the inputs does not matter."""
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.vocab_size, self.model_dim),
            initializer=self.embeddings_initializer,
            autocast=False,  # Look up first and cast the rows found: casting the table would cost V / T times more.
        )

    def call(self, token_ids: Tensor) -> Tensor:
        """Rows of the table."""
        return ops.cast(ops.take(self.embeddings, token_ids, axis=0), self.compute_dtype)

    def head_table(self) -> Tensor:
        """The table [V, D] in the compute dtype, as the output head multiplies with it."""
        return ops.cast(self.embeddings, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "vocab_size": self.vocab_size,
            "model_dim": self.model_dim,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
        }
