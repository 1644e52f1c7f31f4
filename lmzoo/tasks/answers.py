"""Extractive question answering: where in a text the answer begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops

from lmzoo.engine.metrics import GlobalMean
from lmzoo.engine.reduction import Sums, weighted_sums
from lmzoo.models import LanguageModel
from lmzoo.tasks.base import TaskModel, padding_mask
from lmzoo.tasks.losses import correct, cross_entropy, row_weights

Tensor = Any
# The score of padding in the loss: finite, so that a wrong label gives a large number and not NaN.
_PADDING_SCORE = -1e9


@keras.saving.register_keras_serializable("lmzoo")
class QuestionAnsweringModel(TaskModel):
    """Scores of each token as the start and as the end of the answer, in question and context read as a pair.

    The loss is the mean of the cross-entropies of start and end over the tokens that are no padding; `accuracy` is the
    share of rows in which both are right.

    Shapes:
        inputs: a dict of the batch contract; returns logits [B, T, 2] float32, also of padding. Labels are [B, 2]
        int32, the places of the first and the last token of the answer; 0 and 0 where there is none.

    Args:
        encoder: a language model.
        dtype: a Keras dtype or policy of the head; None is the encoder's.

    Reference:
        Devlin et al. 2019, "BERT", sections 4.2 and 4.3.
    """

    task: ClassVar[str] = "ForQuestionAnswering"

    def __init__(self, encoder: LanguageModel, *, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(encoder, dtype=dtype, **kwargs)
        self.output_layer = self.dense_layer(2, name="output")
        self.build((None, None))

    def build(self, input_shape: Any) -> None:
        """Creates the weights of the head."""
        self.output_layer.build((None, None, self.config.model_dim))

    def head_layers(self) -> dict[str, keras.layers.Dense]:
        """Name in a checkpoint -> dense layer of the head."""
        return {"qa_outputs": self.output_layer}

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Logits [B, T, 2] float32: start and end."""
        return ops.cast(self.output_layer(self.encoder.features(inputs, training=training)), "float32")

    def sum_metrics(self) -> dict[str, GlobalMean | Sequence[GlobalMean]]:
        """Loss, and the share of rows with start and end right."""
        return {"loss": GlobalMean(name="loss"), "accuracy": GlobalMean(name="accuracy")}

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> Sums:
        """Sums over the rows that count; see `ReplicatedModel.compute_sums`."""
        logits = tf.transpose(self(inputs, training=training), [0, 2, 1])  # [B, 2, T]
        mask = padding_mask(inputs)
        if mask is not None:
            logits = tf.where(tf.expand_dims(mask, 1), logits, _PADDING_SCORE)
        weights = row_weights(weights, logits)
        losses = cross_entropy(labels, logits, tf.expand_dims(weights, 1) * tf.ones([1, 2]))  # [B, 2]
        both = tf.reduce_min(correct(labels, logits), axis=1)
        return {
            "loss": weighted_sums(tf.reduce_mean(losses, axis=1), weights),
            "accuracy": weighted_sums(both, weights),
        }
