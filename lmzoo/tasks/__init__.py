"""Fine-tuning tasks: a head on any encoder, with its objective."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lmzoo import checkpoints
from lmzoo.models import find_architecture
from lmzoo.tasks import sentence_files
from lmzoo.tasks.answers import QuestionAnsweringModel as QuestionAnsweringModel
from lmzoo.tasks.base import TaskModel as TaskModel
from lmzoo.tasks.classification import SequenceClassificationModel as SequenceClassificationModel
from lmzoo.tasks.classification import TokenClassificationModel as TokenClassificationModel
from lmzoo.tasks.embeddings import EmbeddingModel as EmbeddingModel

TASKS: dict[str, type[TaskModel]] = {
    "sequence": SequenceClassificationModel,
    "tokens": TokenClassificationModel,
    "answers": QuestionAnsweringModel,
    "embeddings": EmbeddingModel,
}
"""Name of a task -> its model class."""


def find_task(directory: str | os.PathLike[str]) -> type[TaskModel]:
    """The task that the checkpoint in `directory` was trained for, by its config.json or by modules.json.

    Raises:
        CheckpointError: it cannot be read, or is of none of these tasks.
    """
    if (Path(directory) / sentence_files.MODULES).is_file():
        return EmbeddingModel
    encoder_class = find_architecture(directory)
    names = checkpoints.read_config(directory).get("architectures") or []
    classes = {}
    if hasattr(encoder_class, "task_heads"):
        classes = {task.class_name(encoder_class): task for task in TASKS.values()}
    for name in names:
        if name in classes:
            return classes[name]
    raise checkpoints.CheckpointError(
        f"{directory} holds {', '.join(names) or 'a checkpoint that names no class'}, which is no model of a task; "
        f"known: {', '.join(classes) or 'none of its architecture'}. Read it with from_pretrained of the class that it "
        "is meant for."
    )


def load_task(directory: str | os.PathLike[str], *, dtype: Any = None) -> TaskModel:
    """A model of whatever task the checkpoint in `directory` was trained for; see `TaskModel.from_pretrained`."""
    return find_task(directory).from_pretrained(directory, dtype=dtype)
