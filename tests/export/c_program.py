"""The program that loads SavedModels through TensorFlow's C API: how it is compiled, and how it is called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

_TYPES = {"string": object, "float32": np.float32, "int32": np.int32, "int64": np.int64, "bool": bool}


def compiled(directory: Path) -> Path:
    """The program, in a directory; skips the test where it cannot be compiled."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc to compile the C program with")
    library = Path(tf.sysconfig.get_lib())
    names = ["libtensorflow_cc.so.2", "libtensorflow_framework.so.2"]
    missing = [name for name in names if not (library / name).is_file()]
    if missing:
        pytest.skip(f"this TensorFlow wheel has no {' and no '.join(missing)} to link against")
    path = directory / "load_saved_model"
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{tf.sysconfig.get_include()}"]
    command += [str(Path(__file__).with_name("load_saved_model.c")), "-o", str(path), f"-L{library}"]
    command += [*(f"-l:{name}" for name in names), f"-Wl,-rpath,{library}"]
    subprocess.run(command, check=True, timeout=300)
    return path


def run(
    program: Path, path: Path, signature: Any, inputs: dict[str, Any], libraries: tuple[Path, ...] = ()
) -> dict[str, np.ndarray]:
    """The outputs of a signature for inputs by name; those that are missing are not fed."""
    names = list(signature.outputs)
    fed = [signature.inputs[name].name for name in inputs]
    library = [word for file in libraries for word in ("--library", file)]
    done = subprocess.run(
        [program, path, *library, *fed, "--", *(signature.outputs[name].name for name in names)],
        input=b"".join(map(_written, inputs.values())),
        capture_output=True,
        timeout=300,
        check=False,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(names, _read(done.stdout), strict=True))


def _written(value: Any) -> bytes:
    value = np.asarray(value)
    kind = "string" if value.dtype == object else value.dtype.name
    head = " ".join(map(str, [kind, value.ndim, *value.shape])).encode()
    if kind == "string":
        lines = [b"%d\n%s" % (len(text), text) for text in value.ravel()]
    else:
        lines = [repr(number).encode() for number in (value.astype(int) if kind == "bool" else value).ravel().tolist()]
    return b"\n".join([head, *lines, b""])


def _read(output: bytes) -> list[np.ndarray]:
    tensors = []
    while output:
        head, _, output = output.partition(b"\n")
        kind, _, *sizes = head.decode().split()
        shape = tuple(map(int, sizes))
        values = np.empty(int(np.prod(shape)), _TYPES[kind])
        for place in range(values.size):
            line, _, output = output.partition(b"\n")
            if kind == "string":
                values[place], output = output[: int(line)], output[int(line) + 1 :]
            else:
                values[place] = _TYPES[kind](int(line) if kind == "bool" else line.decode())
        tensors.append(values.reshape(shape))
    return tensors
