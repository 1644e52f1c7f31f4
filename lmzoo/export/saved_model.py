"""Numbered SavedModels in one directory, as TF Serving watches it: each version appears whole, and numbers go up."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

PathLike = str | os.PathLike[str]


def saved_versions(directory: PathLike) -> list[int]:
    """The version numbers in a directory, lowest first; none if it does not exist."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def write_saved_model(
    directory: PathLike,
    module: tf.Module,
    signatures: Mapping[str, Any],
    *,
    version: int | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Writes `<directory>/<version>/`, a SavedModel with the given signatures.

    It is written under a temporary name, which no server takes for a version, and renamed when it is complete, so that
    a server watching the directory sees all of it or nothing. A version that exists is never touched.

    Args:
        directory: of all versions; is made if it is missing.
        module: the root of what is saved. All variables, tables and other resources that the functions use must hang
            off it.
        signatures: name -> `tf.function` with an input signature, that returns a dict of tensors. A parameter whose
            default is a tensor is an optional input: servers fill in the default, and so does a session that is not
            fed. (`tf.saved_model.load` does not: the signatures that it gives want every input.)
        version: must be higher than the versions there are. None is the next number, from 1 on.
        finish: gets the SavedModel before it has its number, to add files to it.

    Returns:
        The directory of the version.

    Raises:
        FileExistsError: the version exists already.
        ValueError: the version is not an integer of 1 or more, or not higher than the versions there are.
        OSError: the disk is full or the directory is not writable. Nothing is left half-written.
    """
    directory = Path(directory)
    if version is not None:
        _check_version(directory, version)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        tf.saved_model.save(module, str(temporary), signatures=dict(signatures))
        if finish is not None:
            finish(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        return _publish(temporary, directory, version)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_signatures(path: Path) -> dict[str, Any]:
    """The signatures of a SavedModel by name, as the `SignatureDef` messages in it."""
    saved_model = saved_model_pb2.SavedModel()
    saved_model.ParseFromString((path / "saved_model.pb").read_bytes())
    signatures = saved_model.meta_graphs[0].signature_def
    return {name: signatures[name] for name in sorted(signatures) if not name.startswith("__")}


def _check_version(directory: Path, version: int) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version is {version!r}, but must be an integer of 1 or more, or None for the next number.")
    there = saved_versions(directory)
    if version in there:
        raise FileExistsError(f"{directory / str(version)} exists, and a version is never overwritten: pass None.")
    if there and version < there[-1]:
        raise ValueError(
            f"version is {version}, but {directory} holds version {there[-1]} already, and servers take the highest "
            f"number for the newest: pass a higher one, or None for {there[-1] + 1}."
        )


def _publish(temporary: Path, directory: Path, version: int | None) -> Path:
    """Gives a complete SavedModel its number. Renaming fails where somebody else took the number in the meantime."""
    while True:
        number = max(saved_versions(directory), default=0) + 1 if version is None else version
        target = directory / str(number)
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            if version is not None:
                raise FileExistsError(f"{target} was written by another process in the meantime.") from error
        else:
            return target
