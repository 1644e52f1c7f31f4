"""Training checkpoints: a directory a step, whole or not there, in the Hugging Face layout with the rest beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors.numpy

from lmzoo.models import LanguageModel

_STATE = "training_state.safetensors"
_PROGRESS = "training.json"
_NAME = re.compile(r"step-(\d{8})")


class DamagedCheckpointError(ValueError):
    """A checkpoint whose files are not those that were written."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where training stands.

    Args:
        step: optimizer steps done.
        next_example: index of the first example that has not been trained on.
        validation_loss: mean loss at this step, None if it was not evaluated.
        best_step: step with the lowest validation loss so far, None if none was evaluated.
        best_loss: that loss.
    """

    step: int = 0
    next_example: int = 0
    validation_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None


class CheckpointStore:
    """The checkpoints of a run: `<directory>/step-00001000/` and so on.

    Each holds config.json and model.safetensors (so `from_pretrained` and transformers open it), whatever `extras`
    puts beside them, the state of optimizer and random generators, and a manifest with the SHA-256 of every file. It
    is written under a temporary name and renamed when it is whole. The newest `keep` stay, and the best one.

    Args:
        directory: where they lie; made if it is missing.
        keep: how many of the newest to keep, >= 1.
        extras: writes more files (a tokenizer) into a directory.
    """

    def __init__(self, directory: Path, *, keep: int = 2, extras: Callable[[Path], None] | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, but at least 1 checkpoint has to be kept.")
        self.directory = directory
        self.keep = keep
        self.extras = extras

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, model: LanguageModel, progress: Progress) -> Path:
        """Writes a checkpoint, and then removes those that are no longer wanted.

        Raises:
            OSError: it could not be written whole (a full disk, say). The ones before it are as they were.
        """
        target = self.path(progress.step)
        temporary = self.directory / f".{target.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            model.save_pretrained(temporary)
            if self.extras is not None:
                self.extras(temporary)
            state = {name: np.asarray(value, order="C") for name, value in _state(model).items()}
            (temporary / _STATE).write_bytes(safetensors.numpy.save(state))
            manifest = {
                "progress": dataclasses.asdict(progress),
                "optimizer": type(model.optimizer).__name__,
                "sha256": _digests(temporary),
            }
            _write_durably(temporary / _PROGRESS, json.dumps(manifest, indent=2).encode())
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise OSError(
                    error.errno,
                    f"the checkpoint of step {progress.step} could not be written: {error.strerror or error}. "
                    "Those before it are as they were; make room and start again to go on from there.",
                    str(target),
                ) from error
            raise
        self._prune(progress)
        return target

    def restore(self, model: LanguageModel) -> Progress | None:
        """Loads the newest checkpoint that is whole into a model built and compiled like the one saved.

        A damaged one is passed over with a warning that says why.

        Returns:
            Where training stands; None if there is no checkpoint.

        Raises:
            DamagedCheckpointError: there are checkpoints, but none is whole.
        """
        damage = []
        for step in reversed(self.steps()):
            try:
                return self._restore(model, self.path(step))
            except DamagedCheckpointError as error:
                damage.append(str(error))
                warnings.warn(f"{error} Going back to the checkpoint before it.", stacklevel=2)
        if damage:
            raise DamagedCheckpointError(
                f"no checkpoint in {self.directory} is whole: {' '.join(damage)} Remove them to begin anew."
            )
        return None

    def _restore(self, model: LanguageModel, directory: Path) -> Progress:
        manifest = _verified(directory)
        state = safetensors.numpy.load_file(directory / _STATE)
        variables = _state_variables(model)
        optimizer = type(model.optimizer).__name__
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        if manifest["optimizer"] != optimizer or {name: value.shape for name, value in state.items()} != shapes:
            raise ValueError(
                f"{directory} holds the state of {manifest['optimizer']} ({len(state)} variables), but this run trains "
                f"with {optimizer} ({len(variables)} variables): use the settings it was written with."
            )
        model.load_pretrained_weights(directory)
        for name, value in state.items():
            variables[name].assign(value)
        return Progress(**manifest["progress"])

    def _prune(self, progress: Progress) -> None:
        steps = self.steps()
        wanted = {*steps[-self.keep :], progress.best_step}
        for step in steps:
            if step not in wanted:
                # A rename first: a directory that is only half removed must not be taken for a checkpoint.
                doomed = self.directory / f".{self.path(step).name}.old"
                self.path(step).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _state_variables(model: LanguageModel) -> dict[str, Any]:
    """What a checkpoint holds beside the weights: optimizer, loss scale, random generators, and so on."""
    weights = {id(variable) for variable in model.checkpoint_variables().values()}
    others = [variable for variable in model.variables if id(variable) not in weights]
    others += [*model.optimizer.variables, *model.training_state.values()]
    metrics = {id(variable) for metric in model.metrics for variable in metric.variables}
    others = [variable for variable in others if id(variable) not in metrics]
    # By place, and not by path: Keras numbers models through a process, so that paths differ between processes.
    return {f"{number:05d}": variable for number, variable in enumerate(others)}


def _state(model: LanguageModel) -> dict[str, np.ndarray]:
    return {name: keras.ops.convert_to_numpy(variable) for name, variable in _state_variables(model).items()}


def _digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): _digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != _PROGRESS
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _verified(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, once every file has been compared with it."""
    try:
        manifest = json.loads((directory / _PROGRESS).read_bytes())
        expected = manifest["sha256"]
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{directory} has no {_PROGRESS}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{directory / _PROGRESS} is damaged: {error}.") from None
    for name, digest in expected.items():
        path = directory / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing.")
        if _digest(path) != digest:
            raise DamagedCheckpointError(f"{path} is not as it was written: its SHA-256 is another.")
    return manifest
