"""GPT-2: a decoder-only transformer with learned positions and pre-normalisation.

Reference:
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3, and the released code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import keras
from keras import ops

from lmzoo.layers import (
    FeedForward,
    KeyValueCache,
    LearnedPositions,
    SelfAttention,
    TokenEmbedding,
    attention_bias,
)
from lmzoo.layers.positions import token_positions
from lmzoo.models.base import token_weights, weight_and_bias
from lmzoo.models.causal import CausalLM
from lmzoo.models.heads import HeadDropout, TaskHeads
from lmzoo.models.transformer import TransformerConfig

Tensor = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig(TransformerConfig):
    """Shape of a GPT."""

    model_type: ClassVar[str] = "gpt2"

    vocab_size: int = 50_257
    context_length: int = 1024
    activation: str = "gelu_tanh"

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gpt2-nano": {
            "vocab_size": 4096,
            "context_length": 256,
            "num_layers": 4,
            "num_heads": 2,
            "model_dim": 96,
            "dropout_rate": 0.0,
            "eos_token_id": 0,
        },
        "gpt2-micro": {
            "vocab_size": 8192,
            "context_length": 512,
            "num_layers": 8,
            "num_heads": 4,
            "model_dim": 256,
            "dropout_rate": 0.0,
            "eos_token_id": 0,
        },
        "gpt2": {"num_layers": 12, "num_heads": 12, "model_dim": 768, "eos_token_id": 50_256},
        "gpt2-medium": {"num_layers": 24, "num_heads": 16, "model_dim": 1024, "eos_token_id": 50_256},
        "gpt2-large": {"num_layers": 36, "num_heads": 20, "model_dim": 1280, "eos_token_id": 50_256},
        "gpt2-xl": {"num_layers": 48, "num_heads": 25, "model_dim": 1600, "eos_token_id": 50_256},
    }

    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        **TransformerConfig.HUGGING_FACE_NAMES,
        "context_length": "n_positions",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "model_dim": "n_embd",
        "feedforward_dim": "n_inner",
        "dropout_rate": "resid_pdrop",
        "norm_epsilon": "layer_norm_epsilon",
        "activation": "activation_function",
    }
    HUGGING_FACE_DROPOUT_RATES = ("embd_pdrop", "attn_pdrop")
    HUGGING_FACE_FIXED: ClassVar[Mapping[str, Any]] = {
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }

    def count_params(self) -> int:
        """Number of parameters; the tied output head counts once."""
        embeddings = (self.vocab_size + self.context_length) * self.model_dim
        return embeddings + self.num_layers * self.count_block_params() + 2 * self.model_dim

    def training_flops_per_token(self, seq_length: int) -> float:
        """6 for each weight that multiplies a token (the table as output head), and 12 L D T for attention."""
        multiplied = self.count_params() - self.context_length * self.model_dim
        return 6.0 * multiplied + 12.0 * self.num_layers * self.model_dim * seq_length

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Self:
        """As the base class; a file that names no end token means GPT-2's own."""
        return super().from_hugging_face({"eos_token_id": 50_256, **values})

    def to_hugging_face(self) -> dict[str, Any]:
        """Content of config.json, as `transformers` reads it."""
        return {
            **super().to_hugging_face(),
            "architectures": ["GPT2LMHeadModel"],
            "bos_token_id": self.eos_token_id,
        }


class GPTBlock(keras.layers.Layer):
    """One block: x + attention(norm(x)), then x + feedforward(norm(x)).

    Shapes:
        inputs [B, T, D], bias broadcastable to [B, N, T, S]; returns [B, T, D].

    Args:
        num_heads: N.
        feedforward_dim: F.
        dropout_rate: of attention weights and of both outputs.
        norm_epsilon: added to the variance in layer normalisation.
        activation: as in `FeedForward`.
        output_stddev: standard deviation of the initial weights of both output projections.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        feedforward_dim: int,
        dropout_rate: float,
        norm_epsilon: float,
        activation: str,
        output_stddev: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.arguments = {
            "num_heads": num_heads,
            "feedforward_dim": feedforward_dim,
            "dropout_rate": dropout_rate,
            "norm_epsilon": norm_epsilon,
            "activation": activation,
            "output_stddev": output_stddev,
        }
        initial = {"kernel_initializer": 0.02, "output_initializer": output_stddev}
        norm = {"epsilon": norm_epsilon, "dtype": self.dtype_policy}
        self.attention_norm = keras.layers.LayerNormalization(**norm, name="attention_norm")
        self.attention = SelfAttention(
            num_heads, dropout_rate=dropout_rate, **_normal(**initial), dtype=self.dtype_policy, name="attention"
        )
        self.feedforward_norm = keras.layers.LayerNormalization(**norm, name="feedforward_norm")
        self.feedforward = FeedForward(
            feedforward_dim, activation=activation, **_normal(**initial), dtype=self.dtype_policy, name="feedforward"
        )
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for inputs [B, T, D]."""
        for layer in (self.attention_norm, self.attention, self.feedforward_norm, self.feedforward):
            layer.build(input_shape)

    def call(
        self,
        inputs: Tensor,
        bias: Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        training: bool | None = None,
    ) -> tuple[Tensor, KeyValueCache | None]:
        """Returns the outputs and the cache, which is None if it was."""
        attended = self.attention(self.attention_norm(inputs), bias, cache=cache, layer=layer, training=training)
        if cache is not None:
            attended, cache = attended
        hidden = inputs + self.dropout(attended, training=training)
        outputs = self.feedforward(self.feedforward_norm(hidden))
        return hidden + self.dropout(outputs, training=training), cache

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {**super().get_config(), **self.arguments}


def _normal(**stddevs: float) -> dict[str, keras.initializers.Initializer]:
    """An initializer for each weight, since one gives the same numbers whenever it is used."""
    return {name: keras.initializers.RandomNormal(stddev=stddev) for name, stddev in stddevs.items()}


@keras.saving.register_keras_serializable("lmzoo")
class GPTModel(CausalLM):
    """GPT-2, from token ids to logits.

    Example:
        model = GPTModel.from_preset("gpt2-nano")
        model.compile()
        model.fit(dataset)
        model.generate([[1, 2, 3]], max_new_tokens=16, temperature=0.8)

    Shapes:
        inputs: token ids [B, T] int32, or a dict with `token_ids` and optionally `padding_mask`, `segment_ids` and
        `positions`; returns logits [B, T, V] float32.

    Args:
        config: shape of the model.
        dtype: a Keras dtype or policy.
    """

    config_class = GPTConfig
    config: GPTConfig
    task_heads = TaskHeads(
        classes="GPT2",
        pools="last",
        output="score",
        use_bias=False,
        dropout=HeadDropout(name=None, rate=0.0),
        token_dropout=HeadDropout(),
    )
    checkpoint_prefix = "transformer."
    checkpoint_tied: ClassVar[Mapping[str, str]] = {"lm_head.weight": "wte.weight"}
    # The causal masks that old checkpoints carry, and heads of fine-tuning tasks.
    checkpoint_ignored = r"h\.\d+\.attn\.(masked_)?bias|(score|classifier|qa_outputs)\..*"

    def __init__(self, config: GPTConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.token_embedding = TokenEmbedding(
            config.vocab_size,
            config.model_dim,
            **_normal(embeddings_initializer=0.02),
            dtype=self.dtype_policy,
            name="token_embedding",
        )
        self.position_embedding = LearnedPositions(
            config.context_length,
            config.model_dim,
            **_normal(embeddings_initializer=0.02),
            dtype=self.dtype_policy,
            name="position_embedding",
        )
        self.embedding_dropout = keras.layers.Dropout(config.dropout_rate, dtype=self.dtype_policy)
        self.blocks = [
            GPTBlock(
                num_heads=config.num_heads,
                feedforward_dim=config.inner_dim,
                dropout_rate=config.dropout_rate,
                norm_epsilon=config.norm_epsilon,
                activation=config.activation,
                output_stddev=0.02 / math.sqrt(2 * config.num_layers),
                dtype=self.dtype_policy,
                name=f"block_{number}",
            )
            for number in range(config.num_layers)
        ]
        self.final_norm = keras.layers.LayerNormalization(
            epsilon=config.norm_epsilon, dtype=self.dtype_policy, name="final_norm"
        )
        self.build((None, None))

    def build(self, input_shape: Any) -> None:
        """Creates all weights; token ids of any shape will do."""
        self.token_embedding.build()
        self.position_embedding.build()
        hidden_shape = (None, None, self.config.model_dim)
        for layer in (*self.blocks, self.final_norm):
            layer.build(hidden_shape)

    def features(
        self, inputs: Any, training: bool | None = None, cache: KeyValueCache | None = None
    ) -> Tensor | tuple[Tensor, KeyValueCache]:
        """Final hidden states [B, T, D]; with a `cache`, read after what it holds, and the cache updated."""
        batch = inputs if isinstance(inputs, Mapping) else {"token_ids": inputs}
        token_ids = batch["token_ids"]
        mask, segment_ids, positions = (batch.get(name) for name in ("padding_mask", "segment_ids", "positions"))
        num_tokens = ops.shape(token_ids)[1]
        if positions is None:
            self._check_places(num_tokens, segment_ids, mask)
        num_before = None
        slots = key_slots = ops.arange(num_tokens, dtype="int32")
        if cache is not None:
            if mask is None:
                mask = ops.ones_like(token_ids, dtype="bool")
            num_before = ops.sum(ops.cast(cache.mask, "int32"), axis=1)
            slots, key_slots = slots + cache.next_slot, cache.slots
            cache = cache.reserve(mask)
        if positions is None:
            positions = slots if mask is None else token_positions(mask, num_before)

        hidden = self.token_embedding(token_ids) + self.position_embedding(positions)
        hidden = self.embedding_dropout(hidden, training=training)
        bias = attention_bias(
            slots,
            key_slots,
            dtype=self.compute_dtype,
            causal=True,
            key_mask=mask if cache is None else cache.mask,
            segment_ids=segment_ids,
        )
        for layer, block in enumerate(self.blocks):
            hidden, cache = self.run_block(block, hidden, bias, cache=cache, layer=layer, training=training)
        hidden = self.final_norm(hidden)
        return hidden if cache is None else (hidden, cache.advance(num_tokens))

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The token embedding's own table: the head is tied and has no bias."""
        return self.token_embedding.head_table(), None

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """As the base class; without labels, each token is the label of the one before it in its document.

        `weights` [B, T] are those of the tokens then, as labels: the first column has no use.
        """
        if labels is None:
            batch = inputs if isinstance(inputs, Mapping) else {"token_ids": inputs}
            labels = batch["token_ids"][:, 1:]
            weights = token_weights(weights, batch["token_ids"])[:, 1:]
            mask, segment_ids = batch.get("padding_mask"), batch.get("segment_ids")
            if mask is not None:
                both = ops.logical_and(mask[:, :-1], mask[:, 1:])
                weights = weights * ops.cast(both, "float32")
            if segment_ids is not None:
                same = ops.logical_and(segment_ids[:, 1:] > 0, segment_ids[:, 1:] == segment_ids[:, :-1])
                weights = weights * ops.cast(same, "float32")
            inputs = {name: value[:, :-1] for name, value in batch.items()}
        return super().compute_sums(inputs, labels, weights, training)

    def init_cache(self, batch_size: Any, cache_length: Any) -> KeyValueCache:
        """An empty cache for `batch_size` rows of `cache_length` tokens."""
        config = self.config
        return KeyValueCache.empty(
            batch_size,
            config.num_layers,
            config.num_heads,
            cache_length,
            config.model_dim // config.num_heads,
            self.compute_dtype,
        )

    def checkpoint_variables(self) -> dict[str, keras.Variable]:
        """GPT-2's own names; its kernels are [input, output], as Keras's are."""
        names = {"wte.weight": self.token_embedding.embeddings, "wpe.weight": self.position_embedding.embeddings}
        for number, block in enumerate(self.blocks):
            parts = {
                "ln_1": block.attention_norm,
                "attn.c_attn": block.attention.qkv,
                "attn.c_proj": block.attention.output_projection,
                "ln_2": block.feedforward_norm,
                "mlp.c_fc": block.feedforward.up,
                "mlp.c_proj": block.feedforward.down,
            }
            for part, layer in parts.items():
                names |= weight_and_bias(f"h.{number}.{part}", layer)
        return names | weight_and_bias("ln_f", self.final_norm)
