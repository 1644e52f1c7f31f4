"""Are artefacts still the model that they were made of, and what do they cost? Each is run in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lmzoo.checkpoints import find_checkpoint
from lmzoo.data.sources import read_documents
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.export.artefacts import find_saved_model, is_tflite
from lmzoo.files import write_whole
from lmzoo.models import CausalLM, Seq2SeqLM, find_architecture
from lmzoo.tasks import EmbeddingModel
from lmzoo.training.keras_artefact import KerasArtefact, load_model

PathLike = str | os.PathLike[str]


class UsageError(ValueError):
    """What was asked for makes no sense, as against an artefact that failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an artefact may be from its checkpoint.

    Args:
        max_difference: the most that a logit, or a number of an embedding, may differ; None is any.
        min_agreement: least share of places where the most likely token or label is the same.
        max_perplexity_change: the most that perplexity may grow, as a share of it.
    """

    max_difference: float | None
    min_agreement: float
    max_perplexity_change: float

    def problems(self, result: dict[str, Any]) -> list[str]:
        """What is past the tolerance in the measurements of an artefact, in words."""
        difference, agreement, change = (result[name] for name in ("max_difference", "agreement", "perplexity_change"))
        found = []
        if not np.isfinite(difference) or (self.max_difference is not None and difference > self.max_difference):
            found.append(f"outputs differ by {difference:.3g}, more than {self.max_difference}")
        if agreement is not None and agreement < self.min_agreement:
            found.append(f"{agreement:.2%} of the choices agree, less than {self.min_agreement:.2%}")
        if change is not None and not change <= self.max_perplexity_change:
            found.append(f"perplexity is {change:+.2%} worse, more than {self.max_perplexity_change:.2%}")
        return found


_SAME = Tolerance(max_difference=1e-3, min_agreement=0.999, max_perplexity_change=1e-4)
TOLERANCES = {
    "Keras": _SAME,
    "SavedModel": _SAME,
    "TFLite float32": _SAME,
    "TFLite float16": Tolerance(max_difference=None, min_agreement=0.98, max_perplexity_change=1e-3),
    "TFLite int8": Tolerance(max_difference=None, min_agreement=0.9, max_perplexity_change=0.01),
    "TFLite int8-full": Tolerance(max_difference=None, min_agreement=0.6, max_perplexity_change=0.1),
    "TFLite int4": Tolerance(max_difference=None, min_agreement=0.7, max_perplexity_change=0.1),
}
"""Kind of an artefact -> what it may lose, unless a call says otherwise."""

# Figure -> its heading in the table, what it is multiplied with there, and how it is written.
_FIGURES = {
    "max_difference": ("largest difference", 1.0, "{:.2g}"),
    "agreement": ("agreement", 1.0, "{:.2%}"),
    "perplexity": ("perplexity", 1.0, "{:.3f}"),
    "perplexity_change": ("its change", 1.0, "{:+.3%}"),
    "first_token_seconds": ("first token", 1e3, "{:.2f} ms"),
    "seconds_per_token": ("each token", 1e3, "{:.2f} ms"),
    "size_bytes": ("size", 1e-6, "{:,.1f} MB"),
    "peak_bytes": ("memory", 1e-6, "{:,.0f} MB"),
}


def verify(
    artefacts: Sequence[PathLike],
    against: PathLike,
    *,
    text: str = "pydoc",
    num_tokens: int = 512,
    length: int = 64,
    max_difference: float | None = None,
    min_agreement: float | None = None,
    max_perplexity_change: float | None = None,
) -> list[dict[str, Any]]:
    """Measures a checkpoint and its artefacts on a text, one after the other, each in a process of its own.

    A model that writes texts is told every token of the text and asked for the next one; one that answers texts gets
    the first half of a row as its source and is told the second. Any other model reads one text after the other.

    Args:
        artefacts: .tflite files, SavedModels or directories of their versions, checkpoints and runs.
        against: the checkpoint or run that they were made of.
        text: a source of text, as `lmzoo.data.sources` reads it.
        num_tokens: how many tokens of it.
        length: tokens a row.
        max_difference, min_agreement, max_perplexity_change: as in `Tolerance`, for all artefacts; None leaves what
            `TOLERANCES` says for the kind of each.

    Returns:
        For the checkpoint and then for each artefact, by name: `artefact`, `kind`, `max_difference`, `agreement`,
        `perplexity`, `perplexity_change` (a share of the checkpoint's), `first_token_seconds`, `seconds_per_token`,
        `size_bytes`, `peak_bytes` (of the process), and `problems`, what is past the tolerance. What does not apply is
        None; a model that only reads has the seconds of a whole text in `first_token_seconds`.

    Raises:
        UsageError: an artefact is of no kind that is known, a number is out of range, or the text is too short.
        CheckpointError, FileNotFoundError: the checkpoint or the text cannot be read.
        ChildProcessError: an artefact could not be run.
    """
    if length < 4 or num_tokens < length:
        raise UsageError(f"length is {length} and num_tokens {num_tokens}, but must be 4 or more, and no less than it.")
    paths = [Path(artefact) for artefact in artefacts]
    for artefact in paths:
        if not is_tflite(artefact) and find_saved_model(artefact) is None and not _is_keras(artefact):
            raise UsageError(f"{artefact} is neither a .tflite file nor a SavedModel nor a checkpoint.")
    directory = find_checkpoint(against)
    questions = _questions(directory, read_documents(text), num_tokens, length)
    given = {
        name: value
        for name, value in (
            ("max_difference", max_difference),
            ("min_agreement", min_agreement),
            ("max_perplexity_change", max_perplexity_change),
        )
        if value is not None
    }
    with tempfile.TemporaryDirectory() as place:
        request = {**questions, "directory": place}
        results = [_ask({**request, "artefact": str(directory), "is_reference": True})]
        expected = results[0]["perplexity"]
        for artefact in paths:
            result = _ask({**request, "artefact": str(artefact), "is_reference": False})
            results.append(result)
        for result in results:
            result["perplexity_change"] = None if expected is None else result["perplexity"] / expected - 1.0
            result["problems"] = dataclasses.replace(TOLERANCES[result["kind"]], **given).problems(result)
    return results


def write_report(results: list[dict[str, Any]], file: Path) -> None:
    """Writes the results of `verify` as JSON."""
    write_whole(file, json.dumps(results, indent=2) + "\n")


def print_report(results: list[dict[str, Any]]) -> None:
    """Prints the results of `verify` as a table, an artefact a column, and what is past the tolerance below it."""
    table = Table("", *(f"{result['kind']}\n{Path(result['artefact']).name}" for result in results))
    for name, (heading, scale, text) in _FIGURES.items():
        values = (result[name] for result in results)
        table.add_row(heading, *("-" if value is None else text.format(scale * value) for value in values))
    console = Console(soft_wrap=True)
    console.print(table)
    for result in results:
        for problem in result["problems"]:
            console.print(f"{result['artefact']}: {problem}.")


# -- The questions.


def _questions(directory: Path, documents: Iterable[str], num_tokens: int, length: int) -> dict[str, Any]:
    """What all artefacts are asked: whether they write, and the rows."""
    model_class, tokenizer = find_architecture(directory), Tokenizer.from_pretrained(directory)
    context_length = model_class.read_config(directory).context_length
    if length > context_length:
        raise UsageError(f"length is {length}, but the model reads {context_length} tokens (context_length).")
    if not issubclass(model_class, CausalLM | Seq2SeqLM):
        return {"writes": False, "rows": _texts(directory, tokenizer, documents, num_tokens // length, length)}
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer.encode(document)
        if len(tokens) >= num_tokens:
            break
    pieces = [tokens[start : start + length] for start in range(0, min(num_tokens, len(tokens)) - length + 1, length)]
    if not pieces:
        raise UsageError(f"the text has {len(tokens)} tokens, fewer than a row of {length}: give a longer text.")
    if issubclass(model_class, CausalLM):
        return {"writes": True, "rows": [{"source": [], "tokens": piece} for piece in pieces]}
    start, half = model_class.read_config(directory).start_token_id, length // 2
    return {"writes": True, "rows": [{"source": piece[:half], "tokens": [start, *piece[half:]]} for piece in pieces]}


def _texts(
    directory: Path, tokenizer: Tokenizer, documents: Iterable[str], count: int, length: int
) -> list[dict[str, Any]]:
    texts = [text for text, _ in zip(documents, range(count), strict=False)]
    encodings = tokenizer.encode_pairs(texts, max_length=length)
    chooses = not isinstance(load_model(directory), EmbeddingModel)
    columns = zip(encodings.token_ids, encodings.token_type_ids, strict=True)
    return [
        {"token_ids": list(map(int, ids)), "token_type_ids": list(map(int, types)), "chooses": chooses}
        for ids, types in columns
    ]


# -- The processes.


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """The measurements of one artefact, from a process of its own."""
    file = Path(request["directory"]) / "request.json"
    if _is_keras(Path(request["artefact"])):
        request = {**request, "opener": f"{KerasArtefact.__module__}:{KerasArtefact.__name__}"}
    file.write_text(json.dumps(request))
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "lmzoo.export.measuring", str(file)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ChildProcessError(f"{request['artefact']} could not be run (status {done.returncode}): {reason[0]}")
    return json.loads(file.with_suffix(".result").read_text())


def _is_keras(path: Path) -> bool:
    return any((path / part / "config.json").is_file() for part in ("", "best", "last"))
