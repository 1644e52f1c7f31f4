"""What encoders that learn to guess hidden tokens share: the masked-LM head, and the head for sentence labels."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from lmzoo.engine.metrics import GlobalMean, Perplexity
from lmzoo.layers.feedforward import activation_function
from lmzoo.layers.positions import take_positions
from lmzoo.models.base import token_weights, weight_and_bias
from lmzoo.models.encoder import EncoderConfig, EncoderModel, initializers

Tensor = Any

# Reported once a batch has brought labels for it.
_SENTENCE_METRICS = ("masked_lm_loss", "next_sentence_loss", "next_sentence_accuracy")


class MaskedLM(EncoderModel):
    """An encoder, from token ids to the scores of hidden tokens.

    Trained as it is, it learns masked LM. If the inputs hold `next_sentence_labels` [B] int32, it learns these too:
    next-sentence prediction (0 where B follows A, 1 where it is random) or sentence-order prediction (1 where the two
    are swapped). The loss is the sum of both losses, and each is reported. A row counts in the second by the weights
    of its tokens in the first, so that the sum is one mean over tokens, however rows are shared out among replicas;
    where all rows hide as many tokens, that is the plain mean over rows.

        checkpoint_head_parts: names of the head's dense layer, norm and bias.
        checkpoint_pooler, checkpoint_sentence_head: names of these layers.

    Shapes:
        inputs: as `EncoderModel` takes them, and `mask_positions` [B, M] in a dict; returns logits [B, T, V] float32,
        or [B, M, V] of the tokens at `mask_positions`.
    """

    pooler: Any  # A layer or None, as the next ones.
    next_sentence: Any
    head_dense: Any
    head_norm: Any
    head_bias: Any
    checkpoint_head_parts: ClassVar[Sequence[str]]
    checkpoint_pooler: ClassVar[str] = "pooler.dense"
    checkpoint_sentence_head: ClassVar[str] = "cls.seq_relationship"

    def __init__(self, config: EncoderConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._seen_sentence_labels = False
        dense = functools.partial(initializers, self.dtype_policy, "kernel_initializer")
        self.pooler = self.next_sentence = self.head_dense = self.head_norm = self.head_bias = None
        if config.pooler:
            self.pooler = keras.layers.Dense(config.model_dim, activation="tanh", **dense(), name="pooler")
        if config.pooler and self.output_head:
            self.next_sentence = keras.layers.Dense(2, **dense(), name="next_sentence")
        if self.output_head:
            activation = activation_function(config.head_activation)
            self.head_dense = keras.layers.Dense(
                config.embedding_dim, activation=activation, **dense(), name="head_dense"
            )
            self.head_norm = keras.layers.LayerNormalization(
                epsilon=config.norm_epsilon, dtype=self.dtype_policy, name="head_norm"
            )
        self.build((None, None))

    def build(self, input_shape: Any) -> None:
        """Creates all weights; token ids of any shape will do."""
        super().build(input_shape)
        for layer in (self.pooler, self.next_sentence, self.head_dense):
            if layer is not None:
                layer.build((None, None, self.config.model_dim))
        if self.output_head:
            self.head_norm.build((None, None, self.config.embedding_dim))
            self.head_bias = self.add_weight(
                name="head_bias", shape=(self.config.vocab_size,), initializer="zeros", autocast=False
            )

    # -- The forward pass.

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
        if self.head_dense is None:
            raise ValueError(f"this {type(self).__name__} was made with output_head=False: it has features() alone.")
        return self.head_norm(self.head_dense(hidden))

    @staticmethod
    def _scored(hidden: Tensor, inputs: Any) -> Tensor:
        """The hidden states [B, M, D] at `mask_positions`, or all."""
        places = inputs.get("mask_positions") if isinstance(inputs, Mapping) else None
        return hidden if places is None else take_positions(hidden, places)

    # -- Training.

    @classmethod
    def pretraining_objectives(cls, config: Any) -> tuple[str, ...]:
        """To guess hidden tokens; with a pooler, next sentences or the order of sentences too."""
        return ("mlm", "mlm+nsp", "mlm+sop") if config.pooler else ("mlm",)

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
        """Those of the encoder, of the masked-LM head, and of the pooler and its head where there are any."""
        names = super().checkpoint_variables()
        if self.output_head:
            dense, norm, bias = self.checkpoint_head_parts
            names |= weight_and_bias(dense, self.head_dense) | weight_and_bias(norm, self.head_norm)
            names[bias] = self.head_bias
        if self.pooler is not None:
            names |= weight_and_bias(self.checkpoint_pooler, self.pooler)
        if self.next_sentence is not None:
            names |= weight_and_bias(self.checkpoint_sentence_head, self.next_sentence)
        return names
