"""Classification of texts, of pairs of texts, and of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import keras
import tensorflow as tf
from keras import ops

from lmzoo.engine.metrics import GlobalMean
from lmzoo.engine.reduction import Sums, weighted_sums
from lmzoo.layers.feedforward import activation_function
from lmzoo.layers.positions import take_positions
from lmzoo.models import LanguageModel
from lmzoo.models.base import token_weights
from lmzoo.models.heads import HeadDropout
from lmzoo.tasks.base import TaskModel, padding_mask
from lmzoo.tasks.losses import correct, cross_entropy, row_weights

Tensor = Any

Problem = Literal["single_label", "multi_label", "regression"]
# Problem -> `problem_type` in config.json.
_PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


class _Classifier(TaskModel):
    """What the classifiers of texts and of tokens share: labels, dropout before the output, class weights."""

    def __init__(
        self,
        encoder: LanguageModel,
        labels: Sequence[str],
        *,
        dropout_rate: float | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, dtype=dtype, **kwargs)
        self.labels = tuple(labels)
        if isinstance(labels, str) or not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels are {labels!r}, but must be names, one or more, all different.")
        usual = self.head_dropout(type(encoder)).rate
        if dropout_rate is None:
            dropout_rate = self.config.dropout_rate if usual is None else usual
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")
        self._label_smoothing = 0.0
        self._class_weights: list[float] | None = None

    @classmethod
    def head_dropout(cls, encoder_class: type[LanguageModel]) -> HeadDropout:
        """Dropout before the output that such an encoder has in transformers."""
        raise NotImplementedError

    def compile(
        self,
        optimizer: Any = None,
        loss: Any = None,
        *,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """As `TaskModel.compile`, with two more arguments.

        Args:
            optimizer, loss, kwargs: as there.
            label_smoothing: share of the probability that goes to all labels alike, in [0, 1).
            class_weights: how much an example of each label counts in the loss (not in the accuracy): numbers of 0 or
                more in the order of `labels`, or by label. The loss is still divided by the sum of what counts.

        Raises:
            ValueError: either is outside its range, or does not go with the problem.
        """
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing!r}, but must lie in [0, 1).")
        if isinstance(class_weights, Mapping):
            if set(class_weights) != set(self.labels):
                raise ValueError(f"class_weights are for {sorted(class_weights)}, but the labels are {self.labels}.")
            class_weights = [class_weights[label] for label in self.labels]
        if class_weights is not None and (len(class_weights) != len(self.labels) or min(class_weights) < 0):
            raise ValueError(
                f"class_weights are {class_weights!r}, but must be numbers of 0 or more, {len(self.labels)} of them: "
                "one a label."
            )
        self._label_smoothing = label_smoothing
        self._class_weights = None if class_weights is None else [float(weight) for weight in class_weights]
        super().compile(optimizer, loss, **kwargs)

    def get_compile_config(self) -> dict[str, Any]:
        """Arguments of `compile`, as `.keras` files hold them."""
        config = super().get_compile_config()
        own = {"label_smoothing": self._label_smoothing, "class_weights": self._class_weights}
        return {**config, **own} if config else config

    def sum_metrics(self) -> dict[str, GlobalMean | Sequence[GlobalMean]]:
        """Loss and accuracy."""
        return {"loss": GlobalMean(name="loss"), "accuracy": GlobalMean(name="accuracy")}

    def _label_sums(self, labels: Tensor, logits: Tensor, weights: Tensor) -> Sums:
        """Sums of the cross-entropy of labels [...], and of how many are right."""
        counted = weights
        if self._class_weights is not None:
            known = tf.where(tf.equal(weights, 0.0), 0, tf.cast(labels, tf.int32))
            counted = weights * tf.gather(tf.constant(self._class_weights), known)
        losses = cross_entropy(labels, logits, weights, self._label_smoothing)
        return {
            "loss": weighted_sums(losses, counted),
            "accuracy": weighted_sums(correct(labels, logits), weights),
        }

    @classmethod
    def stored_arguments(
        cls, values: Mapping[str, Any], encoder_class: type[LanguageModel], directory: Any
    ) -> dict[str, Any]:
        """Labels and dropout, where config.json tells them."""
        arguments: dict[str, Any] = {}
        if not cls._is_task_of(values, encoder_class):
            return arguments
        name = cls.head_dropout(encoder_class).name
        if name and values.get(name) is not None:
            arguments["dropout_rate"] = values[name]
        labels = values.get("id2label")
        if labels:
            arguments["labels"] = [labels[number] for number in sorted(labels, key=int)]
        elif values.get("architectures"):
            arguments["labels"] = [f"LABEL_{number}" for number in range(values.get("num_labels", 2))]
        return arguments

    @classmethod
    def chosen_arguments(cls, stored: Mapping[str, Any], given: Mapping[str, Any], directory: Any) -> dict[str, Any]:
        """As that of `TaskModel`; what a head with another number of labels is like says nothing about a new one."""
        labels = given.get("labels", stored.get("labels"))
        if labels is None and given.get("problem") != "regression":
            raise ValueError(f"{directory} has no head with labels for a {cls.__name__}: give labels=(...).")
        is_same = labels is not None and len(labels) == len(stored.get("labels", ()))
        return {**(stored if is_same else {}), **given}

    def hugging_face_values(self) -> dict[str, Any]:
        """Labels and dropout."""
        name = self.head_dropout(type(self.encoder)).name
        return {
            "id2label": {str(number): label for number, label in enumerate(self.labels)},
            "label2id": {label: number for number, label in enumerate(self.labels)},
            **({name: self.dropout.rate} if name else {}),
        }

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, as `.keras` files hold them."""
        return {**super().get_config(), "labels": list(self.labels), "dropout_rate": self.dropout.rate}


@keras.saving.register_keras_serializable("lmzoo")
class SequenceClassificationModel(_Classifier):
    """Scores of the labels of a text, or of a pair of texts.

    Example:
        model = SequenceClassificationModel.from_pretrained("bert-base", labels=("negative", "positive"))
        model.compile()
        model.fit(dataset)

    Shapes:
        inputs: token ids [B, T] int32, or a dict of the batch contract; for pairs with `token_type_ids`. Returns logits
        [B, C] float32. Labels are [B] int32; for several labels a text, and for regression, [B, C] float32.

    Args:
        encoder: a language model.
        labels: names of the labels, or of what is measured; None is ("negative", "positive"), or ("score",).
        problem: "single_label" (softmax), "multi_label" (a sigmoid for each label) or "regression" (squared error).
        dropout_rate: before the output; None is the architecture's usual one.
        dtype: a Keras dtype or policy of the head; None is the encoder's.
    """

    task: ClassVar[str] = "ForSequenceClassification"

    def __init__(
        self,
        encoder: LanguageModel,
        labels: Sequence[str] | None = None,
        *,
        problem: Problem = "single_label",
        dropout_rate: float | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        if labels is None:
            labels = ("score",) if problem == "regression" else ("negative", "positive")
        super().__init__(encoder, labels, dropout_rate=dropout_rate, dtype=dtype, **kwargs)
        if problem not in _PROBLEM_TYPES:
            raise ValueError(f"problem is {problem!r}, but must be one of {', '.join(_PROBLEM_TYPES)}.")
        if problem == "single_label" and len(self.labels) < 2:
            raise ValueError(f'labels are {self.labels}, but problem="single_label" needs two or more.')
        self.problem = problem
        heads = self.encoder.task_heads
        self.dense = None
        if heads.dense:
            self.dense = self.dense_layer(
                self.config.model_dim, activation=activation_function(heads.activation), name="dense"
            )
        self.output_layer = self.dense_layer(len(self.labels), use_bias=heads.use_bias, name="output")
        self.build((None, None))

    @classmethod
    def reads_pooler(cls, encoder_class: type[LanguageModel]) -> bool:
        """Whether the head stands on the pooler of such an encoder."""
        return encoder_class.task_heads.pools == "pooler"

    @classmethod
    def head_dropout(cls, encoder_class: type[LanguageModel]) -> HeadDropout:
        """Dropout before the output that such an encoder has in transformers."""
        return encoder_class.task_heads.dropout

    def build(self, input_shape: Any) -> None:
        """Creates the weights of the head."""
        for layer in self.head_layers().values():
            layer.build((None, self.config.model_dim))

    def head_layers(self) -> dict[str, keras.layers.Dense]:
        """Name in a checkpoint -> dense layer of the head."""
        heads = self.encoder.task_heads
        first = {heads.dense: self.dense} if heads.dense else {}
        return {**first, heads.output: self.output_layer}

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Logits [B, C] float32."""
        hidden = self.encoder.features(inputs, training=training)
        vector = self._pooled(hidden, padding_mask(inputs))
        if self.dense is not None:
            if self.encoder.task_heads.drops_first:
                vector = self.dropout(vector, training=training)
            vector = self.dense(vector)
        return ops.cast(self.output_layer(self.dropout(vector, training=training)), "float32")

    def _pooled(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """What a row is classified by: [B, T, D] -> [B, D]; padding may be on either side."""
        pools = self.encoder.task_heads.pools
        if mask is None:
            token = hidden[:, -1:] if pools == "last" else hidden[:, :1]  # [B, 1, D]
        else:
            slots = ops.arange(ops.shape(mask)[1], dtype="int32")
            if pools == "last":
                place = ops.max(ops.where(mask, slots, 0), axis=1, keepdims=True)  # [B, 1]
            else:
                place = ops.expand_dims(ops.argmax(ops.cast(mask, "int32"), axis=1), 1)
            token = take_positions(hidden, ops.cast(place, "int32"))
        return self.encoder.pooled(token) if pools == "pooler" else ops.squeeze(token, 1)

    def compile(self, optimizer: Any = None, loss: Any = None, **kwargs: Any) -> None:
        """As `TaskModel.compile`, and label_smoothing and class_weights; regression takes neither."""
        for name in ("label_smoothing", "class_weights"):
            if kwargs.get(name) and self.problem == "regression":
                raise ValueError(f"{name} is {kwargs[name]!r}, but regression has no classes.")
        if kwargs.get("label_smoothing") and self.problem == "multi_label":
            raise ValueError(f"label_smoothing is {kwargs['label_smoothing']!r}, but goes with single_label only.")
        super().compile(optimizer, loss, **kwargs)

    def sum_metrics(self) -> dict[str, GlobalMean | Sequence[GlobalMean]]:
        """Loss, and accuracy (for several labels a text, that of each label) unless it is regression."""
        metrics = super().sum_metrics()
        return {"loss": metrics["loss"]} if self.problem == "regression" else metrics

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> Sums:
        """Sums over the rows that count; see `ReplicatedModel.compute_sums`."""
        logits = self(inputs, training=training)
        weights = row_weights(weights, logits)
        if self.problem == "single_label":
            return self._label_sums(tf.reshape(labels, [-1]), logits, weights)
        labels = tf.reshape(tf.cast(labels, tf.float32), tf.shape(logits))  # [B, C]
        if self.problem == "regression":
            return {"loss": weighted_sums(tf.reduce_mean(tf.square(logits - labels), axis=-1), weights)}
        shares = tf.expand_dims(weights, 1) * tf.ones_like(logits) / len(self.labels)
        counted = shares if self._class_weights is None else shares * tf.constant(self._class_weights)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
        is_right = tf.cast(tf.equal(logits > 0.0, labels > 0.5), tf.float32)
        return {"loss": weighted_sums(losses, counted), "accuracy": weighted_sums(is_right, shares)}

    @classmethod
    def stored_arguments(
        cls, values: Mapping[str, Any], encoder_class: type[LanguageModel], directory: Any
    ) -> dict[str, Any]:
        """Labels, dropout and problem; as in transformers, one label without a problem means regression."""
        arguments = super().stored_arguments(values, encoder_class, directory)
        problems = {stored: problem for problem, stored in _PROBLEM_TYPES.items()}
        if values.get("problem_type") in problems and cls._is_task_of(values, encoder_class):
            arguments["problem"] = problems[values["problem_type"]]
        elif len(arguments.get("labels", ())) == 1:
            arguments["problem"] = "regression"
        return arguments

    def hugging_face_values(self) -> dict[str, Any]:
        """Labels, dropout and problem."""
        return {**super().hugging_face_values(), "problem_type": _PROBLEM_TYPES[self.problem]}

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, as `.keras` files hold them."""
        return {**super().get_config(), "problem": self.problem}


@keras.saving.register_keras_serializable("lmzoo")
class TokenClassificationModel(_Classifier):
    """Scores of the labels of each token, as for named entities.

    Shapes:
        inputs: token ids [B, T] int32, or a dict of the batch contract; returns logits [B, T, C] float32. Labels are
        [B, T] int32; weights [B, T] say which tokens count (None: all that are no padding).

    Args:
        encoder: a language model.
        labels: names of the labels, such as ("O", "B-PER", "I-PER").
        dropout_rate: before the output; None is the architecture's usual one.
        dtype: a Keras dtype or policy of the head; None is the encoder's.
    """

    task: ClassVar[str] = "ForTokenClassification"

    def __init__(
        self,
        encoder: LanguageModel,
        labels: Sequence[str],
        *,
        dropout_rate: float | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, labels, dropout_rate=dropout_rate, dtype=dtype, **kwargs)
        self.output_layer = self.dense_layer(len(self.labels), name="output")
        self.build((None, None))

    @classmethod
    def head_dropout(cls, encoder_class: type[LanguageModel]) -> HeadDropout:
        """Dropout before the output that such an encoder has in transformers."""
        return encoder_class.task_heads.token_dropout or encoder_class.task_heads.dropout

    def build(self, input_shape: Any) -> None:
        """Creates the weights of the head."""
        self.output_layer.build((None, None, self.config.model_dim))

    def head_layers(self) -> dict[str, keras.layers.Dense]:
        """Name in a checkpoint -> dense layer of the head."""
        return {"classifier": self.output_layer}

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Logits [B, T, C] float32."""
        hidden = self.encoder.features(inputs, training=training)
        return ops.cast(self.output_layer(self.dropout(hidden, training=training)), "float32")

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> Sums:
        """Sums over the tokens that count; see `ReplicatedModel.compute_sums`."""
        logits = self(inputs, training=training)
        if weights is None and (mask := padding_mask(inputs)) is not None:
            weights = ops.cast(mask, "float32")
        return self._label_sums(labels, logits, token_weights(weights, labels))
