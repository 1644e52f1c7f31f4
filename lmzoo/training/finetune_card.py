"""What a fine-tuned checkpoint says of itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from lmzoo.checkpoints import Metric, ModelCard
from lmzoo.training.finetune_settings import FREE_SETTINGS, FinetuneConfig
from lmzoo.training.metrics import Scores


def make_card(config: FinetuneConfig, scores: Mapping[str, Scores] | None = None) -> ModelCard:
    """The card of a run's model, with its scores on each part once they are known."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_SETTINGS}
    return ModelCard(
        name=Path(config.directory).resolve().name,
        datasets=config.train,
        base_model=Path(config.model).resolve().name,
        recipe=json.loads(json.dumps(settings, default=str)),
        metrics=[
            Metric(name=name, value=value, dataset=", ".join(getattr(config, part) or config.train), split=part)
            for part, values in (scores or {}).items()
            for name, value in values.items()
        ],
    )
