"""Reads and writes the files of a checkpoint: `config.json`, `model.safetensors`, or shards and their index."""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lmzoo.checkpoints.card import README, is_ours

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What a checkpoint's weights are called, and so what a new one takes away.
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_TEMPORARY = ".tmp"

PathLike = str | os.PathLike[str]
Contents = tuple[Mapping[str, Any], Mapping[str, Callable[[], np.ndarray]]]
"""Of a checkpoint: of its config.json, and name -> function that gives the tensor."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model; the message says what is wrong and where."""


def find_checkpoint(directory: PathLike) -> Path:
    """The checkpoint itself, or the best one (else the last one) of a run.

    Raises:
        CheckpointError: it is neither.
    """
    directory = Path(directory)
    for candidate in (directory, directory / "best", directory / "last"):
        if (candidate / CONFIG).is_file():
            return candidate.resolve()
    raise CheckpointError(
        f"{directory} is neither a checkpoint (it has no {CONFIG}) nor a run with a checkpoint (best/ or last/)."
    )


def read_config(directory: PathLike, name: str = CONFIG) -> dict[str, Any]:
    """The dictionary in `config.json`, or in a file of another `name`.

    Raises:
        CheckpointError: the directory or the file is missing, or the file is not a JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; a checkpoint is one that holds {CONFIG} and {WEIGHTS}.")
    if not (directory / name).exists() and any(directory.glob(f"*{_TEMPORARY}")):
        raise CheckpointError(
            f"{directory / name} is missing, and there are files that end in {_TEMPORARY}: a save is under way or "
            "was cut off. If none is under way, save the model again."
        )
    return _read_json(directory / name)


@contextlib.contextmanager
def unchanged(directory: PathLike) -> Iterator[None]:
    """Makes sure that all that is read inside belongs to one checkpoint.

    Raises:
        CheckpointError: on leaving, if another process replaced the checkpoint meanwhile.
    """
    before = _identity(Path(directory) / CONFIG)
    yield
    if _identity(Path(directory) / CONFIG) != before:
        raise CheckpointError(f"the checkpoint in {directory} was replaced while it was being read: read it again.")


class TensorFiles(Mapping[str, Callable[[], np.ndarray]]):
    """The tensors of a checkpoint by name; each is read when its value is called."""

    def __init__(self, directory: Path, file_of: Mapping[str, str], opened: Mapping[str, Any]) -> None:
        self.directory = directory
        self._file_of = file_of
        self._opened = opened

    def __getitem__(self, name: str) -> Callable[[], np.ndarray]:
        file = self._file(name)
        return lambda: file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the file's header."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor as safetensors writes it ("F32", "BF16", "I64"), read from the file's header."""
        return str(self._file(name).get_slice(name).get_dtype())

    def _file(self, name: str) -> Any:
        return self._opened[self._file_of[name]]


def read_tensors(directory: PathLike) -> TensorFiles:
    """Opens `model.safetensors`, or else the shards named in `model.safetensors.index.json`.

    Raises:
        CheckpointError: there is neither, a shard is missing, a file is damaged, or the index names a tensor that its
            shard does not hold.
    """
    directory = Path(directory)
    if (directory / WEIGHTS).exists():
        file = _open_safetensors(directory / WEIGHTS)
        return TensorFiles(directory, dict.fromkeys(file.keys(), WEIGHTS), {WEIGHTS: file})
    if (directory / INDEX).exists():
        return _read_shards(directory)
    hint = ""
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        hint = " It holds pickled weights, which lmzoo never reads: save them again as safetensors."
    raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}.{hint}")


def _read_shards(directory: Path) -> TensorFiles:
    index = directory / INDEX
    file_of = _read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files.")
    for name, file in file_of.items():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file:
            raise CheckpointError(f"{index} places {name} in {file!r}, which must be the name of a file beside it.")
    opened = {file: _open_safetensors(directory / file) for file in sorted(set(file_of.values()))}
    held = {file: set(shard.keys()) for file, shard in opened.items()}
    lost = sorted(f"{name} in {file}" for name, file in file_of.items() if name not in held[file])
    if lost:
        raise CheckpointError(f"{index} names tensors that are not where it says: {', '.join(lost)}.")
    return TensorFiles(directory, file_of, opened)


def write_checkpoint(
    directory: PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, Callable[[], np.ndarray]],
    *,
    max_shard_bytes: int = 5 * 10**9,
    inner: Mapping[str, Contents] | None = None,
    readme: str | None = None,
) -> None:
    """Writes a checkpoint that Hugging Face transformers opens.

    Every file is first written whole under a temporary name, and only then takes the place of an older checkpoint's:
    that one's `config.json` goes first and the new one comes last. A directory without it is not a checkpoint, so a
    reader never takes a mixture for one, even after a kill or a power cut between two renames. Other files in the
    directory are left alone. Only one process at a time may write to a directory.

    Args:
        directory: is made if it is missing.
        config: content of `config.json`.
        tensors: name -> function that gives the tensor.
        max_shard_bytes: a checkpoint larger than this is cut into shards, with an index. A tensor is never cut.
        inner: directory inside -> contents of a checkpoint that belongs to this one and takes its place with it.
        readme: content of README.md, which is left alone if somebody else wrote it.

    Raises:
        OSError: the disk is full or the directory is not writable. The older checkpoint is as it was, and nothing
            half-written is left.
    """
    directory = Path(directory)
    mark = f".{uuid.uuid4().hex[:8]}{_TEMPORARY}"
    # The outer one comes last: all is there when it is.
    parts = {directory / name: contents for name, contents in (inner or {}).items()} | {directory: (config, tensors)}
    renamed = {}
    try:
        for place, contents in parts.items():
            place.mkdir(parents=True, exist_ok=True)
            renamed[place] = _write_files(place, mark, *contents, max_shard_bytes)
        if readme is not None and is_ours(directory / README):
            _write_text(directory / (README + mark), readme)
            renamed[directory] = {README + mark: README, **renamed[directory]}
    except BaseException:
        for place in parts:
            for path in place.glob(f"*{mark}"):
                path.unlink(missing_ok=True)
        raise

    (directory / CONFIG).unlink(missing_ok=True)
    _sync(directory)
    for place, names in renamed.items():
        (place / CONFIG).unlink(missing_ok=True)
        for path in place.iterdir():
            if _WEIGHT_FILE.fullmatch(path.name):
                path.unlink()
        for temporary, name in names.items():
            (place / temporary).replace(place / name)
        _sync(place)


def _write_files(
    directory: Path,
    mark: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Callable[[], np.ndarray]],
    max_shard_bytes: int,
) -> dict[str, str]:
    """Writes a checkpoint under temporary names that end in `mark`: temporary name -> name, `config.json` last."""
    contents: list[list[str]] = []
    total_bytes = 0
    for shard in _shards(tensors, max_shard_bytes):
        contents.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        _write_shard(directory / f"shard-{len(contents)}{mark}", shard)
    files = [WEIGHTS]
    if len(contents) > 1:
        files = [f"model-{number:05d}-of-{len(contents):05d}.safetensors" for number in range(1, len(contents) + 1)]
    names = {f"shard-{number}{mark}": file for number, file in enumerate(files, 1)}
    if len(contents) > 1:
        weight_map = {name: file for file, shard_names in zip(files, contents, strict=True) for name in shard_names}
        _write_json(directory / (INDEX + mark), {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        names[INDEX + mark] = INDEX
    _write_json(directory / (CONFIG + mark), config)
    names[CONFIG + mark] = CONFIG
    return names


def _shards(tensors: Mapping[str, Callable[[], np.ndarray]], max_shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Reads tensors a shard at a time; a shard is emptied when the next one is asked for."""
    shard: dict[str, np.ndarray] = {}
    shard_bytes = 0
    for name, read in tensors.items():
        tensor = np.asarray(read(), order="C")
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard.clear()
            shard_bytes = 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
    yield shard


def _write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.touch()
    mode = path.stat().st_mode  # As the user wants new files; the library lets nobody else read its own.
    try:
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # The library wraps the system's own error.
        raise OSError(
            f"cannot write the weights to {path.parent}: {error}. What was there before is as it was."
        ) from error
    path.chmod(mode)
    _sync(path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Has the system put a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a file from its successor of the same name; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, but must hold an object.")
    return value


def _open_safetensors(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}.") from None
