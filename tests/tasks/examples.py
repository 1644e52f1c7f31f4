"""A small model and a batch of each task."""

from __future__ import annotations

import numpy as np
import pytest

from lmzoo.models import ARCHITECTURES
from lmzoo.tasks import EmbeddingModel, QuestionAnsweringModel, SequenceClassificationModel, TokenClassificationModel

WITH_HEADS = tuple(name for name, model_class in ARCHITECTURES.items() if hasattr(model_class, "task_heads"))
LABELS = ("red", "green", "blue")
# Name -> the class, its arguments, and how labels [B] or [B, T] are drawn.
TASKS = {
    "single_label": (SequenceClassificationModel, {"labels": LABELS}),
    "multi_label": (SequenceClassificationModel, {"labels": LABELS, "problem": "multi_label"}),
    "regression": (SequenceClassificationModel, {"problem": "regression"}),
    "tokens": (TokenClassificationModel, {"labels": LABELS}),
    "answers": (QuestionAnsweringModel, {}),
    "cosine": (EmbeddingModel, {}),
    "contrastive": (EmbeddingModel, {"objective": "contrastive", "pooling": "first"}),
}


def quick(*names):
    """Argument values: all tasks, of which the slow suite alone takes those that are not named."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]


def make_task(name, encoder, /, **arguments):
    task_class, usual = TASKS[name]
    return task_class(encoder, **{**usual, **arguments})


def make_batch(name, rows=6, length=9, seed=0):
    """Inputs with padding on the right, labels and weights."""
    random = np.random.default_rng(seed)
    sizes = random.integers(3, length + 1, (rows, 1))
    mask = np.arange(length) < sizes
    inputs = {"token_ids": random.integers(2, 61, (rows, length)).astype("int32"), "padding_mask": mask}
    weights = random.integers(1, 4, rows).astype("float32")
    if name == "single_label":
        labels = random.integers(0, 3, rows).astype("int32")
    elif name == "multi_label":
        labels = random.integers(0, 2, (rows, 3)).astype("float32")
    elif name == "regression":
        labels = random.normal(size=(rows, 1)).astype("float32")
    elif name == "tokens":
        labels = random.integers(0, 3, (rows, length)).astype("int32")
        weights = weights[:, None] * mask
    elif name == "answers":
        labels = random.integers(0, sizes, (rows, 2)).astype("int32")
    else:
        inputs["pair_token_ids"] = random.integers(2, 61, (rows, 7)).astype("int32")
        inputs["pair_padding_mask"] = np.arange(7) < random.integers(2, 8, (rows, 1))
        labels = random.uniform(-1, 1, rows).astype("float32")
    return inputs, labels, weights


def loss_of(model, inputs, labels, weights):
    value, weight = model.compute_sums(inputs, labels, weights, training=False)["loss"]
    return float(value / weight)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
