"""Reads and writes the files of a checkpoint: `config.json`, `model.safetensors`, or shards and their index."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model; the message says what is wrong and where."""


def read_config(directory: PathLike) -> dict[str, Any]:
    """The dictionary in `config.json`.

    Raises:
        CheckpointError: the directory or the file is missing, or the file is not a JSON object.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; a checkpoint is one that holds {CONFIG} and {WEIGHTS}.")
    return _read_json(directory / CONFIG)


class TensorFiles(Mapping[str, Callable[[], np.ndarray]]):
    """The tensors of a checkpoint by name; each is read when its value is called."""

    def __init__(self, directory: Path, file_of: Mapping[str, str]) -> None:
        self.directory = directory
        self.file_of = file_of
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Callable[[], np.ndarray]:
        return lambda: self._file(name).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the file's header."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        file = self.file_of[name]
        if file not in self._open:
            self._open[file] = _open_safetensors(self.directory / file)
        return self._open[file]


def read_tensors(directory: PathLike) -> TensorFiles:
    """Opens `model.safetensors`, or the shards named in `model.safetensors.index.json`.

    Raises:
        CheckpointError: there is neither, a shard is missing, a file is damaged, or the index names a tensor that its
            shard does not hold.
    """
    directory = Path(directory)
    index = directory / INDEX
    if index.is_file():
        file_of = _read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not file_of:
            raise CheckpointError(f"{index} has no weight_map from tensor names to files.")
        for file in sorted(set(file_of.values())):
            if Path(file).name != file:
                raise CheckpointError(f"{index} names the shard {file!r}, which must be a file beside it.")
            held = set(_open_safetensors(directory / file).keys())
            lost = [name for name, place in file_of.items() if place == file and name not in held]
            if lost:
                raise CheckpointError(f"{directory / file} does not hold {_listed(lost)}, which {INDEX} says it does.")
        return TensorFiles(directory, file_of)
    if (directory / WEIGHTS).is_file():
        return TensorFiles(directory, dict.fromkeys(_open_safetensors(directory / WEIGHTS).keys(), WEIGHTS))
    hint = ""
    if list(directory.glob("*.bin")) or list(directory.glob("*.pt")):
        hint = " It holds pickled weights, which lmzoo never reads: save them again as safetensors."
    raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}.{hint}")


def write_checkpoint(
    directory: PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, Callable[[], np.ndarray]],
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint that Hugging Face transformers opens.

    Every file is written whole under a temporary name first and then renamed, so that an older checkpoint in the same
    directory stays readable until its successor is complete. Other files in the directory are left alone.

    Args:
        directory: is made if it is missing.
        config: content of `config.json`.
        tensors: name -> function that gives the tensor.
        max_shard_bytes: a checkpoint larger than this is cut into shards, with an index.

    Raises:
        OSError: the disk is full or the directory is not writable. Nothing is left half-written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    shard_bytes = total_bytes = 0
    written: dict[str, Path] = {}
    mark = f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        for name, read in tensors.items():
            tensor = np.ascontiguousarray(read())
            if shard_bytes and shard_bytes + tensor.nbytes > max_shard_bytes:
                _write_shard(directory, f"shard-{len(shards)}{mark}", shards[-1], written)
                shards[-1] = dict.fromkeys(shards[-1], np.empty(0))  # The names are needed still, the numbers are not.
                shards.append({})
                shard_bytes = 0
            shards[-1][name] = tensor
            shard_bytes += tensor.nbytes
            total_bytes += tensor.nbytes
        _write_shard(directory, f"shard-{len(shards)}{mark}", shards[-1], written)

        files = [WEIGHTS]
        if len(shards) > 1:
            files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            _write_json(directory, INDEX + mark, index, written)
        _write_json(directory, CONFIG + mark, config, written)

        stale = {path for path in directory.glob("model*.safetensors*") if not path.name.endswith(".tmp")}
        targets = {f"shard-{number}{mark}": file for number, file in enumerate(files, 1)}
        targets |= {INDEX + mark: INDEX, CONFIG + mark: CONFIG}
        for temporary, path in written.items():
            path.replace(directory / targets[temporary])
            stale.discard(directory / targets[temporary])
        for path in stale:  # Shards and index of the checkpoint that this one replaces.
            path.unlink()
    finally:
        for path in directory.glob(f"*{mark}"):
            path.unlink(missing_ok=True)


def _write_shard(directory: Path, name: str, tensors: dict[str, np.ndarray], written: dict[str, Path]) -> None:
    content = directory / name
    try:
        safetensors.numpy.save_file(tensors, content, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # The library wraps the system's own error.
        raise OSError(f"cannot write {directory / WEIGHTS}: {error}. The checkpoint before it is as it was.") from error
    _sync(content)
    written[name] = content


def _write_json(directory: Path, name: str, value: Mapping[str, Any], written: dict[str, Path]) -> None:
    path = directory / name
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(path)
    written[name] = path


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
    with contextlib.suppress(FileNotFoundError):
        try:
            return safetensors.safe_open(path, framework="numpy")
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}.") from None
    raise CheckpointError(f"{path} is missing.")


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names))
