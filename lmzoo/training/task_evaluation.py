"""How good a fine-tuned checkpoint is on labelled examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lmzoo import checkpoints
from lmzoo.data.records import read_records
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.training.finetune_settings import FinetuneConfig
from lmzoo.training.finetune_tasks import RECIPES, load_finetuned
from lmzoo.training.metrics import Scores
from lmzoo.training.prediction import Predictor


def evaluate_task(
    model: str | os.PathLike[str],
    sources: Sequence[str],
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    max_score: float = 1.0,
    max_length: int | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    **writing: Any,
) -> Scores:
    """Scores a fine-tuned checkpoint on labelled examples.

    Args:
        model: directory of a checkpoint, or of a run (its best checkpoint is taken).
        sources, text, pair, label, max_score, max_length: as in `FinetuneConfig`.
        batch_size: examples a batch.
        dtype: Keras dtype or policy of the computation.
        writing: prefix, max_target_length, max_new_tokens, num_beams and length_penalty of a text-to-text task, as in
            `FinetuneConfig`.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or a source cannot be read, or they do not belong together.
    """
    directory = checkpoints.find_checkpoint(model)
    task, loaded = load_finetuned(directory, dtype=dtype)
    config = FinetuneConfig(
        model=directory,
        task=task,  # type: ignore[arg-type]
        train=tuple(sources),
        labels=tuple(getattr(loaded, "labels", ())),
        text=text,
        pair=pair,
        label=label,
        max_score=max_score,
        max_length=max_length,
        **writing,
    )
    records = read_records(sources)
    recipe = RECIPES[config.task](config, records)
    tokenizer = Tokenizer.from_pretrained(directory)
    examples = recipe.encode(records, tokenizer, recipe.longest(directory))
    predictor = Predictor(loaded, recipe.outputs, batch_size=batch_size)
    return recipe.scores(examples, predictor(examples, recipe.per_token))
