"""What a pretrained checkpoint says of itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lmzoo.checkpoints import Metric, ModelCard
from lmzoo.training.evaluation import Evaluation
from lmzoo.training.settings import FREE_SETTINGS, PretrainConfig


def make_card(
    config: PretrainConfig, scores: Evaluation | None = None, unigram_entropy: float | None = None
) -> ModelCard:
    """The card of a run's model, with its scores on the held-out text once they are known."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_SETTINGS}
    sources = config.source if config.corpus is None else (Path(config.corpus).name,)
    metrics: dict[str, float | None] = {}
    if scores is not None:
        metrics = {**scores.as_record(), "unigram_entropy": unigram_entropy}
    return ModelCard(
        name=Path(config.directory).resolve().name,
        datasets=sources,
        recipe=json.loads(json.dumps(settings, default=str)),
        metrics=[
            Metric(name=name, value=value, dataset=", ".join(sources), split="validation")
            for name, value in metrics.items()
            if value is not None
        ],
    )
