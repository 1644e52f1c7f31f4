"""Fine-tuning tasks of an encoder with a head, and the table of all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from lmzoo import checkpoints
from lmzoo.data.labelled import Examples, Ragged
from lmzoo.data.labelled_answers import AnswerExamples, encode_answers
from lmzoo.data.labelled_texts import (
    Problem,
    TagExamples,
    encode_similar,
    encode_tags,
    encode_texts,
    find_labels,
    find_tags,
)
from lmzoo.data.records import Records
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import Seq2SeqLM, find_architecture, load_pretrained
from lmzoo.models.describe import readme
from lmzoo.tasks import (
    EmbeddingModel,
    QuestionAnsweringModel,
    SequenceClassificationModel,
    TaskModel,
    TokenClassificationModel,
    load_task,
)
from lmzoo.training.finetune_recipe import FinetunedModel, Outputs, TaskRecipe
from lmzoo.training.finetune_settings import FinetuneConfig
from lmzoo.training.finetune_text import TextToText
from lmzoo.training.metrics import (
    Scores,
    answer_scores,
    classification_scores,
    entity_scores,
    multi_label_scores,
    regression_scores,
    retrieval_scores,
)

_STRIDE = 128


class EncoderRecipe(TaskRecipe):
    """A task of an encoder with a head."""

    model_class: ClassVar[type[TaskModel]]

    def __init__(self, config: FinetuneConfig, records: Records | None) -> None:
        super().__init__(config, records)
        if records is not None:
            self.labels = config.labels or self._known_labels(self.find_labels(records))

    def find_labels(self, records: Records) -> tuple[str, ...]:
        """The labels that occur; none for a task without."""
        return ()

    def outputs(self, model: TaskModel, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """What the head gives."""
        return model(inputs, training=False)

    def load(self, directory: Path, **options: Any) -> TaskModel:
        """The encoder with its head, as much of it frozen as the settings say."""
        model = self.model_class.from_pretrained(directory, **options, **self.arguments())
        if self.config.freeze is not None:
            model.freeze(self.config.freeze)
        return model

    def readme(self, model: TaskModel, config: Mapping[str, Any]) -> str:
        """With the function that opens a model of a task."""
        return readme(model, config, loader="lmzoo.tasks.load_task", library=model.library)

    def arguments(self) -> dict[str, Any]:
        """Of the model's constructor."""
        return {}

    def optimizer_arguments(self, model: TaskModel) -> dict[str, Any]:
        """What layers learn more slowly, and what decays towards its start."""
        more: dict[str, Any] = {}
        if self.config.layer_decay < 1.0:
            more["learning_rate_factors"] = model.learning_rate_factors(self.config.layer_decay)
        if self.config.l2_sp:
            more["start_decay"] = model.start_decay(self.config.l2_sp)
        return more

    def _class_weights(self, numbers: np.ndarray) -> list[float] | None:
        """Weights of the labels, from the numbers of the labels that occur."""
        if self.config.class_weights != "balanced":
            return None if self.config.class_weights is None else list(self.config.class_weights)
        counts = np.bincount(numbers, minlength=len(self.labels))
        return (len(numbers) / (np.count_nonzero(counts) * np.maximum(counts, 1))).tolist()

    def _known_labels(self, found: tuple[str, ...]) -> tuple[str, ...]:
        """The labels of the checkpoint, if it has a head for them all, so that training goes on with it."""
        directory = checkpoints.find_checkpoint(self.config.model)
        stored = self.model_class.stored_arguments(
            checkpoints.read_config(directory), find_architecture(directory), directory
        )
        labels = tuple(stored.get("labels", ()))
        return labels if set(found) <= set(labels) else found


class _Texts(EncoderRecipe):
    model_class = SequenceClassificationModel
    problem: ClassVar[Problem]

    def find_labels(self, records: Records) -> tuple[str, ...]:
        assert self.label is not None
        return find_labels(records, self.label, self.problem)

    def arguments(self) -> dict[str, Any]:
        return {"labels": self.labels, "problem": self.problem}

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Examples:
        assert self.label is not None
        return encode_texts(
            records,
            tokenizer,
            text=self.text,
            pair=self.pair,
            label=self.label,
            labels=self.labels,
            problem=self.problem,
            max_length=max_length,
        )


class Classify(_Texts):
    """One label for a text, or for a pair of texts."""

    problem: ClassVar[Problem] = "single_label"
    usual_metric = "accuracy"

    def compile_arguments(self, examples: Examples) -> dict[str, Any]:
        """Label smoothing and class weights."""
        labels = np.asarray(examples.labels)
        return {"label_smoothing": self.config.label_smoothing, "class_weights": self._class_weights(labels)}

    def scores(self, examples: Examples, outputs: Outputs) -> Scores:
        """Accuracy, F1, Matthews' correlation."""
        return classification_scores(np.asarray(examples.labels), np.argmax(outputs, axis=1), len(self.labels))

    def predictions(self, examples: Examples, outputs: Outputs) -> list[dict[str, Any]]:
        """The best label and the probabilities of all."""
        return [{"prediction": self.labels[int(row.argmax())], "scores": self._named(row)} for row in _softmax(outputs)]

    def _named(self, row: np.ndarray) -> dict[str, float]:
        return dict(zip(self.labels, np.round(row.astype(float), 6).tolist(), strict=True))


class MultiLabel(Classify):
    """Any number of labels for a text, each with a probability of its own."""

    problem: ClassVar[Problem] = "multi_label"
    usual_metric = "micro_f1"

    def compile_arguments(self, examples: Examples) -> dict[str, Any]:
        """None."""
        return {}

    def scores(self, examples: Examples, outputs: Outputs) -> Scores:
        """F1 over all decisions and over labels, and the share of exact matches."""
        return multi_label_scores(np.asarray(examples.labels) > 0.5, np.asarray(outputs) > 0.0)

    def predictions(self, examples: Examples, outputs: Outputs) -> list[dict[str, Any]]:
        """The labels with a probability above a half, and the probabilities of all."""
        return [
            {
                "prediction": [label for label, score in zip(self.labels, row, strict=True) if score > 0.0],
                "scores": self._named(1.0 / (1.0 + np.exp(-row))),
            }
            for row in outputs
        ]


class Regress(_Texts):
    """A number for a text, or several."""

    problem = "regression"
    usual_metric = "pearson"

    def scores(self, examples: Examples, outputs: Outputs) -> Scores:
        """Correlations and squared error."""
        return regression_scores(np.asarray(examples.labels), np.asarray(outputs))

    def predictions(self, examples: Examples, outputs: Outputs) -> list[dict[str, Any]]:
        """The numbers; alone if it is one."""
        return [{"prediction": row.tolist() if len(row) > 1 else float(row[0])} for row in outputs]


class Tag(EncoderRecipe):
    """A tag for each word."""

    model_class = TokenClassificationModel
    usual_metric = "f1"
    per_token = True

    def find_labels(self, records: Records) -> tuple[str, ...]:
        """The tags that occur."""
        assert self.label is not None
        return find_tags(records, self.label)

    def arguments(self) -> dict[str, Any]:
        """Labels."""
        return {"labels": self.labels}

    def compile_arguments(self, examples: Examples) -> dict[str, Any]:
        """Label smoothing and class weights."""
        assert isinstance(examples.labels, Ragged)
        assert isinstance(examples.weights, Ragged)
        rows = range(len(examples))
        labels = np.concatenate([examples.labels[row][examples.weights[row] > 0.0] for row in rows])
        return {"label_smoothing": self.config.label_smoothing, "class_weights": self._class_weights(labels)}

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Examples:
        """Words with spaces between them."""
        assert self.label is not None
        return encode_tags(
            records, tokenizer, tokens=self.text, tags=self.label, labels=self.labels, max_length=max_length
        )

    def scores(self, examples: TagExamples, outputs: Outputs) -> Scores:
        """seqeval's F1 of entities."""
        assert isinstance(examples.labels, Ragged)
        rows = [examples.labels[number] for number in range(len(examples))]
        return entity_scores(examples.tags(rows, self.labels), self._tags(examples, outputs))

    def predictions(self, examples: TagExamples, outputs: Outputs) -> list[dict[str, Any]]:
        """The tags of each record's words."""
        return [{"prediction": tags} for tags in self._tags(examples, outputs)]

    def _tags(self, examples: TagExamples, outputs: Outputs) -> list[list[str]]:
        return examples.tags([row.argmax(axis=1) for row in outputs], self.labels)


class FindAnswers(EncoderRecipe):
    """An answer to a question, found in a text."""

    model_class = QuestionAnsweringModel
    usual_metric = "f1"
    per_token = True

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Examples:
        """Windows of the context, the question in each."""
        assert self.pair is not None
        assert self.label is not None
        stride = min(_STRIDE, max_length // 3) if self.config.stride is None else self.config.stride
        return encode_answers(
            records,
            tokenizer,
            question=self.text,
            context=self.pair,
            answers=self.label,
            max_length=max_length,
            stride=stride,
        )

    def scores(self, examples: AnswerExamples, outputs: Outputs) -> Scores:
        """SQuAD's exact match and F1."""
        return answer_scores([best[0].text for best in self._answers(examples, outputs, 1)], examples.gold)

    def predictions(self, examples: AnswerExamples, outputs: Outputs) -> list[dict[str, Any]]:
        """The best answer of each record; the others too if more are asked for."""
        n_best = self.config.n_best
        return [
            {"prediction": best[0].text, "score": best[0].score, "start": best[0].start, "end": best[0].end}
            | ({"n_best": [answer._asdict() for answer in best]} if n_best > 1 else {})
            for best in self._answers(examples, outputs, n_best)
        ]

    def _answers(self, examples: AnswerExamples, outputs: Outputs, n_best: int) -> list[list[Any]]:
        threshold = self.config.no_answer_threshold
        if threshold is None and not all(examples.gold):
            threshold = 0.0
        return examples.answers(
            outputs,
            max_answer_length=self.config.max_answer_length,
            n_best=n_best,
            no_answer_threshold=threshold,
        )


class Embed(EncoderRecipe):
    """Vectors of texts, near to each other for texts that mean the same."""

    model_class = EmbeddingModel

    @property
    def metric(self) -> str:
        """Spearman's correlation of cosines and scores; without scores, how often the own second text is nearest."""
        return self.config.metric or ("accuracy" if self.label is None else "spearman")

    def arguments(self) -> dict[str, Any]:
        """Pooling and objective."""
        return {
            "pooling": self.config.pooling,
            "objective": "contrastive" if self.label is None else "cosine",
            "temperature": self.config.temperature,
        }

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Examples:
        """Both texts of each record."""
        assert self.pair is not None
        return encode_similar(
            records,
            tokenizer,
            text=self.text,
            pair=self.pair,
            score=self.label,
            max_score=self.config.max_score,
            max_length=max_length,
        )

    def outputs(self, model: TaskModel, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """Vectors of both texts: [B, 2, D]."""
        names = ("token_ids", "padding_mask")
        texts = [{name: inputs[before + name] for name in names} for before in ("", "pair_")]
        return tf.stack([model(text, training=False) for text in texts], axis=1)

    def scores(self, examples: Examples, outputs: Outputs) -> Scores:
        """Correlations of cosines with scores; without scores, how often the own second text is nearest."""
        vectors = np.asarray(outputs)
        if self.label is None:
            return retrieval_scores(vectors[:, 0], vectors[:, 1])
        return regression_scores(np.asarray(examples.labels), _cosines(vectors))

    def predictions(self, examples: Examples, outputs: Outputs) -> list[dict[str, Any]]:
        """The cosine of each pair."""
        return [{"prediction": cosine} for cosine in _cosines(np.asarray(outputs)).tolist()]


RECIPES: dict[str, type[TaskRecipe]] = {
    "classify": Classify,
    "multilabel": MultiLabel,
    "regress": Regress,
    "tag": Tag,
    "answer": FindAnswers,
    "embed": Embed,
    "text-to-text": TextToText,
}


def load_finetuned(directory: Path, *, dtype: Any = None) -> tuple[str, FinetunedModel]:
    """The task that a checkpoint was trained for, and its model.

    Raises:
        ValueError: no task that can be evaluated trains such models.
    """
    if issubclass(find_architecture(directory), Seq2SeqLM):
        return "text-to-text", load_pretrained(directory, dtype=dtype)
    model = load_task(directory, dtype=dtype)
    problem = getattr(model, "problem", None)
    for name, recipe in RECIPES.items():
        is_class = issubclass(recipe, EncoderRecipe) and isinstance(model, recipe.model_class)
        if is_class and problem == getattr(recipe, "problem", None):
            return name, model
    raise ValueError(f"{directory} holds a {type(model).__name__}, which is of no task that can be evaluated.")


def _softmax(outputs: Outputs) -> np.ndarray:
    logits = np.asarray(outputs)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _cosines(vectors: np.ndarray) -> np.ndarray:
    """[N, 2, D] -> [N]."""
    lengths = np.linalg.norm(vectors, axis=2).prod(axis=1)
    return (vectors[:, 0] * vectors[:, 1]).sum(axis=1) / np.maximum(lengths, 1e-12)
