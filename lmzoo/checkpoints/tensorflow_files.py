"""Reads the tensors of TensorFlow's own checkpoints, of version 1 too, as if they were stored in torch's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmzoo.checkpoints.files import CheckpointError, PathLike, TensorFiles

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class _TensorflowFiles(TensorFiles):
    """As `TensorFiles`; what ends in "kernel" is [input, output] in the file and [output, input] here."""

    def __init__(self, directory: Path, stored: dict[str, str], reader: Any) -> None:
        super().__init__(directory, stored, {})
        self._reader = reader

    def __getitem__(self, name: str) -> Callable[[], np.ndarray]:
        stored = self._file_of[name]
        read = self._reader.get_tensor
        return lambda: read(stored).T if _is_kernel(stored) else read(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._file_of[name]
        shape = tuple(self._reader.get_variable_to_shape_map()[stored])
        return shape[::-1] if _is_kernel(stored) else shape

    def dtype(self, name: str) -> str:
        dtype = self._reader.get_variable_to_dtype_map()[self._file_of[name]].name
        return _DTYPES.get(dtype, dtype)


def read_tensorflow_tensors(path: PathLike, rename: Callable[[str], str | None]) -> TensorFiles:
    """Opens `path`.index and the data beside it; nothing is executed or unpickled.

    Args:
        path: without an ending, such as "directory/bert_model.ckpt".
        rename: name in the file -> name here, or None for what is no weight of the model.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    import tensorflow as tf  # Checkpoints of the usual kind are read without it.

    path = Path(path)
    if not path.with_name(f"{path.name}.index").is_file():
        raise CheckpointError(f"{path}.index is missing; a TensorFlow checkpoint has it beside {path.name}.data-*.")
    try:
        reader = tf.train.load_checkpoint(str(path))
        names = sorted(reader.get_variable_to_shape_map())
    except (tf.errors.OpError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or not a TensorFlow checkpoint: {error}.") from None
    renamed = {new: name for name in names if (new := rename(name)) is not None}
    return _TensorflowFiles(path.parent, renamed, reader)


def _is_kernel(name: str) -> bool:
    return name.split("/")[-1] == "kernel"
