"""Training checkpoints: a directory a step, whole or not there, in the Hugging Face layout with the rest beside it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
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
import tensorflow as tf

from lmzoo.checkpoints.card import README
from lmzoo.engine.averaging import averaged_weights, swap_averages
from lmzoo.files import point, write_whole
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
        next_example: index of the first example that has not been trained on, of those of its phase.
        replicas: how many devices took part in the newest of these steps.
        validation_loss: mean loss at this step, None if it has not been evaluated.
        best_step: step with the lowest validation loss so far, None if none was evaluated.
        best_loss: that loss, or what the best was chosen by in place of it; lower is better.
        recent_losses: training losses of the newest records, oldest first.
        skipped_examples: what was left out on purpose, as (first index, index after the last) of its phase.
    """

    step: int = 0
    next_example: int = 0
    replicas: int = 1
    validation_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    recent_losses: tuple[float, ...] = ()
    skipped_examples: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """The inverse of `dataclasses.asdict`, from JSON too."""
        skipped = tuple((first, end) for first, end in values.get("skipped_examples", ()))
        return cls(**{**values, "recent_losses": tuple(values.get("recent_losses", ())), "skipped_examples": skipped})

    def evaluated(self, loss: float, rank: float | None = None) -> Progress:
        """The same with the validation loss of this step, or with a `rank` by which the best is chosen instead."""
        rank = loss if rank is None else rank
        if self.best_loss is None or rank < self.best_loss:
            return dataclasses.replace(self, validation_loss=loss, best_step=self.step, best_loss=rank)
        return dataclasses.replace(self, validation_loss=loss)


class CheckpointStore:
    """The checkpoints of a run: `<directory>/checkpoints/step-00001000/` and so on, with links `last` and `best`.

    Each holds config.json and model.safetensors (so `from_pretrained` and transformers open it), whatever `extras`
    puts beside them, the state of optimizer and random generators, and a manifest with the SHA-256 of every file. It
    is written under a temporary name and renamed when it is whole. The newest `keep` stay, and the best one.

    An optimizer that averages the weights has its averages published: they are in model.safetensors, and the weights
    that training goes on from are in the state.

    Args:
        directory: of the run; made if it is missing.
        keep: how many of the newest to keep, >= 1.
        extras: writes more files (a tokenizer) into a directory.
    """

    def __init__(self, directory: Path, *, keep: int = 2, extras: Callable[[Path], None] | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, but at least 1 checkpoint has to be kept.")
        self.run = directory
        self.directory = directory / "checkpoints"
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
            FloatingPointError: a weight is not finite; nothing has been written.
            OSError: it could not be written whole (a full disk, say). The ones before it are as they were.
        """
        target = self.path(progress.step)
        temporary = self.directory / f".{target.name}.tmp"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        try:
            with averaged_weights(model.optimizer):
                _check_finite(model, progress.step)
                self._check_space(model)
                temporary.mkdir()
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
            _write_manifest(temporary, manifest)
            if target.exists():  # Of the same step, from before training was turned back.
                target.rename(self.directory / f".{target.name}.old")
            temporary.rename(target)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the checkpoint of step {progress.step} could not be written: {error.strerror or error}. "
                "Those before it are as they were; make room and start again to go on from there.",
                str(target),
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._settle(progress)
        return target

    def save_evaluation(self, progress: Progress) -> None:
        """Adds the validation loss to the checkpoint of its step, which is there already."""
        directory = self.path(progress.step)
        manifest = json.loads((directory / _PROGRESS).read_bytes())
        _write_manifest(directory, {**manifest, "progress": dataclasses.asdict(progress)})
        self._settle(progress)

    def discard(self, step: int) -> None:
        """Removes the checkpoint of a step that has turned out to be of no use."""
        self.path(step).rename(self.directory / f".{self.path(step).name}.old")
        if steps := self.steps():
            point(self.run / "last", self.path(steps[-1]))
        else:
            (self.run / "last").unlink(missing_ok=True)
            (self.run / "best").unlink(missing_ok=True)
        self._sweep()

    def bytes_needed(self, model: LanguageModel) -> int:
        """Bytes that a checkpoint of a model takes, without what `extras` adds."""
        variables = [*model.checkpoint_variables().values(), *_state_variables(model).values()]
        return sum(math.prod(variable.shape) * tf.as_dtype(variable.dtype).size for variable in variables)

    def missing_bytes(self, model: LanguageModel) -> int:
        """Bytes by which the disk is too small for one more checkpoint; 0 or less if there is room."""
        directory = next(path for path in (self.directory, *self.directory.absolute().parents) if path.is_dir())
        return self.bytes_needed(model) - shutil.disk_usage(directory).free

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
        swap_averages(model.optimizer)  # Those published are the averages.
        return Progress.from_dict(manifest["progress"])

    def _check_space(self, model: LanguageModel) -> None:
        missing = self.missing_bytes(model)
        if missing > 0:
            raise OSError(errno.ENOSPC, f"it needs {missing:,} bytes more than are left on the disk")

    def _settle(self, progress: Progress) -> None:
        """Points the links at the newest and the best, and then removes what is no longer wanted."""
        best = self.path(progress.best_step if progress.best_step is not None else progress.step)
        point(self.run / "last", self.path(progress.step))
        point(self.run / "best", best if best.is_dir() else self.path(progress.step))
        steps = self.steps()
        for step in steps:
            if step not in (*steps[-self.keep :], progress.best_step):
                # A rename first: a directory that is only half removed must not be taken for a checkpoint.
                self.path(step).rename(self.directory / f".{self.path(step).name}.old")
        self._sweep()

    def _sweep(self) -> None:
        """Removes what is half written or half removed."""
        for path in self.directory.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


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
        if path.is_file() and path.name not in (_PROGRESS, README)  # What the card tells of may be measured later.
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    write_whole(directory / _PROGRESS, json.dumps(manifest, indent=2) + "\n")


def _check_finite(model: LanguageModel, step: int) -> None:
    for name, variable in model.checkpoint_variables().items():
        if not keras.ops.all(keras.ops.isfinite(variable.value)):
            raise FloatingPointError(
                f"{name} is not finite at step {step}, so no checkpoint is written. Try a lower learning rate, or a "
                "longer warm-up."
            )


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
