"""A directory that TF Serving can watch: numbered SavedModels with requests to warm up with, and how to serve them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.export.saved_model import PathLike, read_signatures, write_saved_model
from lmzoo.export.warmup import write_warmup
from lmzoo.files import write_whole

README = "README.md"
BATCHING = "batching_parameters.txt"
_MARK = "<!-- lmzoo writes this file with each version. Remove this line, and it is yours. -->"
# What a row of an input is in an example, by its dtype.
_EXAMPLES = {tf.string: "Once upon a time", tf.bool: True, tf.int32: 1, tf.int64: 1, tf.float32: 0.5}


def write_bundle(
    directory: PathLike,
    module: tf.Module,
    signatures: Mapping[str, Any],
    *,
    version: int | None = None,
    texts: Sequence[str] = (),
    title: str,
) -> Path:
    """Writes a version as `write_saved_model` does, with warm-up requests in it, and beside it how to serve it.

    A README.md or batching_parameters.txt that somebody has made his own is left alone.

    Args:
        directory, module, signatures, version: as in `write_saved_model`.
        texts: what a server warms up with, one for each length that requests may have.
        title: what is served, in a word.

    Returns:
        The directory of the version.

    Raises:
        FileExistsError, ValueError, OSError: as `write_saved_model`.
    """
    directory = Path(directory)
    path = write_saved_model(
        directory,
        module,
        signatures,
        version=version,
        finish=lambda temporary: write_warmup(temporary, read_signatures(temporary), texts),
    )
    readme = directory / README
    if not readme.exists() or _MARK in readme.read_text(encoding="utf-8"):
        write_whole(readme, _readme(directory.resolve().name, title, read_signatures(path)))
    if not (directory / BATCHING).exists():
        write_whole(directory / BATCHING, _batching(os.cpu_count() or 1))
    return path


def _batching(num_threads: int) -> str:
    """What the server is told about putting requests together, as a text of its message BatchingParameters."""
    return (
        "# Requests that wait at the same time run as one batch. Larger batches and longer waits give more texts a\n"
        "# second, and a later answer to each. As many threads as there are processors, or one for a GPU.\n"
        "max_batch_size { value: 16 }\n"
        "batch_timeout_micros { value: 2000 }\n"
        "max_enqueued_batches { value: 64 }\n"
        f"num_batch_threads {{ value: {num_threads} }}\n"
    )


def _readme(name: str, title: str, signatures: Mapping[str, Any]) -> str:
    tables = "\n\n".join(_described(key, signature) for key, signature in signatures.items())
    requests = "\n\n".join(
        _request(name, key, signature) for key, signature in signatures.items() if _takes_little(signature)
    )
    return f"""{_MARK}

# {name}

A {title} for [TF Serving](https://www.tensorflow.org/tfx/guide/serving): each numbered directory is a version, and a
server that watches this directory takes the highest number as soon as it is there, whole. In this directory:

```bash
tensorflow_model_server --model_name={name} --model_base_path="$PWD" \\
  --port=8500 --rest_api_port=8501 \\
  --enable_batching=true --batching_parameters_file="$PWD/{BATCHING}"
```

or, with Docker:

```bash
docker run --rm -p 8500:8500 -p 8501:8501 -v "$PWD:/models/{name}" -e MODEL_NAME={name} tensorflow/serving \\
  --enable_batching=true --batching_parameters_file=/models/{name}/{BATCHING}
```

## Signatures

{tables}

An input with a default may be left out over gRPC, as newer servers fill defaults in. Over REST, and with older servers,
a request gives all inputs of its signature. With batching, all inputs of a request have as many rows, one value of an
option for each text, and requests on ids must be as long as one another.

On a CPU, oneDNN keeps what it compiles for each new shape of a request, so that the server's memory grows for its first
thousands of requests. With `TF_ENABLE_ONEDNN_OPTS=0` in the environment it stays as it is, but several rows take
longer.

## Requests

Over REST. Bytes that are not UTF-8 go as `{{"b64": "..."}}`.

{requests}
"""


def _described(key: str, signature: Any) -> str:
    rows: dict[tuple[str, ...], list[str]] = {}
    for side, infos in (("in", signature.inputs), ("out", signature.outputs)):
        for name, info in sorted(infos.items(), key=lambda item: (item[0] in signature.defaults, item[0])):
            shape = ", ".join("?" if dim.size < 0 else str(dim.size) for dim in info.tensor_shape.dim)
            default = signature.defaults.get(name) if side == "in" else None
            value = "" if default is None else str(_example(info, default))
            # Those of all layers, which differ in their number only, share a line.
            kind = (side, name.rstrip("0123456789"), f"{tf.dtypes.as_dtype(info.dtype).name} [{shape}]", value)
            rows.setdefault(kind, []).append(f"`{name}`")
    lines = [
        f"| {side} | {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} | {kind} | {value} |"
        for (side, _, kind, value), names in rows.items()
    ]
    return "\n".join([f"### `{key}`", "", "| | name | type | default |", "| --- | --- | --- | --- |", *lines])


def _takes_little(signature: Any) -> bool:
    """Whether a request can be written by hand: it has no tensors of more than two axes."""
    return all(len(info.tensor_shape.dim) <= 2 for info in signature.inputs.values())


def _request(name: str, key: str, signature: Any) -> str:
    inputs: dict[str, Any] = {}
    for each, info in sorted(signature.inputs.items()):
        value = _example(info, signature.defaults.get(each))
        inputs[each] = [value] if len(info.tensor_shape.dim) == 1 else [[value] * max(info.tensor_shape.dim[1].size, 1)]
    body = json.dumps({"signature_name": key, "inputs": inputs})
    return f"```bash\ncurl -d '{body}' localhost:8501/v1/models/{name}:predict\n```"


def _example(info: Any, default: Any) -> Any:
    if default is None:
        return _EXAMPLES[tf.dtypes.as_dtype(info.dtype)]
    value = tf.make_ndarray(default)[0]
    # The shortest digits that are the same float32: a server takes no others.
    return value.item() if np.issubdtype(value.dtype, np.integer) else float(str(value))
