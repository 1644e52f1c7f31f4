"""The files by which sentence-transformers puts a model of sentence embeddings together, beside its checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lmzoo import checkpoints
from lmzoo.files import write_whole

MODULES = "modules.json"
_POOLING = "1_Pooling"
_LIBRARY = "sentence_transformers.models"
# Ours -> the flag and the mode of the library.
_POOLINGS = {"mean": ("pooling_mode_mean_tokens", "mean"), "first": ("pooling_mode_cls_token", "cls")}
_KNOWN_MODULES = {"Transformer", "Pooling", "Normalize"}


def read(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What the files say: {"pooling": ..., "normalize": ...}; nothing if there are none.

    Raises:
        CheckpointError: they ask for a module or a kind of pooling that there is not.
    """
    directory = Path(directory)
    if not (directory / MODULES).is_file():
        return {}
    try:
        modules = json.loads((directory / MODULES).read_text(encoding="utf-8"))
        paths = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    except (ValueError, TypeError, KeyError) as error:
        raise checkpoints.CheckpointError(f"{directory / MODULES} is not a list of modules: {error!r}.") from None
    unknown = sorted(set(paths) - _KNOWN_MODULES)
    if unknown or "Pooling" not in paths:
        raise checkpoints.CheckpointError(
            f"{directory / MODULES} lists {', '.join(paths)}, but only a Transformer with a Pooling and perhaps a "
            "Normalize can be read."
        )
    values = checkpoints.read_config(directory / paths["Pooling"])
    used = {name for name, value in values.items() if name.startswith("pooling_mode_") and value is True}
    for pooling, (flag, mode) in _POOLINGS.items():
        if used == {flag} or (not used and values.get("pooling_mode") == mode):
            return {"pooling": pooling, "normalize": "Normalize" in paths}
    asked = ", ".join(sorted(used)) or values.get("pooling_mode")
    raise checkpoints.CheckpointError(
        f"{directory / paths['Pooling']} asks for {asked}, but there is only pooling by mean or by the first token."
    )


def write(directory: str | os.PathLike[str], config: Any, pooling: str, normalize: bool) -> None:
    """Writes the files beside a checkpoint; `config` is the encoder's."""
    directory = Path(directory)
    paths = {"Transformer": "", "Pooling": _POOLING}
    if normalize:
        paths["Normalize"] = "2_Normalize"
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_LIBRARY}.{kind}"}
        for number, (kind, path) in enumerate(paths.items())
    ]
    flags = {flag: name == pooling for name, (flag, _) in _POOLINGS.items()}
    for path in paths.values():
        (directory / path).mkdir(exist_ok=True)
    _write_json(directory / _POOLING / "config.json", {"word_embedding_dimension": config.model_dim, **flags})
    _write_json(
        directory / "sentence_bert_config.json", {"max_seq_length": config.context_length, "do_lower_case": False}
    )
    _write_json(directory / MODULES, modules)


def _write_json(file: Path, value: Any) -> None:
    write_whole(file, json.dumps(value, indent=2) + "\n")
