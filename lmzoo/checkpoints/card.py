"""Model cards: the README.md of a checkpoint, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

README = "README.md"
_MARK = "<!-- lmzoo writes this file with the weights. Remove this line, and it is yours. -->"

# What YAML does not take as it is between double quotes, or folds.
_UNPRINTABLE = re.compile("[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured result.

    Args:
        name: of the metric, such as "accuracy".
        value: a finite number.
        dataset: what was measured on.
        split: part of the dataset, such as "test".
        task: as the hub names it, such as "text-classification"; None is what the model does.
    """

    name: str
    value: float
    dataset: str
    split: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise ValueError(f"metric {self.name!r} is {self.value!r}, but must be a finite number.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model does not know about itself: where it comes from, and how good it is.

    Args:
        name: heading of the card; None is the name of the model's class.
        license: identifier of the hub, such as "apache-2.0".
        language: codes such as "en"; one or several.
        tags: more tags for the hub's search.
        datasets: what the model was trained on, as the hub names it.
        base_model: what it was fine-tuned from.
        recipe: settings of the training, as JSON can hold them.
        metrics: what was measured.
    """

    name: str | None = None
    license: str | None = None
    language: str | Sequence[str] | None = None
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()
    base_model: str | None = None
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Sequence[Metric] = ()

    def render(
        self, *, name: str, task: str, library: str, tags: Sequence[str], facts: Mapping[str, str], usage: str
    ) -> str:
        """Content of README.md.

        Args:
            name: heading where the card has none.
            task: what the model does, as the hub names it.
            library: whose layout the checkpoint has, as the hub names it.
            tags: before the card's own.
            facts: rows of a table about the model.
            usage: Markdown that shows how to use it.
        """
        name = self.name or name
        front = {
            "license": self.license,
            "language": self.language,
            "library_name": library,
            "pipeline_tag": task,
            "tags": list(dict.fromkeys((*tags, *self.tags))),
            "datasets": list(self.datasets),
            "base_model": self.base_model,
            "model-index": [{"name": name, "results": self._results(task)}] if self.metrics else None,
        }
        sections = {
            "Model": _table(("", ""), facts.items()),
            "Training data": "\n".join(f"- {_one_line(dataset)}" for dataset in self.datasets),
            "Training": self._training(),
            "Evaluation": _table(
                ("Metric", "Value", "Dataset", "Split"),
                [(each.name, f"{each.value:.6g}", each.dataset, each.split or "") for each in self.metrics],
            ),
            "How to use": usage,
        }
        return "\n".join(
            [
                "---",
                *(f"{key}: {_yaml(value)}" for key, value in front.items() if value),
                "---",
                "",
                _MARK,
                "",
                f"# {_one_line(name)}",
                *(f"\n## {title}\n\n{text}" for title, text in sections.items() if text),
                "",
            ]
        )

    def _results(self, task: str) -> list[dict[str, Any]]:
        """The results as the hub's `model-index` holds them: one for each task and part of a dataset."""
        results: dict[tuple[str, str, str | None], list[Metric]] = {}
        for metric in self.metrics:
            results.setdefault((metric.task or task, metric.dataset, metric.split), []).append(metric)
        return [
            {
                "task": {"type": task},
                "dataset": {"name": dataset, "type": dataset} | ({"split": split} if split else {}),
                "metrics": [{"type": metric.name, "value": metric.value} for metric in metrics],
            }
            for (task, dataset, split), metrics in results.items()
        ]

    def _training(self) -> str:
        parts = [f"Fine-tuned from {_one_line(self.base_model)}."] if self.base_model else []
        if self.recipe:
            parts.append(f"```json\n{json.dumps(dict(self.recipe), indent=2, default=str)}\n```")
        return "\n\n".join(parts)


def is_ours(file: Path) -> bool:
    """Whether a card may be written to `file`: there is none, or one that nobody has made his own."""
    try:
        return _MARK.encode() in file.read_bytes()
    except FileNotFoundError:
        return True


def _yaml(value: Any) -> str:
    """A value as JSON that every reader of YAML takes for the same."""
    text = json.dumps(value, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _table(head: Sequence[str], rows: Any) -> str:
    """A table of Markdown; nothing without rows."""
    lines = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)) if lines else ""
