"""What an artefact gives and costs, measured in a process of its own: `python -m lmzoo.export.measuring REQUEST`."""

from __future__ import annotations

import json
import math
import pkgutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lmzoo.export.artefacts import Artefact, Stopwatch, open_artefact
from lmzoo.files import write_whole

Request = dict[str, Any]
_NEW_TOKENS = 32


def measure(artefact: Artefact, request: Request) -> dict[str, Any]:
    """What is measured of an artefact, by name.

    Args:
        artefact: is asked.
        request: `rows`, what to ask; `writes`, whether the model writes texts; `directory` of the reference's answers;
            `is_reference`, whether this artefact's answers become them.
    """
    comparison = _Comparison(Path(request["directory"]), request["is_reference"])
    measured = (
        _measure_writer(artefact, request["rows"], comparison)
        if request["writes"]
        else _measure_reader(artefact, request["rows"], comparison)
    )
    return {
        "artefact": str(artefact.path),
        "kind": artefact.kind,
        "max_difference": comparison.max_difference,
        "agreement": comparison.agreement,
        **measured,
        "size_bytes": artefact.size_bytes,
        "peak_bytes": _peak_bytes(),
    }


class _Comparison:
    """Keeps the answers of the reference in files, and compares those of another artefact with them."""

    def __init__(self, directory: Path, is_reference: bool) -> None:
        self._directory, self._is_reference = directory, is_reference
        self.max_difference = 0.0
        self._num_same = self._num_choices = 0

    @property
    def agreement(self) -> float | None:
        """Share of the choices (the most likely token or label) that are the reference's; None if there are none."""
        return self._num_same / self._num_choices if self._num_choices else None

    def add(self, name: str, answer: np.ndarray, chooses: bool) -> None:
        file = self._directory / f"{name}.npy"
        if self._is_reference:
            np.save(file, answer)
        expected = np.load(file)
        if answer.shape != expected.shape:
            raise ValueError(
                f"the artefact answers with shape {answer.shape}, but the checkpoint with {expected.shape}."
            )
        difference = np.max(np.abs(answer.astype(np.float64) - expected), initial=0.0)
        self.max_difference = float(max(self.max_difference, difference))  # NaN stays.
        if chooses:
            same = np.argmax(answer, -1) == np.argmax(expected, -1)
            self._num_same, self._num_choices = self._num_same + int(same.sum()), self._num_choices + same.size


def _measure_writer(artefact: Artefact, rows: list[dict[str, Any]], comparison: _Comparison) -> dict[str, Any]:
    loss, count = 0.0, 0
    for number, row in enumerate(rows):
        logits, labels = artefact.logits(row["source"], row["tokens"]), row["tokens"][1:]
        comparison.add(str(number), logits, True)
        scores = logits.astype(np.float64)
        highest = scores.max(-1)
        log_totals = highest + np.log(np.exp(scores - highest[:, None]).sum(-1))
        loss += float((log_totals - scores[np.arange(len(labels)), labels]).sum())
        count += len(labels)
    prompt = rows[0]["tokens"]
    tokens = prompt[: 1 if rows[0]["source"] else max(1, len(prompt) - _NEW_TOKENS)]
    first, each = artefact.seconds(rows[0]["source"], tokens, min(_NEW_TOKENS, len(prompt) - 1))
    return {"perplexity": math.exp(min(loss / count, 700.0)), "first_token_seconds": first, "seconds_per_token": each}


def _measure_reader(artefact: Artefact, rows: list[dict[str, Any]], comparison: _Comparison) -> dict[str, Any]:
    watch, seconds = Stopwatch(), []
    for number, row in enumerate(rows):
        watch.lap()
        output = artefact.output(row["token_ids"], row["token_type_ids"])
        seconds.append(watch.lap())
        comparison.add(str(number), output, row["chooses"])
    return {"perplexity": None, "first_token_seconds": float(np.median(seconds)), "seconds_per_token": None}


def _peak_bytes() -> int | None:
    """The most memory that this process has held; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main(request_file: str) -> None:
    """Does what a request says, and writes the result beside it.

    `artefact` in the request is the path, and `opener`, if it is there, what opens it ("module:name").
    """
    file = Path(request_file)
    request = json.loads(file.read_text())
    opener = pkgutil.resolve_name(request["opener"]) if "opener" in request else open_artefact
    write_whole(file.with_suffix(".result"), json.dumps(measure(opener(request["artefact"]), request)))


if __name__ == "__main__":
    main(sys.argv[1])
