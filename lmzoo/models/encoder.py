"""What the encoders share: embeddings, and blocks of post-normalisation that see a document in both directions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from lmzoo.config import ActivationBytes
from lmzoo.layers import FeedForward, LearnedPositions, SelfAttention, TokenEmbedding, attention_bias
from lmzoo.layers.positions import token_positions
from lmzoo.models.base import LanguageModel, weight_and_bias
from lmzoo.models.transformer import TransformerConfig

Tensor = Any

# Share of the tokens that masked-LM training hides, and so sends through the head.
_MASKED_SHARE = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(TransformerConfig):
    """Shape of an encoder: that of `TransformerConfig`, and these.

    Args:
        num_token_types: rows of the table of token types; with one, every token is of the same type.
        pooler: whether there are a pooler and, on top of it, a head for sentence labels.
    """

    vocab_size: int = 30_522
    context_length: int = 512
    pad_token_id: int | None = 0
    norm_epsilon: float = 1e-12
    num_token_types: int = 2
    pooler: bool = True

    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        **TransformerConfig.HUGGING_FACE_NAMES,
        "context_length": "max_position_embeddings",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "model_dim": "hidden_size",
        "feedforward_dim": "intermediate_size",
        "num_token_types": "type_vocab_size",
        "dropout_rate": "hidden_dropout_prob",
        "norm_epsilon": "layer_norm_eps",
        "activation": "hidden_act",
        "pooler": "add_pooling_layer",
    }
    HUGGING_FACE_DROPOUT_RATES = ("attention_probs_dropout_prob",)
    HUGGING_FACE_FIXED: ClassVar[Mapping[str, Any]] = {
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "is_decoder": False,
        "add_cross_attention": False,
    }
    # The classes of transformers for models without and with a pooler.
    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_kind()

    def _check_kind(self) -> None:
        """What sets one kind of encoder apart from another, so that a checkpoint of the kind can hold the model."""
        self._require_positive("num_token_types")
        if not isinstance(self.pooler, bool):
            self._refuse("pooler", "must be True or False")

    @property
    def embedding_dim(self) -> int:
        """E, the width of the tables of embeddings, one of which the masked-LM head reads too."""
        return self.model_dim

    @property
    def projects(self) -> bool:
        """Whether a layer takes the embeddings from E to D."""
        return self.embedding_dim != self.model_dim

    @property
    def num_blocks(self) -> int:
        """Number of blocks with weights of their own; they take turns if they are fewer than `num_layers`."""
        return self.num_layers

    @property
    def head_activation(self) -> str:
        """Activation inside the masked-LM head."""
        return self.activation

    def count_params(self) -> int:
        """Number of parameters as published: embeddings, blocks and pooler. `head_params` come on top."""
        width, narrow = self.model_dim, self.embedding_dim
        rows = self.vocab_size + self.position_offset + self.context_length + self.num_token_types
        projection = narrow * width + width if self.projects else 0
        pooler = width * width + width if self.pooler else 0
        return rows * narrow + 2 * narrow + projection + self.num_blocks * self.count_block_params() + pooler

    @property
    def head_params(self) -> int:
        """Parameters of the masked-LM head, whose table is the embeddings', and of the head for sentence labels."""
        width, narrow = self.model_dim, self.embedding_dim
        masked_lm = width * narrow + narrow + 2 * narrow + self.vocab_size
        return masked_lm + (2 * width + 2 if self.pooler else 0)

    def training_flops_per_token(self, seq_length: int) -> float:
        """6 for each weight that multiplies a token, and 12 L D T for attention.

        Assumes masked-LM training on batches with `mask_positions`, which send 15% of the tokens through the head. The
        pooler sees one token a row, and is left out.
        """
        head = self.embedding_dim * (self.model_dim + self.vocab_size)
        projection = self.embedding_dim * self.model_dim if self.projects else 0
        multiplied = self.num_layers * self.count_block_params() + projection + _MASKED_SHARE * head
        return 6.0 * multiplied + 12.0 * self.num_layers * self.model_dim * seq_length

    def count_head_tokens(self, rows: int, seq_length: int) -> int:
        """Number of tokens that a batch with `mask_positions` sends through the output head: 15% of each row."""
        return rows * math.ceil(_MASKED_SHARE * seq_length)

    def activation_bytes(self, rows: int, seq_length: int, compute_bytes: int) -> ActivationBytes:
        """As that of `TransformerConfig`; the loss reads what the masked-LM head has made E wide."""
        needed = super().activation_bytes(rows, seq_length, compute_bytes)
        return dataclasses.replace(needed, head_dim=self.embedding_dim)

    def to_hugging_face(self) -> dict[str, Any]:
        """Content of config.json, as `transformers` reads it."""
        return {
            **super().to_hugging_face(),
            self.HUGGING_FACE_NAMES["feedforward_dim"]: self.inner_dim,
            "architectures": [self.HUGGING_FACE_CLASSES[self.pooler]],
        }


class EncoderBlock(keras.layers.Layer):
    """One block: norm(x + attention(x)), then norm(x + feedforward(x)).

    Shapes:
        inputs [B, T, D], bias broadcastable to [B, N, T, T]; returns [B, T, D].

    Args:
        num_heads: N.
        feedforward_dim: F.
        dropout_rate: of attention weights and of both outputs.
        norm_epsilon: added to the variance in layer normalisation.
        activation: as in `FeedForward`.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        feedforward_dim: int,
        dropout_rate: float,
        norm_epsilon: float,
        activation: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.arguments = {
            "num_heads": num_heads,
            "feedforward_dim": feedforward_dim,
            "dropout_rate": dropout_rate,
            "norm_epsilon": norm_epsilon,
            "activation": activation,
        }
        initial = functools.partial(initializers, self.dtype_policy, "kernel_initializer", "output_initializer")
        norm = {"epsilon": norm_epsilon, "dtype": self.dtype_policy}
        self.attention = SelfAttention(num_heads, dropout_rate=dropout_rate, **initial(), name="attention")
        self.attention_norm = keras.layers.LayerNormalization(**norm, name="attention_norm")
        self.feedforward = FeedForward(feedforward_dim, activation=activation, **initial(), name="feedforward")
        self.feedforward_norm = keras.layers.LayerNormalization(**norm, name="feedforward_norm")
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for inputs [B, T, D]."""
        for layer in (self.attention, self.attention_norm, self.feedforward, self.feedforward_norm):
            layer.build(input_shape)

    def call(self, inputs: Tensor, bias: Tensor | None = None, training: bool | None = None) -> Tensor:
        """Attends, then transforms each token."""
        attended = self.attention(inputs, bias, training=training)
        hidden = self.attention_norm(inputs + self.dropout(attended, training=training))
        outputs = self.feedforward(hidden)
        return self.feedforward_norm(hidden + self.dropout(outputs, training=training))

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), **self.arguments}


def initializers(policy: Any, *names: str) -> dict[str, Any]:
    """Arguments of a layer; an initializer for each weight, since one gives the same numbers whenever it is used."""
    return {"dtype": policy, **{name: keras.initializers.TruncatedNormal(stddev=0.02) for name in names}}


class EncoderModel(LanguageModel):
    """Embeddings and blocks; a subclass adds its heads, builds itself, and names its weights by class variables.

        checkpoint_blocks: of the list of blocks; "{}" is replaced by the number of one.
        checkpoint_block_parts: of the parts of a block.
        checkpoint_projection: of what takes embeddings to the width of the blocks.

    Shapes:
        inputs: token ids [B, T] int32, or a dict with `token_ids` and optionally `padding_mask`, `segment_ids`,
        `positions`, and `token_type_ids` (0 without; models with one type or none do not look).

    Args:
        config: shape of the model.
        embeddings_of: an encoder whose embeddings are to be this one's too, norm included; None makes new ones.
    """

    config_class: ClassVar[type[EncoderConfig]]
    config: EncoderConfig
    token_embedding: TokenEmbedding
    position_embedding: LearnedPositions
    token_type_embedding: TokenEmbedding | None
    embedding_norm: keras.layers.LayerNormalization
    checkpoint_transposed = True
    checkpoint_blocks: ClassVar[str] = "encoder.layer.{}"
    checkpoint_block_parts: ClassVar[Sequence[str]] = (
        "attention.self.{query,key,value}",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    checkpoint_projection: ClassVar[str] = "embeddings_project"

    def __init__(self, config: EncoderConfig, *, embeddings_of: EncoderModel | None = None, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        policy = self.dtype_policy
        source = embeddings_of or self
        if source is self:
            self._make_embeddings()
        self.token_embedding, self.position_embedding = source.token_embedding, source.position_embedding
        self.token_type_embedding, self.embedding_norm = source.token_type_embedding, source.embedding_norm
        self.embedding_dropout = keras.layers.Dropout(config.dropout_rate, dtype=policy)
        self.embedding_projection = None
        if config.projects:
            self.embedding_projection = keras.layers.Dense(
                config.model_dim, **initializers(policy, "kernel_initializer"), name="embedding_projection"
            )
        self.blocks = [
            EncoderBlock(
                num_heads=config.num_heads,
                feedforward_dim=config.inner_dim,
                dropout_rate=config.dropout_rate,
                norm_epsilon=config.norm_epsilon,
                activation=config.activation,
                dtype=policy,
                name=f"block_{number}",
            )
            for number in range(config.num_blocks)
        ]

    def _make_embeddings(self) -> None:
        config, policy = self.config, self.dtype_policy
        table = functools.partial(initializers, policy, "embeddings_initializer")
        width = config.embedding_dim
        self.token_embedding = TokenEmbedding(config.vocab_size, width, **table(), name="token_embedding")
        self.position_embedding = LearnedPositions(
            config.position_offset + config.context_length, width, **table(), name="position_embedding"
        )
        self.token_type_embedding = None
        if config.num_token_types:
            self.token_type_embedding = TokenEmbedding(
                config.num_token_types, width, **table(), name="token_type_embedding"
            )
        self.embedding_norm = keras.layers.LayerNormalization(
            epsilon=config.norm_epsilon, dtype=policy, name="embedding_norm"
        )

    def build(self, input_shape: Any) -> None:
        """Creates all weights; token ids of any shape will do."""
        narrow, wide = ((None, None, width) for width in (self.config.embedding_dim, self.config.model_dim))
        tables = (self.token_embedding, self.position_embedding, self.token_type_embedding)
        for layer in (*tables, self.embedding_norm, self.embedding_projection):
            if layer is not None and not layer.built:  # Those of another encoder are.
                layer.build(narrow)
        for block in self.blocks:
            block.build(wide)

    @classmethod
    def pretraining_objectives(cls, config: Any) -> tuple[str, ...]:
        """To guess hidden tokens."""
        return ("mlm",)

    def features(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Final hidden states [B, T, D], before any head."""
        return self.hidden_states(inputs, training=training)[-1]

    def hidden_states(self, inputs: Any, training: bool | None = None) -> list[Tensor]:
        """Hidden states of all layers, each [B, T, D]: the embeddings, then the outputs of each block."""
        batch = inputs if isinstance(inputs, Mapping) else {"token_ids": inputs}
        token_ids = batch["token_ids"]
        mask, segment_ids, positions = (batch.get(name) for name in ("padding_mask", "segment_ids", "positions"))
        slots = ops.arange(ops.shape(token_ids)[1], dtype="int32")
        if positions is None:
            self._check_places(token_ids.shape[1], segment_ids, mask)
            positions = slots if mask is None else token_positions(mask)

        hidden = self.token_embedding(token_ids) + self.position_embedding(positions + self.config.position_offset)
        if self.token_type_embedding is not None:
            types = batch.get("token_type_ids") if self.config.num_token_types > 1 else None
            hidden = hidden + self.token_type_embedding(ops.zeros((), "int32") if types is None else types)
        hidden = self.embedding_dropout(self.embedding_norm(hidden), training=training)
        if self.embedding_projection is not None:
            hidden = self.embedding_projection(hidden)
        bias = attention_bias(
            slots, slots, dtype=self.compute_dtype, causal=False, key_mask=mask, segment_ids=segment_ids
        )
        states = [hidden]
        for number in range(self.config.num_layers):
            block = self.blocks[number % len(self.blocks)]
            states.append(self.run_block(block, states[-1], bias, training=training))
        return states

    def checkpoint_variables(self) -> dict[str, keras.Variable]:
        """Names as Hugging Face has them; queries, keys and values are one variable here and three tensors there."""
        names = {
            "embeddings.word_embeddings.weight": self.token_embedding.embeddings,
            "embeddings.position_embeddings.weight": self.position_embedding.embeddings,
        }
        if self.token_type_embedding is not None:
            names["embeddings.token_type_embeddings.weight"] = self.token_type_embedding.embeddings
        names |= weight_and_bias("embeddings.LayerNorm", self.embedding_norm)
        if self.embedding_projection is not None:
            names |= weight_and_bias(self.checkpoint_projection, self.embedding_projection)
        for number, block in enumerate(self.blocks):
            attention, feedforward = block.attention, block.feedforward
            attending = (attention.qkv, attention.output_projection, block.attention_norm)
            layers = (*attending, feedforward.up, feedforward.down, block.feedforward_norm)
            for part, layer in zip(self.checkpoint_block_parts, layers, strict=True):
                names |= weight_and_bias(f"{self.checkpoint_blocks.format(number)}.{part}", layer)
        return names
