"""Sentence embeddings: one vector a text, near to those of texts that mean the same."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import keras
import tensorflow as tf
from keras import ops

from lmzoo.engine.metrics import GlobalMean
from lmzoo.engine.reduction import Sums, weighted_sums
from lmzoo.layers.positions import take_positions
from lmzoo.models import LanguageModel
from lmzoo.tasks import sentence_files
from lmzoo.tasks.base import TaskModel, padding_mask
from lmzoo.tasks.losses import correct, cross_entropy, row_weights

Tensor = Any

_SMALLEST_SQUARE = 1e-24
_NO_NEGATIVE = -1e9


@keras.saving.register_keras_serializable("lmzoo")
class EmbeddingModel(TaskModel):
    """Vectors of texts, learned from pairs of texts.

    With objective "cosine" the labels say how alike the two texts of a pair are, and the loss is the squared error of
    the cosine of their vectors. With "contrastive" the two belong together, and the second texts of all other rows are
    the negatives of the first one, and the other way round: the loss is the mean of both cross-entropies over cosines
    divided by `temperature`. Rows of weight 0 are nobody's negatives. The negatives are those of a replica's own
    micro-batch, so that the number of replicas and `micro_batches` change how hard the task is.

    Shapes:
        inputs: token ids [B, T] int32, or a dict with `token_ids` and `padding_mask`; returns [B, D] float32. To train,
        also `pair_token_ids` and `pair_padding_mask` [B, U]: the second text of each pair. Labels are [B] float32 in
        [-1, 1] for "cosine", and not looked at for "contrastive".

    Args:
        encoder: a language model.
        pooling: "mean" over the tokens that are no padding, or the "first" token.
        normalize: whether vectors have length 1.
        objective: "cosine" or "contrastive".
        temperature: of the contrastive objective, above 0.
        dtype: as in Keras; vectors are float32 in any case.

    Reference:
        Reimers and Gurevych 2019, "Sentence-BERT", section 3; Gao et al. 2021, "SimCSE", section 4.
    """

    task: ClassVar[str] = "Model"
    library: ClassVar[str] = "sentence-transformers"

    def __init__(
        self,
        encoder: LanguageModel,
        *,
        pooling: Literal["mean", "first"] = "mean",
        normalize: bool = True,
        objective: Literal["cosine", "contrastive"] = "cosine",
        temperature: float = 0.05,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, dtype=dtype, **kwargs)
        if pooling not in ("mean", "first"):
            raise ValueError(f'pooling is {pooling!r}, but must be "mean" or "first".')
        if objective not in ("cosine", "contrastive"):
            raise ValueError(f'objective is {objective!r}, but must be "cosine" or "contrastive".')
        if not temperature > 0.0:
            raise ValueError(f"temperature is {temperature!r}, but must be above 0.")
        self.pooling, self.normalize = pooling, normalize
        self.objective, self.temperature = objective, temperature
        self.build((None, None))

    def build(self, input_shape: Any) -> None:
        """Nothing: the encoder has all weights."""

    def head_layers(self) -> dict[str, keras.layers.Dense]:
        """None."""
        return {}

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Vectors [B, D] float32 of the texts; of pairs, those of the first ones."""
        vectors = self._pooled(self.encoder.features(inputs, training=training), padding_mask(inputs))
        return _normalized(vectors) if self.normalize else vectors

    def _pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        hidden = ops.cast(hidden, "float32")
        if mask is None:
            return ops.mean(hidden, axis=1) if self.pooling == "mean" else hidden[:, 0]
        if self.pooling == "first":
            places = ops.expand_dims(ops.argmax(ops.cast(mask, "int32"), axis=1), 1)
            return ops.squeeze(take_positions(hidden, ops.cast(places, "int32")), 1)
        counts = ops.expand_dims(ops.cast(mask, "float32"), 2)  # [B, T, 1]
        return ops.sum(hidden * counts, axis=1) / ops.maximum(ops.sum(counts, axis=1), 1.0)

    def sum_metrics(self) -> dict[str, GlobalMean | Sequence[GlobalMean]]:
        """Loss; for the contrastive objective also how often a text is nearest to the one that it belongs to."""
        accuracy = {"accuracy": GlobalMean(name="accuracy")} if self.objective == "contrastive" else {}
        return {"loss": GlobalMean(name="loss"), **accuracy}

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> Sums:
        """Sums over the pairs that count; see `ReplicatedModel.compute_sums`."""
        if not isinstance(inputs, Mapping) or "pair_token_ids" not in inputs:
            raise ValueError("inputs have no pair_token_ids: embeddings are learned from pairs of texts.")
        names = {"token_ids": "pair_token_ids", "padding_mask": "pair_padding_mask"}
        second_texts = {name: inputs[key] for name, key in names.items() if key in inputs}
        first = _normalized(self(inputs, training=training))
        second = _normalized(self(second_texts, training=training))
        weights = row_weights(weights, first)
        if self.objective == "cosine":
            cosines = tf.reduce_sum(first * second, axis=1)
            return {"loss": weighted_sums(tf.square(cosines - tf.reshape(tf.cast(labels, tf.float32), [-1])), weights)}
        scores = tf.matmul(first, second, transpose_b=True) / self.temperature  # [B, B]
        own = tf.range(tf.shape(scores)[0])
        counts = tf.not_equal(weights, 0.0)
        there, back = (tf.where(counts[None, :], each, _NO_NEGATIVE) for each in (scores, tf.transpose(scores)))
        losses = (cross_entropy(own, there, weights) + cross_entropy(own, back, weights)) / 2.0
        return {"loss": weighted_sums(losses, weights), "accuracy": weighted_sums(correct(own, there), weights)}

    # -- Checkpoints.

    @classmethod
    def stored_arguments(
        cls, values: Mapping[str, Any], encoder_class: type[LanguageModel], directory: Any
    ) -> dict[str, Any]:
        """Pooling and normalisation, where sentence-transformers' files tell them."""
        return sentence_files.read(directory)

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes the encoder in the Hugging Face layout, and beside it the files of sentence-transformers."""
        super().save_pretrained(directory, max_shard_bytes=max_shard_bytes)
        sentence_files.write(directory, self.config, self.pooling, self.normalize)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, as `.keras` files hold them."""
        names = ("pooling", "normalize", "objective", "temperature")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _normalized(vectors: Tensor) -> Tensor:
    """Vectors of length 1; those of length 0 stay what they are, and have a gradient."""
    squares = tf.reduce_sum(tf.square(vectors), axis=-1, keepdims=True)
    return vectors * tf.math.rsqrt(tf.maximum(squares, _SMALLEST_SQUARE))
