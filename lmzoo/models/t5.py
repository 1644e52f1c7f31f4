"""T5: an encoder and a decoder with relative positions and root-mean-square norms; mT5 by another name.

Reference:
    Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section
    2.1, and the released code; Shazeer 2020, "GLU Variants Improve Transformer" (T5 1.1); Xue et al. 2021, "mT5";
    Xue et al. 2022, "ByT5".
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import keras
import numpy as np
from keras import ops

from lmzoo import checkpoints
from lmzoo.layers import (
    CrossAttention,
    FeedForward,
    KeyValueCache,
    RelativePositionBias,
    SelfAttention,
    SideBySideNormal,
    TokenEmbedding,
    attention_bias,
)
from lmzoo.models.seq2seq import Seq2SeqCache, Seq2SeqConfig, Seq2SeqLM

Tensor = Any

# feed_forward_proj in config.json -> (activation, gated); the first name of each is the one that is written.
_FEEDFORWARDS = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-gelu_new": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
    "gelu": ("gelu", False),
    "gelu_new": ("gelu_tanh", False),
}
_BASE = {"num_heads": 12, "model_dim": 768, "feedforward_dim": 3072, "num_layers": 12}
_LARGE = {"num_heads": 16, "model_dim": 1024, "feedforward_dim": 4096, "num_layers": 24}
_1_1 = {"activation": "gelu_tanh", "gated": True, "tied_head": False, "scaled_head": False}
# The shapes of T5 1.1, which flan-T5 and (with another vocabulary) mT5 share.
_SHAPES_1_1 = {
    "small": {"num_heads": 6, "feedforward_dim": 1024, "num_layers": 8},
    "base": {**_BASE, "feedforward_dim": 2048},
    "large": {**_LARGE, "feedforward_dim": 2816},
    "xl": {"num_heads": 32, "model_dim": 2048, "feedforward_dim": 5120, "num_layers": 24},
    "xxl": {"num_heads": 64, "model_dim": 4096, "feedforward_dim": 10_240, "num_layers": 24},
}
_BYTE_SHAPES = {
    "small": {"num_heads": 6, "model_dim": 1472, "feedforward_dim": 3584, "num_layers": 12, "num_decoder_layers": 4},
    "base": {"num_heads": 12, "model_dim": 1536, "feedforward_dim": 3968, "num_layers": 18, "num_decoder_layers": 6},
    "large": {"num_heads": 16, "model_dim": 1536, "feedforward_dim": 3840, "num_layers": 36, "num_decoder_layers": 12},
    "xl": {"num_heads": 32, "model_dim": 2560, "feedforward_dim": 6720, "num_layers": 36, "num_decoder_layers": 12},
    "xxl": {"num_heads": 64, "model_dim": 4672, "feedforward_dim": 12_352, "num_layers": 36, "num_decoder_layers": 12},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(Seq2SeqConfig):
    """Shape of a T5: that of `Seq2SeqConfig`, and this.

    Args:
        num_buckets: of relative positions, an even number.
        max_distance: from which on all distances share a bucket; more than half of the buckets.
        tied_head: whether the output head is the token embedding.
        scaled_head: whether hidden states are scaled by D ** -0.5 before the output head.
    """

    model_type: ClassVar[str] = "t5"

    vocab_size: int = 32_128
    context_length: int = 512
    eos_token_id: int | None = 1
    pad_token_id: int | None = 0
    num_buckets: int = 32
    max_distance: int = 128
    tied_head: bool = True
    scaled_head: bool = True

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "t5-small": {},
        "t5-base": _BASE,
        "t5-large": _LARGE,
        "t5-3b": {**_LARGE, "num_heads": 32, "head_dim": 128, "feedforward_dim": 16_384},
        "t5-11b": {**_LARGE, "num_heads": 128, "head_dim": 128, "feedforward_dim": 65_536},
        **{f"t5-v1.1-{size}": {**_1_1, **shape} for size, shape in _SHAPES_1_1.items()},
        **{f"flan-t5-{size}": {**_1_1, **shape} for size, shape in _SHAPES_1_1.items()},
        **{f"byt5-{size}": {**_1_1, "vocab_size": 384, **shape} for size, shape in _BYTE_SHAPES.items()},
    }

    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "pad_token_id",
        "num_layers": "num_layers",
        "num_decoder_layers": "num_decoder_layers",
        "num_heads": "num_heads",
        "head_dim": "d_kv",
        "model_dim": "d_model",
        "feedforward_dim": "d_ff",
        "num_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "dropout_rate": "dropout_rate",
        "norm_epsilon": "layer_norm_epsilon",
        "tied_head": "tie_word_embeddings",
        "scaled_head": "scale_decoder_outputs",
        "start_token_id": "decoder_start_token_id",
    }
    """Field -> its name in config.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("num_buckets")
        name = type(self).__name__
        if self.num_buckets % 2 or self.num_buckets < 4:
            raise ValueError(f"{name}.num_buckets is {self.num_buckets}, but must be an even number of 4 or more.")
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"{name}.max_distance is {self.max_distance}, but must be more than half of num_buckets, which is "
                f"{self.num_buckets}."
            )
        if (self.activation, self.gated) not in _FEEDFORWARDS.values():
            known = sorted({activation for activation, gated in _FEEDFORWARDS.values() if gated == self.gated})
            raise ValueError(
                f"{name}.activation is {self.activation!r}, but with gated={self.gated} must be one of "
                f"{', '.join(known)}."
            )

    def count_params(self) -> int:
        """Number of parameters; a tied output head counts once."""
        tables = self.vocab_size * self.model_dim * (1 if self.tied_head else 2)
        norms = (2 * self.num_layers + 3 * self.decoder_layers + 2) * self.model_dim
        positions = 2 * self.num_buckets * self.num_heads
        return tables + norms + positions + sum(self.count_multiplied())

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Self:
        """The config of a checkpoint's config.json.

        Raises:
            ValueError: its feed-forward network is unknown, or a field breaks its rule.
        """
        fields = {field: values[name] for field, name in cls.HUGGING_FACE_NAMES.items() if name in values}
        kind = values.get("feed_forward_proj", "relu")
        if kind not in _FEEDFORWARDS:
            known = ", ".join(_FEEDFORWARDS)
            raise ValueError(f"feed_forward_proj is {kind!r}, but {cls.__name__} has only {known}.")
        fields["activation"], fields["gated"] = _FEEDFORWARDS[kind]
        # Files written before transformers 5 do not say: there, a head is scaled if it is tied.
        fields.setdefault("scaled_head", fields.get("tied_head", True))
        if fields.get("num_decoder_layers") == fields.get("num_layers"):
            fields["num_decoder_layers"] = None
        if fields.get("start_token_id") is None:
            fields["start_token_id"] = values.get("pad_token_id") or 0
        return cls(**fields)

    def to_hugging_face(self) -> dict[str, Any]:
        """Content of config.json, as `transformers` reads it."""
        kinds = {value: kind for kind, value in reversed(_FEEDFORWARDS.items())}
        return {
            "model_type": self.model_type,
            **{name: getattr(self, field) for field, name in self.HUGGING_FACE_NAMES.items()},
            "num_decoder_layers": self.decoder_layers,
            "feed_forward_proj": kinds[self.activation, self.gated],
            "is_encoder_decoder": True,
            "architectures": [f"{self.model_type.replace('t5', 'T5').replace('mT5', 'MT5')}ForConditionalGeneration"],
        }


class T5Block(keras.layers.Layer):
    """One block: x + attention(norm(x)), in a decoder x + cross_attention(norm(x)), then x + feedforward(norm(x)).

    x stays in float32 whatever the compute dtype, and so do norms and, in float16, the last projection: the numbers of
    trained T5s outgrow float16 there.

    Shapes:
        inputs [B, T, D] float32, bias [1 or B, N, T, S]; memory [B, M, D] or its keys and values [B, N, M, H], with
        memory_bias broadcastable to [B, N, T, M]; returns [B, T, D] float32.

    Args:
        num_heads: N.
        head_dim: H.
        feedforward_dim: F.
        activation, gated: as in `FeedForward`.
        dropout_rate: of attention weights, inside the feed-forward network, and of all outputs.
        norm_epsilon: added to the mean square in the norms.
        reads_memory: whether there is cross-attention.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        head_dim: int,
        model_dim: int,
        feedforward_dim: int,
        activation: str,
        gated: bool,
        dropout_rate: float,
        norm_epsilon: float,
        reads_memory: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.arguments = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "model_dim": model_dim,
            "feedforward_dim": feedforward_dim,
            "activation": activation,
            "gated": gated,
            "dropout_rate": dropout_rate,
            "norm_epsilon": norm_epsilon,
            "reads_memory": reads_memory,
        }
        policy = self.dtype_policy
        query, width = (model_dim * head_dim) ** -0.5, model_dim**-0.5
        more = {"scale": 1.0, "use_bias": False, "dropout_rate": dropout_rate, "dtype": policy}
        self.attention_norm = _norm(norm_epsilon, policy, "attention_norm")
        self.attention = SelfAttention(
            num_heads,
            head_dim=head_dim,
            kernel_initializer=SideBySideNormal((query, width, width)),
            output_initializer=_normal((num_heads * head_dim) ** -0.5),
            name="attention",
            **more,
        )
        self.cross_norm: Any = None
        self.cross_attention: Any = None
        if reads_memory:
            self.cross_norm = _norm(norm_epsilon, policy, "cross_norm")
            self.cross_attention = CrossAttention(
                num_heads,
                head_dim,
                query_initializer=_normal(query),
                kernel_initializer=_normal(width),
                output_initializer=_normal((num_heads * head_dim) ** -0.5),
                name="cross_attention",
                **more,
            )
        self.feedforward_norm = _norm(norm_epsilon, policy, "feedforward_norm")
        self.feedforward = FeedForward(
            feedforward_dim,
            activation=activation,
            gated=gated,
            use_bias=False,
            dropout_rate=dropout_rate,
            output_dtype="float32" if self.compute_dtype == "float16" else None,
            kernel_initializer=_normal(width),
            output_initializer=_normal(feedforward_dim**-0.5),
            dtype=policy,
            name="feedforward",
        )
        self.dropout = keras.layers.Dropout(dropout_rate, dtype="float32")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for inputs [B, T, D]."""
        crossing = () if self.cross_attention is None else (self.cross_norm, self.cross_attention)
        for layer in (self.attention_norm, self.attention, *crossing, self.feedforward_norm, self.feedforward):
            layer.build(input_shape)

    def call(
        self,
        inputs: Tensor,
        bias: Tensor,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        memory_bias: Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        training: bool | None = None,
    ) -> tuple[Tensor, KeyValueCache | None]:
        """Returns the outputs and the cache, which is None if it was."""
        attended = self.attention(
            self._normed(self.attention_norm, inputs), bias, cache=cache, layer=layer, training=training
        )
        if cache is not None:
            attended, cache = attended
        hidden = self._add(inputs, attended, training)
        if self.cross_attention is not None:
            key, value = memory if isinstance(memory, tuple) else self.cross_attention.keys_and_values(memory)
            normed = self._normed(self.cross_norm, hidden)
            hidden = self._add(
                hidden, self.cross_attention(normed, key, value, memory_bias, training=training), training
            )
        outputs = self.feedforward(self._normed(self.feedforward_norm, hidden), training=training)
        return self._add(hidden, outputs, training), cache

    def _normed(self, norm: Any, hidden: Tensor) -> Tensor:
        return ops.cast(norm(hidden), self.compute_dtype)

    def _add(self, hidden: Tensor, outputs: Tensor, training: bool | None) -> Tensor:
        return hidden + self.dropout(ops.cast(outputs, "float32"), training=training)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), **self.arguments}


def _norm(epsilon: float, policy: Any, name: str) -> keras.layers.Layer:
    """Computes in float32, as its inputs are, whatever type its weight is stored in."""
    return keras.layers.RMSNormalization(epsilon=epsilon, dtype=policy, autocast=False, name=name)


def _normal(stddev: float) -> keras.initializers.Initializer:
    return keras.initializers.RandomNormal(stddev=stddev)


@keras.saving.register_keras_serializable("lmzoo")
class T5Model(Seq2SeqLM):
    """T5, from the tokens of a source and those of a target so far to the scores of the target's next tokens.

    Example:
        model = T5Model.from_preset("t5-small")
        model.compile()
        model.fit(dataset)
        logits = model({"token_ids": source, "padding_mask": source != 0, "decoder_token_ids": target})
        model.generate(source_ids, max_new_tokens=32, num_beams=4)

    Inputs and outputs are those of `Seq2SeqLM`. Sequences may be of any length: positions are relative.

    Args:
        config: shape of the model.
        dtype: a Keras dtype or policy.
    """

    config_class: ClassVar[type[T5Config]] = T5Config
    config: T5Config
    tokenizer_kind = "unigram"
    checkpoint_transposed = True
    checkpoint_tied: ClassVar[Mapping[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    }
    # A table that the first checkpoints carry for cross-attention, which has no positions.
    checkpoint_ignored = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"

    def __init__(self, config: T5Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        policy, width = self.dtype_policy, config.model_dim
        self.token_embedding = TokenEmbedding(
            config.vocab_size, width, embeddings_initializer=_normal(1.0), dtype=policy, name="token_embedding"
        )
        arguments = {
            "num_heads": config.num_heads,
            "head_dim": config.head_dim,
            "model_dim": width,
            "feedforward_dim": config.feedforward_dim,
            "activation": config.activation,
            "gated": config.gated,
            "dropout_rate": config.dropout_rate,
            "norm_epsilon": config.norm_epsilon,
            "dtype": policy,
        }
        numbers = {"encoder": config.num_layers, "decoder": config.decoder_layers}
        self.encoder_blocks, self.decoder_blocks = (
            [
                T5Block(reads_memory=stack == "decoder", name=f"{stack}_block_{number}", **arguments)
                for number in range(count)
            ]
            for stack, count in numbers.items()
        )
        self.encoder_positions, self.decoder_positions = (
            RelativePositionBias(
                config.num_heads,
                num_buckets=config.num_buckets,
                max_distance=config.max_distance,
                causal=stack == "decoder",
                embeddings_initializer=_normal(width**-0.5),
                dtype=policy,
                name=f"{stack}_positions",
            )
            for stack in numbers
        )
        self.encoder_norm, self.decoder_norm = (
            _norm(config.norm_epsilon, policy, name) for name in ("encoder_norm", "decoder_norm")
        )
        self.dropout = keras.layers.Dropout(config.dropout_rate, dtype="float32")
        self.build((None, None))

    def build(self, input_shape: Any) -> None:
        """Creates all weights; token ids of any shape will do."""
        shape = (None, None, self.config.model_dim)
        stacks = (*self.encoder_blocks, *self.decoder_blocks, self.encoder_norm, self.decoder_norm)
        for layer in (self.token_embedding, self.encoder_positions, self.decoder_positions, *stacks):
            layer.build(shape)
        self.head_table = None
        if not self.config.tied_head:
            self.head_table = self.add_weight(
                name="head_table",
                shape=(self.config.vocab_size, self.config.model_dim),
                initializer=_normal(1.0),
                autocast=False,
            )

    # -- The forward pass.

    def features(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Final hidden states [B, U, D] of the decoder, as the output head multiplies with them."""
        own_bias, memory_bias = self.target_bias(inputs)
        memory = self.encode(inputs, training=training)
        token_ids = inputs["decoder_token_ids"]
        slots = ops.arange(ops.shape(token_ids)[1], dtype="int32")
        bias = self.decoder_positions(slots, slots) + own_bias
        hidden = self.dropout(self._embed(token_ids), training=training)
        for block in self.decoder_blocks:
            hidden, _ = self.run_block(block, hidden, bias, memory, memory_bias, training=training)
        return self._decoded(hidden, training)

    def encode(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Final hidden states [B, T, D] of the encoder, for token ids [B, T] or a dict of the source."""
        batch = inputs if isinstance(inputs, Mapping) else {"token_ids": inputs}
        token_ids = batch["token_ids"]
        slots = ops.arange(ops.shape(token_ids)[1], dtype="int32")
        bias = self.encoder_positions(slots, slots)
        source_bias = self.source_bias(batch, slots, batch.get("segment_ids"))
        if source_bias is not None:
            bias = bias + source_bias
        hidden = self.dropout(self._embed(token_ids), training=training)
        for block in self.encoder_blocks:
            hidden, _ = self.run_block(block, hidden, bias, training=training)
        return ops.cast(self.dropout(self.encoder_norm(hidden), training=training), self.compute_dtype)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The table of the output head, the token embedding's own or another one; there is no bias."""
        if self.head_table is None:
            return self.token_embedding.head_table(), None
        return ops.cast(self.head_table, self.compute_dtype), None

    def _embed(self, token_ids: Tensor) -> Tensor:
        return ops.cast(self.token_embedding(token_ids), "float32")

    def _decoded(self, hidden: Tensor, training: bool | None) -> Tensor:
        hidden = self.dropout(self.decoder_norm(hidden), training=training)
        if self.config.scaled_head:
            hidden = hidden * self.config.model_dim**-0.5
        return ops.cast(hidden, self.compute_dtype)

    # -- Decoding.

    def init_cache(self, rows: Any, cache_length: Any) -> Seq2SeqCache:
        """Reads the source `rows`, and makes the memory to decode at most `cache_length` tokens with."""
        memory = self.encode(rows, training=False)
        pairs = [block.cross_attention.keys_and_values(memory) for block in self.decoder_blocks]
        config, (num_rows, length) = self.config, ops.shape(memory)[:2]
        tokens = KeyValueCache.empty(
            num_rows, config.decoder_layers, config.num_heads, cache_length, config.head_dim, self.compute_dtype
        )
        keys, values = (tuple(each) for each in zip(*pairs, strict=True))
        bias = self.source_bias(rows, ops.arange(1, dtype="int32"))
        if bias is None:
            bias = ops.zeros((num_rows, 1, 1, length), self.compute_dtype)
        return Seq2SeqCache(tokens, keys, values, bias)

    def decode_step(
        self, token_ids: Tensor, cache: Seq2SeqCache, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Seq2SeqCache]:
        """Reads T more tokens of the target in each row and scores the next one.

        Shapes:
            token_ids [k B, T]; padding_mask [k B, T] bool, False where a row has ended: one that goes on has no
            padding; returns logits [k B, V] float32 after the last token, and the cache.
        """
        num_tokens = ops.shape(token_ids)[1]
        mask = ops.ones_like(token_ids, dtype="bool") if padding_mask is None else padding_mask
        tokens = cache.tokens.reserve(mask)
        slots = ops.arange(num_tokens, dtype="int32") + tokens.next_slot
        bias = self.decoder_positions(slots, tokens.slots) + attention_bias(
            slots, tokens.slots, dtype=self.compute_dtype, causal=True, key_mask=tokens.mask
        )
        hidden = self._embed(token_ids)
        for layer, block in enumerate(self.decoder_blocks):
            memory = cache.keys[layer], cache.values[layer]
            hidden, tokens = block(hidden, bias, memory, cache.bias, cache=tokens, layer=layer, training=False)
        logits = self.logits(self._decoded(hidden[:, -1], training=False))
        return logits, cache._replace(tokens=tokens.advance(num_tokens))

    # -- Checkpoints.

    @classmethod
    def read_config(cls, directory: str | os.PathLike[str]) -> Any:
        """The config of a checkpoint. Its tensors say whether the head is tied, since transformers 5 does not."""
        config = super().read_config(directory)
        files = checkpoints.read_tensors(directory)
        if "lm_head.weight" not in files:
            return config.replace(tied_head=True)
        if config.tied_head and "shared.weight" in files:
            return config.replace(tied_head=np.array_equal(files["lm_head.weight"](), files["shared.weight"]()))
        return config

    def checkpoint_variables(self) -> dict[str, keras.Variable]:
        """Names as Hugging Face has them; projections of one input are one variable here and several tensors there."""
        names = {"shared.weight": self.token_embedding.embeddings}
        gates = "{wi_0,wi_1}" if self.config.gated else "wi"
        stacks = {
            "encoder": (self.encoder_blocks, self.encoder_positions, self.encoder_norm),
            "decoder": (self.decoder_blocks, self.decoder_positions, self.decoder_norm),
        }
        for stack, (blocks, positions, norm) in stacks.items():
            for number, block in enumerate(blocks):
                parts = [
                    (block.attention_norm, {"SelfAttention.{q,k,v}": block.attention.qkv}),
                    (block.feedforward_norm, {f"DenseReluDense.{gates}": block.feedforward.up}),
                ]
                parts[0][1]["SelfAttention.o"] = block.attention.output_projection
                parts[1][1]["DenseReluDense.wo"] = block.feedforward.down
                if block.cross_attention is not None:
                    cross = block.cross_attention
                    projections = {"q": cross.query, "{k,v}": cross.key_value, "o": cross.output_projection}
                    parts.insert(
                        1, (block.cross_norm, {f"EncDecAttention.{name}": each for name, each in projections.items()})
                    )
                for place, (part_norm, layers) in enumerate(parts):
                    prefix = f"{stack}.block.{number}.layer.{place}"
                    names |= {f"{prefix}.{name}.weight": layer.kernel for name, layer in layers.items()}
                    names[f"{prefix}.layer_norm.weight"] = part_norm.scale
            table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            names[table] = positions.embeddings
            names[f"{stack}.final_layer_norm.weight"] = norm.scale
        if self.head_table is not None:
            names["lm_head.weight"] = self.head_table
        return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class MT5Config(T5Config):
    """Shape of an mT5: a T5 1.1 with a vocabulary of a hundred languages."""

    model_type: ClassVar[str] = "mt5"

    vocab_size: int = 250_112
    activation: str = "gelu_tanh"
    gated: bool = True
    tied_head: bool = False
    scaled_head: bool = False

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {f"mt5-{size}": shape for size, shape in _SHAPES_1_1.items()}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaled_head:
            raise ValueError(f"{type(self).__name__}.scaled_head is True, but must be False: an mT5 scales nothing.")

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Self:
        """As the base class, whatever a file says of scaling."""
        return super().from_hugging_face({**values, "scale_decoder_outputs": False})


@keras.saving.register_keras_serializable("lmzoo")
class MT5Model(T5Model):
    """mT5: `T5Model` with the shapes of `MT5Config`."""

    config_class = MT5Config
