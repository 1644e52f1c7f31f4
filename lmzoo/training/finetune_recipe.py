"""What differs between fine-tuning tasks: labels, examples, model, scores, and what is written of predictions."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from lmzoo import checkpoints
from lmzoo.data.labelled import Examples
from lmzoo.data.records import Records
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import LanguageModel, find_architecture
from lmzoo.tasks import TaskModel
from lmzoo.training.finetune_settings import FinetuneConfig
from lmzoo.training.metrics import Scores

Outputs = Sequence[np.ndarray]
FinetunedModel = TaskModel | LanguageModel


class TaskRecipe(ABC):
    """A task, for the settings of a run; knows how such a model is made, and nothing of what it is.

    Args:
        config: the settings.
        records: the training part, for tasks with labels that the settings do not name; none if the model has them.
    """

    usual_metric: ClassVar[str]
    per_token: ClassVar[bool] = False

    def __init__(self, config: FinetuneConfig, records: Records | None) -> None:
        self.config = config
        self.text, self.pair, self.label = config.fields
        self.labels: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """Name of the score that the best epoch is chosen by."""
        return self.config.metric or self.usual_metric

    def rank(self, scores: Scores) -> float:
        """Lowest for the best scores.

        Raises:
            ValueError: there is no score of the name that the settings give.
        """
        if self.metric not in scores:
            raise ValueError(f"FinetuneConfig.metric is {self.metric!r}, but must be one of {', '.join(scores)}.")
        value = scores[self.metric]
        return value if self.metric in ("loss", "mse") else -value

    def longest(self, directory: Path) -> int:
        """The most tokens of an example: what the settings say, or what the model of the checkpoint can read."""
        config = find_architecture(directory).read_config(directory)
        return min(self.config.length, int(config.context_length))

    @abstractmethod
    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Examples:
        """Examples of records, of which scores and predictions are made."""

    def encode_training(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Examples:
        """Examples of records to learn from."""
        return self.encode(records, tokenizer, max_length)

    @abstractmethod
    def scores(self, examples: Any, outputs: Outputs) -> Scores:
        """Scores of what the model gave for the examples."""

    @abstractmethod
    def predictions(self, examples: Any, outputs: Outputs) -> list[dict[str, Any]]:
        """What is written down for each record."""

    @abstractmethod
    def outputs(self, model: Any, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """What scores and predictions are made of, in a graph: [B, ...], or [B, T, ...] if it is `per_token`."""

    @abstractmethod
    def load(self, directory: Path, **options: Any) -> FinetunedModel:
        """The model to train, from a checkpoint; `options` are those of `from_pretrained`."""

    def make_model(self, say: Callable[[str], None]) -> FinetunedModel:
        """The model to train, with the weights of the checkpoint; what it lacks is new, and told."""
        given = {} if self.config.dropout_rate is None else {"dropout_rate": self.config.dropout_rate}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = self.load(checkpoints.find_checkpoint(self.config.model), dtype=self.config.dtype, **given)
        for warning in told:
            say(str(warning.message))
        return model

    def generation_config(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Content of generation_config.json of a checkpoint, for a model that writes texts; else nothing."""
        return {}

    @abstractmethod
    def readme(self, model: Any, config: Mapping[str, Any]) -> str:
        """Content of README.md of a checkpoint with this config.json; see `lmzoo.models.describe`."""

    def optimizer_arguments(self, model: Any) -> dict[str, Any]:
        """Of `make_optimizer`, beside what all tasks give it."""
        return {}

    def compile_arguments(self, examples: Examples) -> dict[str, Any]:
        """Of the model's `compile`."""
        return {}
