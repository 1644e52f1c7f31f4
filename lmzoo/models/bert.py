"""BERT: an encoder with learned positions and post-normalisation; RoBERTa and DistilBERT by its options.

Reference:
    Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", section 3,
    and the released code; Liu et al. 2019, "RoBERTa"; Sanh et al. 2019, "DistilBERT".
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import keras
from keras import ops

from lmzoo import checkpoints
from lmzoo.engine.metrics import GlobalMean, Perplexity
from lmzoo.layers import FeedForward, LearnedPositions, SelfAttention, TokenEmbedding, attention_bias
from lmzoo.layers.feedforward import activation_function
from lmzoo.layers.positions import take_positions, token_positions
from lmzoo.models.base import LanguageModel, token_weights, weight_and_bias
from lmzoo.models.transformer import TransformerConfig

Tensor = Any

# Share of the tokens that masked-LM training hides, and so sends through the head.
_MASKED_SHARE = 0.15
# Reported once a batch has brought labels for it.
_SENTENCE_METRICS = ("masked_lm_loss", "next_sentence_loss", "next_sentence_accuracy")


# The 24 models of Turc et al. 2019, "Well-Read Students Learn Better", by the names they were released under.
_SMALL = {
    f"bert_uncased_L-{layers}_H-{width}_A-{width // 64}": {
        "num_layers": layers,
        "num_heads": width // 64,
        "model_dim": width,
    }
    for layers in (2, 4, 6, 8, 10, 12)
    for width in (128, 256, 512, 768)
}
_LARGE = {"num_layers": 24, "num_heads": 16, "model_dim": 1024}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(TransformerConfig):
    """Shape of a BERT: that of `TransformerConfig`, and these.

    Args:
        num_token_types: rows of the table of token types; with one, every token is of the same type.
        pooler: whether there are a pooler and, on top of it, a next-sentence head.
    """

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30_522
    context_length: int = 512
    pad_token_id: int | None = 0
    norm_epsilon: float = 1e-12
    num_token_types: int = 2
    pooler: bool = True

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bert-tiny": _SMALL["bert_uncased_L-2_H-128_A-2"],
        "bert-mini": _SMALL["bert_uncased_L-4_H-256_A-4"],
        "bert-small": _SMALL["bert_uncased_L-4_H-512_A-8"],
        "bert-medium": _SMALL["bert_uncased_L-8_H-512_A-8"],
        "bert-base": {},
        "bert-base-uncased": {},
        "bert-base-cased": {"vocab_size": 28_996},
        "bert-large": _LARGE,
        "bert-large-uncased": _LARGE,
        "bert-large-cased": {**_LARGE, "vocab_size": 28_996},
        **_SMALL,
    }

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
    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]] = ("BertForMaskedLM", "BertForPreTraining")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_kind()

    def _check_kind(self) -> None:
        """What sets BERT, RoBERTa and DistilBERT apart, so that a checkpoint of the kind can hold the model."""
        self._require_positive("num_token_types")
        if not isinstance(self.pooler, bool):
            self._refuse("pooler", "must be True or False")

    @property
    def head_activation(self) -> str:
        """Activation inside the masked-LM head."""
        return self.activation

    def count_params(self) -> int:
        """Number of parameters as published: embeddings, blocks and pooler. `head_params` come on top."""
        width = self.model_dim
        rows = self.vocab_size + self.position_offset + self.context_length + self.num_token_types
        pooler = width * width + width if self.pooler else 0
        return rows * width + 2 * width + self.num_layers * self.count_block_params() + pooler

    @property
    def head_params(self) -> int:
        """Parameters of the masked-LM head, whose table is the embeddings', and of the next-sentence head."""
        width = self.model_dim
        masked_lm = width * width + width + 2 * width + self.vocab_size
        return masked_lm + (2 * width + 2 if self.pooler else 0)

    def training_flops_per_token(self, seq_length: int) -> float:
        """6 for each weight that multiplies a token, and 12 L D T for attention.

        Assumes masked-LM training on batches with `mask_positions`, which send 15% of the tokens through the head. The
        pooler sees one token a row, and is left out.
        """
        head = self.model_dim * (self.model_dim + self.vocab_size)
        multiplied = self.num_layers * self.count_block_params() + _MASKED_SHARE * head
        return 6.0 * multiplied + 12.0 * self.num_layers * self.model_dim * seq_length

    def count_head_tokens(self, rows: int, seq_length: int) -> int:
        """Number of tokens that a batch with `mask_positions` sends through the output head: 15% of each row."""
        return rows * math.ceil(_MASKED_SHARE * seq_length)

    def to_hugging_face(self) -> dict[str, Any]:
        """Content of config.json, as `transformers` reads it."""
        return {
            **super().to_hugging_face(),
            self.HUGGING_FACE_NAMES["feedforward_dim"]: self.inner_dim,
            "architectures": [self.HUGGING_FACE_CLASSES[self.pooler]],
        }


class BertBlock(keras.layers.Layer):
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
        initial = functools.partial(_initial, self.dtype_policy, "kernel_initializer", "output_initializer")
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


def _initial(policy: Any, *names: str) -> dict[str, Any]:
    """Arguments of a layer; an initializer for each weight, since one gives the same numbers whenever it is used."""
    return {"dtype": policy, **{name: keras.initializers.TruncatedNormal(stddev=0.02) for name in names}}


@keras.saving.register_keras_serializable("lmzoo")
class BertModel(LanguageModel):
    """BERT, from token ids to the scores of hidden tokens.

    Trained as it is, it learns masked LM. If the inputs hold `next_sentence_labels` [B] int32, it learns these too:
    next-sentence prediction (0 where B follows A, 1 where it is random) or sentence-order prediction (1 where the two
    are swapped). The loss is the sum of both losses, and each is reported. A row counts in the second by the weights
    of its tokens in the first, so that the sum is one mean over tokens, however rows are shared out among replicas;
    where all rows hide as many tokens, that is the plain mean over rows.

    Example:
        model = BertModel.from_preset("bert-tiny")
        model.compile()
        model.fit(dataset)
        logits = model({"token_ids": ids, "padding_mask": ids != 0})

    Shapes:
        inputs: token ids [B, T] int32, or a dict with `token_ids` and optionally `padding_mask`, `segment_ids`,
        `positions`, `token_type_ids` (0 without; models with one type or none do not look) and `mask_positions`
        [B, M]; returns logits [B, T, V] float32, or [B, M, V] of the tokens at `mask_positions`.

    Args:
        config: shape of the model.
        dtype: a Keras dtype or policy.
    """

    config_class: ClassVar[type[BertConfig]] = BertConfig
    config: BertConfig
    pooler: Any  # A dense layer or None, as the next one.
    next_sentence: Any
    checkpoint_prefix = "bert."
    checkpoint_heads = ("cls.",)
    checkpoint_transposed = True
    checkpoint_optional = r"pooler\..*|cls\..*"
    # Heads of fine-tuning tasks, a head that the config leaves out, and a count that old checkpoints carry.
    checkpoint_ignored = r"(classifier|qa_outputs|pooler|cls\.seq_relationship)\..*|embeddings\.position_ids"
    checkpoint_tied: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    # Names in a checkpoint: of the list of blocks, of the parts of a block, and of the masked-LM head's parts.
    checkpoint_blocks: ClassVar[str] = "encoder.layer"
    checkpoint_block_parts: ClassVar[Sequence[str]] = (
        "attention.self.{query,key,value}",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    checkpoint_head_parts: ClassVar[Sequence[str]] = (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
    )

    def __init__(self, config: BertConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._seen_sentence_labels = False
        width, policy = config.model_dim, self.dtype_policy
        table = functools.partial(_initial, policy, "embeddings_initializer")
        norm = {"epsilon": config.norm_epsilon, "dtype": policy}
        dense = functools.partial(_initial, policy, "kernel_initializer")
        self.token_embedding = TokenEmbedding(config.vocab_size, width, **table(), name="token_embedding")
        self.position_embedding = LearnedPositions(
            config.position_offset + config.context_length, width, **table(), name="position_embedding"
        )
        self.token_type_embedding = None
        if config.num_token_types:
            self.token_type_embedding = TokenEmbedding(
                config.num_token_types, width, **table(), name="token_type_embedding"
            )
        self.embedding_norm = keras.layers.LayerNormalization(**norm, name="embedding_norm")
        self.embedding_dropout = keras.layers.Dropout(config.dropout_rate, dtype=policy)
        self.blocks = [
            BertBlock(
                num_heads=config.num_heads,
                feedforward_dim=config.inner_dim,
                dropout_rate=config.dropout_rate,
                norm_epsilon=config.norm_epsilon,
                activation=config.activation,
                dtype=policy,
                name=f"block_{number}",
            )
            for number in range(config.num_layers)
        ]
        self.pooler = self.next_sentence = None
        if config.pooler:
            self.pooler = keras.layers.Dense(width, activation="tanh", **dense(), name="pooler")
            self.next_sentence = keras.layers.Dense(2, **dense(), name="next_sentence")
        activation = activation_function(config.head_activation)
        self.head_dense = keras.layers.Dense(width, activation=activation, **dense(), name="head_dense")
        self.head_norm = keras.layers.LayerNormalization(**norm, name="head_norm")
        self.build((None, None))

    def build(self, input_shape: Any) -> None:
        """Creates all weights; token ids of any shape will do."""
        tables = (self.token_embedding, self.position_embedding, self.token_type_embedding)
        layers = (self.embedding_norm, *self.blocks, self.pooler, self.next_sentence, self.head_dense, self.head_norm)
        for layer in (*tables, *layers):
            if layer is not None:
                layer.build((None, None, self.config.model_dim))
        self.head_bias = self.add_weight(
            name="head_bias", shape=(self.config.vocab_size,), initializer="zeros", autocast=False
        )

    # -- The forward pass.

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
        bias = attention_bias(
            slots, slots, dtype=self.compute_dtype, causal=False, key_mask=mask, segment_ids=segment_ids
        )
        states = [hidden]
        for block in self.blocks:
            states.append(self.run_block(block, states[-1], bias, training=training))
        return states

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Scores [B, T, V] of all tokens, or [B, M, V] of those at `mask_positions`, float32."""
        return self.logits(self._scored(self.features(inputs, training=training), inputs))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens of the vocabulary by the masked-LM head: [..., D] -> [..., V] float32."""
        return super().logits(self._transformed(hidden))

    def pooled(self, hidden: Tensor) -> Tensor:
        """One vector a row, from what stands first in it, so pad on the right: [B, T, D] -> [B, D]."""
        if self.pooler is None:
            raise ValueError(
                f"this {type(self).__name__} has no pooler: its config says pooler=False, so that it neither pools nor "
                "learns next_sentence_labels. Take the hidden state of the first token, or a mean over tokens."
            )
        return self.pooler(hidden[:, 0])

    def next_sentence_logits(self, hidden: Tensor) -> Tensor:
        """Scores of the two answers of next-sentence or sentence-order prediction: [B, T, D] -> [B, 2] float32."""
        return ops.cast(self.next_sentence(self.pooled(hidden)), "float32")

    def head(self) -> tuple[Tensor, Tensor | None]:
        """The token embedding's own table and a bias, to be applied after the head's dense layer and norm."""
        return self.token_embedding.head_table(), self.head_bias

    def _transformed(self, hidden: Tensor) -> Tensor:
        return self.head_norm(self.head_dense(hidden))

    @staticmethod
    def _scored(hidden: Tensor, inputs: Any) -> Tensor:
        """The hidden states [B, M, D] at `mask_positions`, or all."""
        places = inputs.get("mask_positions") if isinstance(inputs, Mapping) else None
        return hidden if places is None else take_positions(hidden, places)

    # -- Training.

    def sum_metrics(self) -> dict[str, GlobalMean | Sequence[GlobalMean]]:
        """Loss, and masked LM's perplexity and token accuracy; with sentence labels, both losses and an accuracy."""
        return {
            "loss": GlobalMean(name="loss"),
            "masked_lm_loss": [GlobalMean(name="masked_lm_loss"), Perplexity()],
            "accuracy": GlobalMean(name="accuracy"),
            "next_sentence_loss": GlobalMean(name="next_sentence_loss"),
            "next_sentence_accuracy": GlobalMean(name="next_sentence_accuracy"),
        }

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """All metrics; those of sentence labels once a batch has brought some."""
        seen = getattr(self, "_seen_sentence_labels", False)
        return [metric for metric in super().metrics if seen or metric.name not in _SENTENCE_METRICS]

    def idle_variables(self) -> Sequence[keras.Variable]:
        """Those of pooler and next-sentence head, which only sentence labels train."""
        layers = [layer for layer in (self.pooler, self.next_sentence) if layer is not None]
        return [variable for layer in layers for variable in layer.trainable_variables]

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of both objectives; labels and weights are [B, M] if the inputs have `mask_positions`, else [B, T]."""
        if labels is None:
            raise ValueError("masked LM needs labels: give (inputs, labels, weights), as a masked-LM objective makes.")
        hidden = self.features(inputs, training=training)
        weights = token_weights(weights, labels)
        sums = self._token_sums(self._transformed(self._scored(hidden, inputs)), labels, weights, training)
        loss, weight = sums["masked_lm_loss"] = sums["loss"]
        answers = inputs.get("next_sentence_labels") if isinstance(inputs, Mapping) else None
        nothing = (ops.zeros(()), ops.zeros(()))
        if answers is None:
            return {**sums, "next_sentence_loss": nothing, "next_sentence_accuracy": nothing}
        self._seen_sentence_labels = True
        logits = self.next_sentence_logits(hidden)  # [B, 2]
        row_weights = ops.sum(weights, axis=1)
        losses = keras.losses.sparse_categorical_crossentropy(answers, logits, from_logits=True)  # [B]
        correct = ops.cast(ops.equal(ops.argmax(logits, axis=1), ops.cast(answers, "int32")), "float32")
        sentence_loss = ops.sum(row_weights * losses)
        return {
            **sums,
            "loss": (loss + sentence_loss, weight),
            "next_sentence_loss": (sentence_loss, weight),
            "next_sentence_accuracy": (ops.sum(row_weights * correct), weight),
        }

    # -- Checkpoints.

    def checkpoint_variables(self) -> dict[str, keras.Variable]:
        """Names as Hugging Face has them; queries, keys and values are one variable here and three tensors there."""
        names = {
            "embeddings.word_embeddings.weight": self.token_embedding.embeddings,
            "embeddings.position_embeddings.weight": self.position_embedding.embeddings,
        }
        if self.token_type_embedding is not None:
            names["embeddings.token_type_embeddings.weight"] = self.token_type_embedding.embeddings
        names |= weight_and_bias("embeddings.LayerNorm", self.embedding_norm)
        for number, block in enumerate(self.blocks):
            attention, feedforward = block.attention, block.feedforward
            attending = (attention.qkv, attention.output_projection, block.attention_norm)
            layers = (*attending, feedforward.up, feedforward.down, block.feedforward_norm)
            for part, layer in zip(self.checkpoint_block_parts, layers, strict=True):
                names |= weight_and_bias(f"{self.checkpoint_blocks}.{number}.{part}", layer)
        dense, norm, bias = self.checkpoint_head_parts
        names |= weight_and_bias(dense, self.head_dense) | weight_and_bias(norm, self.head_norm)
        names[bias] = self.head_bias
        if self.pooler is not None:
            names |= weight_and_bias("pooler.dense", self.pooler)
            names |= weight_and_bias("cls.seq_relationship", self.next_sentence)
        return names

    @classmethod
    def from_google_checkpoint(
        cls, directory: str | os.PathLike[str], *, name: str = "bert_model.ckpt", dtype: Any = None, **overrides: Any
    ) -> Self:
        """A model with the weights of a checkpoint as Google released them: bert_config.json and TensorFlow files.

        Args:
            directory: holds bert_config.json, and `name`.index and `name`.data-*.
            name: of the TensorFlow checkpoint; pretraining with Google's code writes "model.ckpt-<step>".
            dtype, overrides: as in `from_pretrained`, which also says what is raised.
        """
        values = {**checkpoints.read_config(directory, "bert_config.json"), "model_type": cls.config_class.model_type}
        files = checkpoints.read_tensorflow_tensors(os.path.join(directory, name), _name_of_google)
        model = cls(cls._config_from(values, directory).replace(**overrides), dtype=dtype)
        model._load_tensors(files)
        return model


def _name_of_google(name: str) -> str | None:
    """Google's name of a weight -> Hugging Face's; None for the step and the optimizer's state."""
    if name == "global_step" or re.search(r"/(adam|lamb)_[mv]$", name):
        return None
    name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name).replace("/", ".")
    for ending, ours in ((r"\.(kernel|output_weights)$", ".weight"), (r"\.output_bias$", ".bias")):
        name = re.sub(ending, ours, name)
    return f"{name}.weight" if name.endswith("_embeddings") else name


# -- RoBERTa and DistilBERT: what their configs and checkpoints have that BERT's have not.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """Shape of a RoBERTa: one token type, no pooler, and positions that begin after the id of padding."""

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50_265
    eos_token_id: int | None = 2
    pad_token_id: int | None = 1
    num_token_types: int = 1
    pooler: bool = False
    norm_epsilon: float = 1e-5

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"roberta-base": {}, "roberta-large": _LARGE}
    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]] = ("RobertaForMaskedLM",)
    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        field: name for field, name in BertConfig.HUGGING_FACE_NAMES.items() if field != "pooler"
    }

    def _check_kind(self) -> None:
        self._require_positive("num_token_types")
        if self.pooler is not False:
            self._refuse("pooler", "must be False: RoBERTa learns no next sentences")
        if self.pad_token_id is None:
            self._refuse("pad_token_id", "must be a token id, since positions begin after it")

    @property
    def position_offset(self) -> int:
        """Row of the table of positions that a document's first token has: those before it belong to padding."""
        return (self.pad_token_id or 0) + 1

    @property
    def head_activation(self) -> str:
        """Activation inside the masked-LM head, whatever that of the blocks is."""
        return "gelu"


@keras.saving.register_keras_serializable("lmzoo")
class RobertaModel(BertModel):
    """RoBERTa: `BertModel` with the options of `RobertaConfig`; neither token types nor sentence labels."""

    config_class = RobertaConfig
    checkpoint_prefix = "roberta."
    checkpoint_heads = ("lm_head.",)
    checkpoint_optional = r"lm_head\..*"
    checkpoint_tied: ClassVar[Mapping[str, str]] = {
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    checkpoint_head_parts = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig(BertConfig):
    """Shape of a DistilBERT: half the layers of a BERT, no token types, no pooler."""

    model_type: ClassVar[str] = "distilbert"

    num_layers: int = 6
    num_token_types: int = 0
    pooler: bool = False

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "distilbert-base": {},
        "distilbert-base-uncased": {},
        "distilbert-base-cased": {"vocab_size": 28_996},
    }
    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]] = ("DistilBertForMaskedLM",)
    HUGGING_FACE_DROPOUT_RATES = ("attention_dropout",)
    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        **TransformerConfig.HUGGING_FACE_NAMES,
        "context_length": "max_position_embeddings",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "model_dim": "dim",
        "feedforward_dim": "hidden_dim",
        "dropout_rate": "dropout",
        "activation": "activation",
    }

    def _check_kind(self) -> None:
        for field, value in {"num_token_types": 0, "pooler": False, "norm_epsilon": 1e-12}.items():
            if getattr(self, field) != value:
                self._refuse(field, f"must be {value!r}, as in all of DistilBERT's checkpoints")


@keras.saving.register_keras_serializable("lmzoo")
class DistilBertModel(BertModel):
    """DistilBERT: `BertModel` with the options of `DistilBertConfig`; neither token types nor sentence labels."""

    config_class = DistilBertConfig
    checkpoint_prefix = "distilbert."
    checkpoint_heads = ("vocab_",)
    checkpoint_optional = r"vocab_.*"
    checkpoint_ignored = r"(pre_classifier|classifier|qa_outputs)\..*|embeddings\.position_ids"
    checkpoint_tied: ClassVar[Mapping[str, str]] = {"vocab_projector.weight": "embeddings.word_embeddings.weight"}
    checkpoint_blocks = "transformer.layer"
    checkpoint_block_parts = (
        "attention.{q_lin,k_lin,v_lin}",
        "attention.out_lin",
        "sa_layer_norm",
        "ffn.lin1",
        "ffn.lin2",
        "output_layer_norm",
    )
    checkpoint_head_parts = ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
