"""Encoder-decoders: language models that read a source whole, and then write a target from left to right."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from keras import ops

from lmzoo.config import ActivationBytes, ModelConfig
from lmzoo.layers import KeyValueCache, attention_bias
from lmzoo.models.generative import TEXT_MULTIPLE, GenerativeLM, Prompts, pad_rows

Tensor = Any

# Tensors [B, T, F] that the backward pass of an activation reads, its own outputs among them.
_ACTIVATIONS_KEPT = {"gelu_tanh": 5, "gelu": 4, "silu": 2, "relu": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(ModelConfig):
    """Shape of an encoder and a decoder whose blocks keep their sums in float32, and have neither biases nor means.

    Args:
        num_layers: number of blocks of the encoder.
        num_decoder_layers: number of blocks of the decoder; None is `num_layers`.
        num_heads: N.
        head_dim: H; N * H need not be D.
        model_dim: D.
        feedforward_dim: F.
        dropout_rate: of embeddings, attention weights, inside the feed-forward network, of all outputs of a block, and
            of both stacks' outputs.
        norm_epsilon: added to the mean square in the norms.
        activation: "relu", "gelu", "gelu_tanh" or "silu".
        gated: whether the feed-forward network is gated.
        start_token_id: what the decoder reads first.
    """

    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    head_dim: int = 64
    model_dim: int = 512
    feedforward_dim: int = 2048
    dropout_rate: float = 0.1
    norm_epsilon: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    start_token_id: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("num_layers", "num_heads", "head_dim", "model_dim", "feedforward_dim")
        if self.num_decoder_layers is not None:
            self._require_positive("num_decoder_layers")
        self._require_rate("dropout_rate")
        self._require_above_zero("norm_epsilon")
        self._require_token_id("start_token_id")

    @property
    def decoder_layers(self) -> int:
        """Number of blocks of the decoder."""
        return self.num_decoder_layers or self.num_layers

    def count_multiplied(self) -> tuple[int, int]:
        """Weights of the blocks that multiply what the encoder made or reads, and what the decoder does."""
        attention = 4 * self.model_dim * self.num_heads * self.head_dim
        feedforward = (3 if self.gated else 2) * self.model_dim * self.feedforward_dim
        half = attention // 2  # Keys and values of cross-attention are of the encoder's tokens.
        encoder = self.num_layers * (attention + feedforward) + self.decoder_layers * half
        return encoder, self.decoder_layers * (attention + half + feedforward)

    def training_flops_per_token(self, seq_length: int, target_length: int | None = None) -> float:
        """6 for each weight that multiplies a token, and 12 N H for each key that it attends to.

        Args:
            seq_length: T, of the source.
            target_length: U; None is T. Tokens of both count.
        """
        source, target = seq_length, seq_length if target_length is None else target_length
        encoder, decoder = self.count_multiplied()
        weights = encoder * source + (decoder + self.vocab_size * self.model_dim) * target
        keys = self.num_layers * source * source + self.decoder_layers * target * (target + source)
        return (6.0 * weights + 12.0 * self.num_heads * self.head_dim * keys) / (source + target)

    def activation_bytes(
        self, rows: int, seq_length: int, compute_bytes: int, target_length: int | None = None
    ) -> ActivationBytes:
        """As the base class; a block is the mean of those of both stacks. `target_length` None is `seq_length`."""
        source, target = seq_length, seq_length if target_length is None else target_length
        size, is_mixed, drops = compute_bytes, compute_bytes < 4, self.dropout_rate > 0.0
        kept = _ACTIVATIONS_KEPT[self.activation] + (2 if self.gated else 0)
        inner = kept * size
        if drops:  # A mask; and the outputs of a ReLU, which its own gradient needs, beside what is left of them.
            inner += 1 + (size if self.activation == "relu" and not self.gated else 0)
        score = 4 + (size if is_mixed or drops else 0) + (1 if drops else 0)

        def stack(length: int, attends_to: tuple[int, ...]) -> int:
            hidden, heads = length * self.model_dim, self.num_heads * self.head_dim
            norms = (1 + len(attends_to)) * ((8 + size) * hidden + (hidden if drops else 0))
            scores = sum(score * self.num_heads * length * other for other in attends_to)
            projected = sum(2 * size * heads * (length + other) for other in attends_to)  # Also what comes out.
            return rows * (norms + scores + projected + inner * length * self.feedforward_dim)

        encoder, decoder = stack(source, (source,)), stack(target, (target, source))
        count = self.num_layers + self.decoder_layers
        widest = self.num_heads * max(source * source, target * target, target * source)
        working = max((16 + size if is_mixed else 12) * widest, 16 * max(source, target) * self.feedforward_dim)
        ends = (8 + size) * (source + target) * self.model_dim
        return ActivationBytes(
            num_blocks=count,
            block=(self.num_layers * encoder + self.decoder_layers * decoder) // count,
            block_backward=max(encoder, decoder) + rows * working,
            block_input=4 * rows * (source * self.num_layers + target * self.decoder_layers) * self.model_dim // count,
            shared=size
            * (self.num_heads * (source * source + rows * target * target) + rows * source * self.model_dim),
            ends=rows * ends,
            head_tokens=rows * target,
            head_dim=self.model_dim,
        )


class Seq2SeqCache(NamedTuple):
    """What a decoder remembers: its own tokens, and keys and values of what the encoder read, made once.

    Attributes:
        tokens: of the target, for k B rows: all beams of a source follow one another.
        keys, values: of the encoder's states, one [B, N, T, H] tensor a layer.
        bias: what is added to the scores of cross-attention, [B, 1, 1, T].
    """

    tokens: KeyValueCache
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor


class Seq2SeqLM(GenerativeLM):
    """A language model that answers a source, `token_ids`, with a target, `decoder_token_ids`.

    Beside what `LanguageModel` and `GenerativeLM` ask for, a subclass has `encode`. Its config has `start_token_id`,
    what the decoder reads first.

    Shapes:
        inputs: a dict with `token_ids` [B, T], `decoder_token_ids` [B, U] int32 and optionally `padding_mask` [B, T]
        bool, `segment_ids` [B, T] and `decoder_segment_ids` [B, U] int32 of packed rows, where attention in and between
        both stays in a document; returns logits [B, U, V] float32. In training and evaluation `decoder_token_ids` may
        be missing: they are the labels, moved one place on behind `start_token_id`. Packed rows need them.
    """

    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig, *, output_head: bool = True, **kwargs: Any) -> None:
        if not output_head:
            raise ValueError(f"output_head is False, but a {type(self).__name__} is no encoder alone: leave it True.")
        super().__init__(config, **kwargs)

    @classmethod
    def pretraining_objectives(cls, config: Any) -> tuple[str, ...]:
        """What is missing from a text is written, or a text, from its middle on or from its beginning."""
        return ("span", "prefix", "ul2", "decoder")

    @abstractmethod
    def encode(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Final hidden states [B, T, D] of the encoder, for token ids [B, T] or a dict of the source."""

    def target_bias(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What is added to scores where the decoder attends to itself, [1 or B, 1, U, U], and to the source, or None.

        Raises:
            ValueError: there is no target, or one of source and target is packed and the other is not.
        """
        if not isinstance(inputs, Mapping) or "decoder_token_ids" not in inputs:
            given = ", ".join(sorted(inputs)) if isinstance(inputs, Mapping) else "one tensor"
            raise ValueError(f"inputs are {given}, but must be a dict with token_ids and decoder_token_ids.")
        segment_ids, source_ids = inputs.get("decoder_segment_ids"), inputs.get("segment_ids")
        if (segment_ids is None) != (source_ids is None):
            raise ValueError("packed rows need both segment_ids and decoder_segment_ids, but one of them is missing.")
        slots = ops.arange(ops.shape(inputs["decoder_token_ids"])[1], dtype="int32")
        own = attention_bias(slots, slots, dtype=self.compute_dtype, causal=True, segment_ids=segment_ids)
        return own, self.source_bias(inputs, slots, segment_ids)

    def source_bias(self, inputs: Any, slots: Tensor, segment_ids: Tensor | None = None) -> Tensor | None:
        """What is added to the scores of attention from `slots` to the source: padding is hidden, and other documents.

        Args:
            inputs: of the encoder.
            slots: [U] places of those that attend.
            segment_ids: [B, U] of those that attend, if rows are packed.
        """
        batch = inputs if isinstance(inputs, Mapping) else {"token_ids": inputs}
        return attention_bias(
            slots,
            ops.arange(ops.shape(batch["token_ids"])[1], dtype="int32"),
            dtype=self.compute_dtype,
            causal=False,
            key_mask=batch.get("padding_mask"),
            segment_ids=segment_ids,
            key_segment_ids=batch.get("segment_ids"),
        )

    # -- Training.

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of the cross-entropy of labels [B, U]; see `ReplicatedModel.compute_sums`."""
        if labels is None:
            raise ValueError("there are no labels [B, U], the tokens of the targets: give (inputs, labels, weights).")
        batch = dict(inputs) if isinstance(inputs, Mapping) else {"token_ids": inputs}
        if "decoder_token_ids" not in batch:
            if "segment_ids" in batch:
                raise ValueError("packed rows have a start in each document: give decoder_token_ids.")
            start = ops.full_like(labels[:, :1], self.config.start_token_id)
            batch["decoder_token_ids"] = ops.concatenate([start, ops.maximum(labels[:, :-1], 0)], axis=1)
        return self._token_sums(self.features(batch, training=training), labels, weights, training)

    # -- Decoding.

    def pad_sources(self, token_ids: Prompts) -> dict[str, np.ndarray]:
        """Sources of any form as inputs of the encoder, padded on the right; the end token stands for an empty one."""
        rows = self._text_rows(token_ids)
        lengths = np.array([len(row) for row in rows], np.int32)
        width = -(-int(lengths.max(initial=1)) // TEXT_MULTIPLE) * TEXT_MULTIPLE
        return {"token_ids": pad_rows(rows, width), "padding_mask": np.arange(width) < lengths[:, None]}

    def start_tokens(self, rows: Any) -> tuple[Tensor, Tensor]:
        """What is decoded from: prompts [B, 1] of the start token, and their lengths [B]."""
        return tf.fill([rows, 1], self.config.start_token_id), tf.fill([rows], 1)

    def reorder_cache(self, cache: Seq2SeqCache, rows: Tensor) -> Seq2SeqCache:
        """The cache with the target of its row `rows[i]` in row i; the sources stay where they are."""
        return cache._replace(tokens=cache.tokens.take(rows))

    def _request(self, token_ids: Prompts, max_new_tokens: int) -> tuple[Tensor, Tensor, Any]:
        source = self.pad_sources(token_ids)
        prompts, lengths = self.start_tokens(len(source["token_ids"]))
        return prompts, lengths, {name: tf.constant(each) for name, each in source.items()}
