"""Multi-head attention: training, prefill and decode in one code path."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from lmzoo.layers.cache import KeyValueCache

Tensor = Any

_RECORD: contextvars.ContextVar[list[Tensor] | None] = contextvars.ContextVar("attention", default=None)


def attention_bias(
    query_slots: Tensor,
    key_slots: Tensor,
    *,
    dtype: str,
    causal: bool,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
) -> Tensor | None:
    """What is added to attention scores so that a query sees only the keys it may see; None if it may see all.

    Shapes:
        query_slots [T] and key_slots [S]: place of each token in the order of reading.
        key_mask [B, S] bool: False hides a key (padding, an empty cache slot).
        segment_ids [B, T]: a query sees the keys of its own document only.
        key_segment_ids [B, S]: the documents of the keys, if they are not the queries' own.
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
        key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
        visible = ops.equal(ops.expand_dims(segment_ids, 2), ops.expand_dims(key_segment_ids, 1))  # [B, T, S]
        visible = ops.expand_dims(visible, 1)  # [B, 1, T, S]
        allowed = visible if allowed is None else ops.logical_and(allowed, visible)
    if allowed is None:
        return None
    hidden = -3e4 if dtype == "float16" else -1e9
    return ops.where(allowed, ops.zeros((), dtype), ops.full((), hidden, dtype))


@contextlib.contextmanager
def recorded_attention() -> Iterator[list[Tensor]]:
    """Gives a list that gets the probabilities of each attention that runs meanwhile, in the order of running.

    Shapes:
        each [B, N, T, S] float32, before dropout: a row sums to 1 over the keys that its query may see.

    It is for inference: what is recomputed in training, or runs inside of a loop, has tensors of another graph. Other
    threads, and what runs before or after, record nothing and trace the same graph as ever.
    """
    record: list[Tensor] = []
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: keras.layers.Dropout) -> Tensor:
    """Softmax attention of scaled queries; the softmax is taken in float32.

    Shapes:
        query [B, N, T, H], key and value [B, N, S, H], bias broadcastable to [B, N, T, S]; returns [B, N, T, H].
    """
    scores = ops.matmul(query, ops.swapaxes(key, 2, 3))  # [B, N, T, S]
    if bias is not None:
        scores = scores + bias
    probabilities = _softmax(ops.cast(scores, "float32"))
    record = _RECORD.get()
    if record is not None:
        record.append(probabilities)
    return ops.matmul(dropout(ops.cast(probabilities, value.dtype)), value)  # [B, N, T, H]


def _softmax(scores: Tensor) -> Tensor:
    """Over the last axis; a single key gets all of it, of which Keras would warn."""
    if scores.shape[-1] == 1:
        return ops.exp(ops.log_softmax(scores, axis=-1))
    return ops.softmax(scores, axis=-1)


def _scaled(query: Tensor, scale: float | None) -> Tensor:
    """Queries [B, N, T, H] times the factor of the scores, H ** -0.5 if that is None."""
    head_dim = query.shape[-1]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    if scale == 1.0:
        return query
    # By a vector: TensorFlow fuses a scalar factor, product and bias into one op that is many times slower on CPUs.
    return query * ops.full((head_dim,), scale, dtype=query.dtype)


def _split_heads(projected: Tensor, parts: int, num_heads: int) -> list[Tensor]:
    """[B, T, parts * N * H] -> `parts` tensors [B, N, T, H]."""
    rows, length = ops.shape(projected)[:2]
    head_dim = projected.shape[-1] // (parts * num_heads)
    split = ops.reshape(projected, (rows, length, parts, num_heads, head_dim))  # [B, T, parts, N, H]
    return ops.unstack(ops.transpose(split, (2, 0, 3, 1, 4)), axis=0)


def _merge_heads(heads: Tensor) -> Tensor:
    """[B, N, T, H] -> [B, T, N * H]."""
    rows, num_heads, length, head_dim = ops.shape(heads)
    return ops.reshape(ops.transpose(heads, (0, 2, 1, 3)), (rows, length, num_heads * head_dim))


class SelfAttention(keras.layers.Layer):
    """Attention of a sequence to itself, or to itself and what a cache remembers.

    Shapes:
        inputs [B, T, D], bias broadcastable to [B, N, T, S]; returns [B, T, D]. S = T without a cache.

    Args:
        num_heads: N.
        head_dim: H; None means D / N.
        scale: factor of the scores; None means H ** -0.5.
        use_bias: whether the projections have biases.
        dropout_rate: probability of dropping an attention weight in training.
        kernel_initializer: of the query, key and value projection.
        output_initializer: of the output projection.

    Raises:
        ValueError: on build, if `num_heads` does not divide D and there is no `head_dim`.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2. Queries, keys and values come from one
        matrix [D, 3 N H], as in GPT-2.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        head_dim: int | None = None,
        scale: float | None = None,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        output_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.use_bias = use_bias
        self.dropout_rate = dropout_rate
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy)

    def build(self, input_shape: tuple[Any, ...]) -> None:
        """Creates the weights for inputs [..., D]."""
        model_dim = input_shape[-1]
        if self.head_dim is None and model_dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, but must divide the model width, which is {model_dim}.")
        width = self.num_heads * (self.head_dim or model_dim // self.num_heads)
        dense = functools.partial(keras.layers.Dense, use_bias=self.use_bias, dtype=self.dtype_policy)
        self.qkv = dense(3 * width, kernel_initializer=self.kernel_initializer, name="qkv")
        self.output_projection = dense(model_dim, kernel_initializer=self.output_initializer, name="output")
        self.qkv.build(input_shape)
        self.output_projection.build((*input_shape[:-1], width))

    def call(
        self, inputs: Tensor, bias: Tensor | None = None, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor | tuple[Tensor, KeyValueCache]:
        """Attends; with a `cache`, through its entries of `layer`, and returns the updated cache too."""
        query, key, value = _split_heads(self.qkv(inputs), 3, self.num_heads)  # 3 x [B, N, T, H]
        query = _scaled(query, self.scale)
        if cache is not None:
            cache = cache.write(layer, key, value)
            key, value = cache.keys[layer], cache.values[layer]  # [B, N, S, H]
        outputs = self.output_projection(_merge_heads(attend(query, key, value, bias, self.dropout)))  # [B, T, D]
        return outputs if cache is None else (outputs, cache)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "scale": self.scale,
            "use_bias": self.use_bias,
            "dropout_rate": self.dropout_rate,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
        }


class CrossAttention(keras.layers.Layer):
    """Attention of a sequence to another one, whose keys and values are made once for all steps of decoding.

    Shapes:
        inputs [k B, U, D], key and value [B, N, T, H] from `keys_and_values`, bias broadcastable to [B, N, k U, T];
        returns [k B, U, D].

    Args:
        num_heads: N.
        head_dim: H.
        scale: factor of the scores; None means H ** -0.5.
        use_bias: whether the projections have biases.
        dropout_rate: probability of dropping an attention weight in training.
        query_initializer: of the query projection.
        kernel_initializer: of the key and value projection.
        output_initializer: of the output projection.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.2.3. Keys and values come from one matrix
        [D, 2 N H].
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        query_initializer: Any = "glorot_uniform",
        kernel_initializer: Any = "glorot_uniform",
        output_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.use_bias = use_bias
        self.dropout_rate = dropout_rate
        self.query_initializer = keras.initializers.get(query_initializer)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy)

    def build(self, input_shape: tuple[Any, ...]) -> None:
        """Creates the weights for inputs [..., D], and another sequence as wide."""
        width = self.num_heads * self.head_dim
        dense = functools.partial(keras.layers.Dense, use_bias=self.use_bias, dtype=self.dtype_policy)
        self.query = dense(width, kernel_initializer=self.query_initializer, name="query")
        self.key_value = dense(2 * width, kernel_initializer=self.kernel_initializer, name="key_value")
        self.output_projection = dense(input_shape[-1], kernel_initializer=self.output_initializer, name="output")
        self.query.build(input_shape)
        self.key_value.build(input_shape)
        self.output_projection.build((*input_shape[:-1], width))

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What is attended to, from the other sequence [B, T, D]: two tensors [B, N, T, H]."""
        key, value = _split_heads(self.key_value(memory), 2, self.num_heads)
        return key, value

    def call(self, inputs: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attends to keys and values, which k rows of inputs that follow one another share, as beams do."""
        shape, rows = ops.shape(inputs), ops.shape(key)[0]  # [k B, U, D], B
        length = shape[0] // (max(rows, 1) if isinstance(rows, int) else ops.maximum(rows, 1)) * shape[1]
        query = ops.reshape(self.query(inputs), (rows, length, self.num_heads * self.head_dim))
        (query,) = _split_heads(query, 1, self.num_heads)  # [B, N, k U, H]
        heads = attend(_scaled(query, self.scale), key, value, bias, self.dropout)
        return ops.reshape(self.output_projection(_merge_heads(heads)), shape)  # [k B, U, D]

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "scale": self.scale,
            "use_bias": self.use_bias,
            "dropout_rate": self.dropout_rate,
            "query_initializer": keras.initializers.serialize(self.query_initializer),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
        }
