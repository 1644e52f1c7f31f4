"""Tensors in JSON as TF Serving writes them: rows or columns, base64 for bytes, floats as its C++ prints them."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.serving.errors import Code, ServingError, invalid
from lmzoo.serving.servable import Arrays

_BASE64 = "b64"
_BYTES_SUFFIX = "_bytes"
_MAX_RANK = 16


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in the body of a request. NaN, Infinity and -Infinity are numbers.

    Raises:
        ServingError: it is no JSON object.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_float=_finite)
    except RecursionError:
        raise invalid("JSON Parse error: it is nested too deeply.") from None
    except ValueError as error:  # Broken JSON or UTF-8, and numbers that no computer's number holds.
        raise invalid(f"JSON Parse error: {error}") from None
    if not isinstance(value, dict):
        raise invalid(f"JSON Value: {shown(value)} Is not object")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"Number too big to be stored in double: {text[:40]}")
    return number


def signature_name(request: Mapping[str, Any]) -> str:
    """The signature that a request names, "" if it names none.

    Raises:
        ServingError: it is no string.
    """
    name = request.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid(
            f"JSON Value: {shown(name)} not formatted correctly. 'signature_name' key must be a string value."
        )
    return name


def read_inputs(request: Mapping[str, Any], infos: Mapping[str, Any]) -> tuple[Arrays, bool]:
    """The inputs of a request for predictions, and whether it came in rows.

    As in TF Serving, a request over REST must name each input, also one with a default.

    Args:
        request: with "instances", a list of rows, or "inputs", whole columns.
        infos: TensorInfo by name of an input.

    Raises:
        ServingError: it has neither, or values that are not those that `infos` say.
    """
    if ("instances" in request) == ("inputs" in request):
        if "inputs" in request:
            raise invalid("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
        raise invalid("Missing 'inputs' or 'instances' key")
    if not infos:
        raise invalid("Failed to get input map for signature: it has no inputs.")
    in_rows = "instances" in request
    columns = _columns(request["instances"], infos) if in_rows else _named(request["inputs"], infos)
    return {name: read_tensor(name, value, infos[name].dtype) for name, value in columns.items()}, in_rows


def _named(inputs: Any, infos: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(inputs, dict) or _is_base64(inputs):
        if len(infos) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required: "
                + ", ".join(sorted(infos))
            )
        return {next(iter(infos)): inputs}
    for name in infos:
        if name not in inputs:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
    _refuse_unknown(inputs, infos)
    return inputs


def _columns(instances: Any, infos: Mapping[str, Any]) -> dict[str, list[Any]]:
    if not isinstance(instances, list):
        raise invalid("Expecting 'instances' to be an list/array")
    if not instances:
        raise invalid("No values in 'instances' array")
    are_objects = isinstance(instances[0], dict) and not _is_base64(instances[0])
    for number, row in enumerate(instances):
        if (isinstance(row, dict) and not _is_base64(row)) != are_objects:
            kinds = ("object", "value/list") if are_objects else ("value/list", "object")
            raise invalid(f"Expecting {kinds[0]} but got {kinds[1]} at item {number} of input list")
        if are_objects and set(row) != set(infos):
            _refuse_unknown(row, infos)
            raise invalid(
                f"Failed to process element: {number} of 'instances' list. Its keys must be equal to: "
                + ",".join(sorted(infos))
            )
    if are_objects:
        return {name: [row[name] for row in instances] for name in infos}
    if len(infos) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors required: "
            + ", ".join(sorted(infos))
        )
    return {next(iter(infos)): instances}


def _refuse_unknown(inputs: Mapping[str, Any], infos: Mapping[str, Any]) -> None:
    for name in inputs:
        if name not in infos:
            raise invalid(f"JSON object: does not have named input: {shown(name)}")


def read_tensor(name: str, value: Any, dtype: int) -> np.ndarray:
    """A JSON value, nested lists or a scalar, as an array.

    Raises:
        ServingError: lists of one level differ in length, or a value is not of the type.
    """
    kind = tf.dtypes.as_dtype(dtype)
    shape: list[int] = []
    inner = value
    while isinstance(inner, list) and len(shape) <= _MAX_RANK:
        shape.append(len(inner))
        inner = inner[0] if inner else None
    if len(shape) > _MAX_RANK:
        raise invalid(f"input {name} is nested more than {_MAX_RANK} lists deep.")
    leaves = [value]
    for level, size in enumerate(shape):
        for item in leaves:
            if not isinstance(item, list) or len(item) != size:
                got = f"a list of {len(item)}" if isinstance(item, list) else shown(item)
                raise invalid(f"input {name}: Encountered {got} at level {level}, expected a list of size: {size}")
        leaves = list(itertools.chain.from_iterable(leaves))
    array = np.empty(len(leaves), object if kind == tf.string else kind.as_numpy_dtype)
    array[:] = [_leaf(name, leaf, kind) for leaf in leaves]
    return array.reshape(shape)


def _leaf(name: str, value: Any, kind: Any) -> Any:
    if kind == tf.string:
        return read_text(name, value)
    if kind == tf.bool:
        fits = isinstance(value, bool)
    elif kind.is_integer:
        fits = isinstance(value, int) and not isinstance(value, bool) and kind.min <= value <= kind.max
    elif kind in (tf.float32, tf.float64, tf.float16):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if fits and not _is_lossless(value, kind):
            raise invalid(
                f"input {name}: Cannot convert JSON value: {shown(value)} to {kind.name} without loss of precision."
            )
    else:
        raise ServingError(Code.UNIMPLEMENTED, f"input {name} is {kind.name}, which JSON requests cannot hold.")
    if not fits:
        raise invalid(f"input {name}: JSON Value: {shown(value)} is not of expected type: {kind.name}")
    return value


def _is_lossless(value: float, kind: Any) -> bool:
    """Whether a float holds an integer as it is, and any other number at all; NaN and infinities it does."""
    if isinstance(value, int):
        return abs(value) < 2 ** (np.finfo(kind.as_numpy_dtype).nmant + 1)
    return not math.isfinite(value) or abs(value) <= float(kind.max)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {_BASE64} and isinstance(value[_BASE64], str)


def read_text(name: str, value: Any) -> bytes:
    """The bytes of a JSON string, or of an object with base64.

    Raises:
        ServingError: it is neither.
    """
    if isinstance(value, str):
        try:
            return value.encode("utf-8")
        except UnicodeEncodeError:
            raise invalid(f"input {name}: JSON Parse error: The surrogate pair in string is invalid.") from None
    if not _is_base64(value):
        raise invalid(f"input {name}: JSON Value: {shown(value)} is not of expected type: string")
    text = value[_BASE64].rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"input {name}: Unable to base64 decode {shown(value[_BASE64])}") from None


def shown(value: Any) -> str:
    """A JSON value for a message, cut off where it is long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- responses


def write_outputs(outputs: Arrays, in_rows: bool) -> bytes:
    """The body of a response: "predictions" for a request in rows, "outputs" for one in columns.

    Raises:
        ServingError: an output has no rows, or another number of them than the others, for a request in rows.
    """
    if not in_rows:
        columns = {name: _joined(json_texts(name, value), value.shape)[0] for name, value in outputs.items()}
        return _object({"outputs": next(iter(columns.values())) if len(columns) == 1 else _object(columns)}).encode()
    sizes = {name: value.shape[0] if value.ndim else None for name, value in outputs.items()}
    if None in sizes.values() or len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} has {'no rows' if size is None else size}" for name, size in sizes.items())
        raise invalid(f"Tensors have inconsistent batch size: {told}. Send 'inputs' instead of 'instances'.")
    rows = {name: _joined(json_texts(name, value), value.shape, kept=1) for name, value in outputs.items()}
    if len(rows) == 1:
        values = next(iter(rows.values()))
    else:
        values = [_object(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
    return _object({"predictions": f"[{', '.join(values)}]"}).encode()


def _object(members: Mapping[str, str]) -> str:
    """A JSON object of values that are written already."""
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in members.items()) + "}"


def _joined(texts: list[str], shape: tuple[int, ...], kept: int = 0) -> list[str]:
    """Texts of all values of an array, in lists as deep as its shape but for the first `kept` axes."""
    for axis in range(len(shape) - 1, kept - 1, -1):
        size = shape[axis]
        texts = [f"[{', '.join(texts[place * size : (place + 1) * size])}]" for place in range(math.prod(shape[:axis]))]
    return texts


def json_texts(name: str, value: np.ndarray) -> list[str]:
    """Each value of an array in JSON."""
    flat = value.ravel()
    if flat.dtype.kind in "OSU":
        if name.endswith(_BYTES_SUFFIX):
            return [_object({_BASE64: json.dumps(base64.b64encode(item).decode())}) for item in flat]
        return [json.dumps(item.decode("utf-8", "replace"), ensure_ascii=False) for item in flat]
    if flat.dtype.kind == "b":
        return ["true" if item else "false" for item in flat]
    if flat.dtype.kind in "iu":
        return [str(item) for item in flat.tolist()]
    return _float_texts(flat if flat.dtype == np.float64 else flat.astype(np.float32))


def _float_texts(values: np.ndarray) -> list[str]:
    """Six digits where they tell which float it is, else 9, or 17 for float64; always a point or an exponent."""
    digits = 17 if values.dtype == np.float64 else 9
    numbers = values.tolist()
    short = [f"{number:.6g}" for number in numbers]
    same = np.array(short, values.dtype) == values
    return [
        _float_text(text if is_same else f"{number:.{digits}g}")
        for text, is_same, number in zip(short, same, numbers, strict=True)
    ]


def _float_text(text: str) -> str:
    special = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    if text in special:
        return special[text]
    return text if "." in text or "e" in text else f"{text}.0"
