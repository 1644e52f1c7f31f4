"""Multi-head attention: training, prefill and decode in one code path."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from lmzoo.layers.cache import KeyValueCache

Tensor = Any


def attention_bias(
    query_slots: Tensor,
    key_slots: Tensor,
    *,
    dtype: str,
    causal: bool,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor | None:
    """What is added to attention scores so that a query sees only the keys it may see; None if it may see all.

    Shapes:
        query_slots [T] and key_slots [S]: place of each token in the order of reading.
        key_mask [B, S] bool: False hides a key (padding, an empty cache slot).
        segment_ids [B, T] with T = S: a query sees the keys of its own document only.
        Returns [1 or B, 1, T, S], 0 where attention is allowed and a large negative number elsewhere.

    Args:
        dtype: of the scores. The number is finite, so that a row that may see nothing gives no NaN.
    """
    allowed = None
    if causal:
        visible = ops.expand_dims(query_slots, 1) >= ops.expand_dims(key_slots, 0)  # [T, S]
        allowed = ops.expand_dims(visible, (0, 1))  # [1, 1, T, S]
    if key_mask is not None:
        visible = ops.expand_dims(ops.cast(key_mask, "bool"), (1, 2))  # [B, 1, 1, S]
        allowed = visible if allowed is None else ops.logical_and(allowed, visible)
    if segment_ids is not None:
        visible = ops.equal(ops.expand_dims(segment_ids, 2), ops.expand_dims(segment_ids, 1))  # [B, T, S]
        visible = ops.expand_dims(visible, 1)  # [B, 1, T, S]
        allowed = visible if allowed is None else ops.logical_and(allowed, visible)
    if allowed is None:
        return None
    hidden = -3e4 if dtype == "float16" else -1e9
    return ops.where(allowed, ops.zeros((), dtype), ops.full((), hidden, dtype))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: keras.layers.Dropout) -> Tensor:
    """Softmax attention of scaled queries; the softmax is taken in float32.

    Shapes:
        query [B, N, T, H], key and value [B, N, S, H], bias broadcastable to [B, N, T, S]; returns [B, N, T, H].
    """
    scores = ops.matmul(query, ops.swapaxes(key, 2, 3))  # [B, N, T, S]
    if bias is not None:
        scores = scores + bias
    probabilities = ops.cast(ops.softmax(ops.cast(scores, "float32"), axis=-1), value.dtype)
    return ops.matmul(dropout(probabilities), value)  # [B, N, T, H]


class SelfAttention(keras.layers.Layer):
    """Attention of a sequence to itself, or to itself and what a cache remembers.

    Shapes:
        inputs [B, T, D], bias broadcastable to [B, N, T, S]; returns [B, T, D]. S = T without a cache.

    Args:
        num_heads: N, which must divide D.
        scale: factor of the scores; None means H ** -0.5.
        dropout_rate: probability of dropping an attention weight in training.
        kernel_initializer: of the query, key and value projection.
        output_initializer: of the output projection.

    Raises:
        ValueError: on build, if `num_heads` does not divide D.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2. Queries, keys and values come from one
        matrix [D, 3 D], as in GPT-2.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        output_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.scale = scale
        self.dropout_rate = dropout_rate
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy)

    def build(self, input_shape: tuple[Any, ...]) -> None:
        """Creates the weights for inputs [..., D]."""
        model_dim = input_shape[-1]
        if model_dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, but must divide the model width, which is {model_dim}.")
        self.head_dim = model_dim // self.num_heads
        self.qkv = keras.layers.Dense(
            3 * model_dim, kernel_initializer=self.kernel_initializer, dtype=self.dtype_policy, name="qkv"
        )
        self.output_projection = keras.layers.Dense(
            model_dim, kernel_initializer=self.output_initializer, dtype=self.dtype_policy, name="output"
        )
        self.qkv.build(input_shape)
        self.output_projection.build(input_shape)

    def call(
        self, inputs: Tensor, bias: Tensor | None = None, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor | tuple[Tensor, KeyValueCache]:
        """Attends; with a `cache`, through its entries of `layer`, and returns the updated cache too."""
        shape = ops.shape(inputs)
        qkv = ops.reshape(self.qkv(inputs), (*shape[:2], 3, self.num_heads, self.head_dim))  # [B, T, 3, N, H]
        query, key, value = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)), axis=0)  # 3 x [B, N, T, H]
        # By a vector: TensorFlow fuses a scalar factor, product and bias into one op that is many times slower on CPUs.
        scale = self.scale or 1.0 / math.sqrt(self.head_dim)
        query = query * ops.full((self.head_dim,), scale, dtype=self.compute_dtype)
        if cache is not None:
            cache = cache.write(layer, key, value)
            key, value = cache.keys[layer], cache.values[layer]  # [B, N, S, H]
        heads = attend(query, key, value, bias, self.dropout)
        outputs = self.output_projection(ops.reshape(ops.transpose(heads, (0, 2, 1, 3)), shape))  # [B, T, D]
        return outputs if cache is None else (outputs, cache)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "scale": self.scale,
            "dropout_rate": self.dropout_rate,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
        }
