"""The insides of a .tflite file: which operators it has, how it looks rows up, and notes that travel with it."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_NOTES = "lmzoo"  # Name of the metadata.
_IDENTIFIER = b"TFL3"


def operators(content: bytes) -> dict[str, set[str]]:
    """Name of each signature's graph, and of those that it calls -> names of their operators.

    Operators that TFLite has not built in are named CUSTOM:<name>; TensorFlow's own are CUSTOM:Flex<name>.
    """
    schema, model = _schema(), _unpack(content)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}

    def name(operator: Any) -> str:
        code = model.operatorCodes[operator.opcodeIndex]
        builtin = names[_builtin(code)]
        return f"{builtin}:{code.customCode.decode()}" if builtin == "CUSTOM" else builtin

    return {graph.name.decode(): {name(each) for each in graph.operators or ()} for graph in model.subgraphs}


def require_builtins(content: bytes) -> None:
    """Raises a ValueError that names the operators which a runtime without extensions refuses, if there are any."""
    strange = sorted({name for names in operators(content).values() for name in names if name.startswith("CUSTOM")})
    if strange:
        raise ValueError(
            f"the graph has {', '.join(strange)}, which a TFLite runtime has not built in: write that part of the "
            "model with other operations."
        )


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The notes that `finished` has written into a file; empty if it has not.

    Raises:
        OSError, ValueError: there is no such file, or it is none of TFLite.
    """
    with Path(path).open("rb") as file:
        if file.read(8)[4:] != _IDENTIFIER:
            raise ValueError(f"{path} is no .tflite file: its bytes 4 to 7 are not {_IDENTIFIER.decode()}.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _notes(content)
            except (struct.error, ValueError) as error:
                raise ValueError(f"{path} is damaged or cut short: {error}.") from error


def _notes(content: mmap.mmap) -> dict[str, Any]:
    model = _schema().Model.GetRootAs(content, 0)
    for index in range(model.MetadataLength()):
        entry = model.Metadata(index)
        if entry.Name() == _NOTES.encode():
            return json.loads(bytes(model.Buffers(entry.Buffer()).DataAsNumpy()))
    return {}


def finished(content: bytes, notes: Mapping[str, Any]) -> bytes:
    """The file with notes in its metadata, in which tables of weights are looked up as such.

    A row of a table is taken by GATHER, which wants numbers of one scale, so that a quantized table would be stored a
    second time for it. EMBEDDING_LOOKUP reads a table that has a scale for each row, the one that the tied output head
    multiplies with.
    """
    schema, model = _schema(), _unpack(content)
    for graph in model.subgraphs:
        graph.operators = [new for old in graph.operators for new in _looked_up(schema, model, graph, old)]
    entry = schema.MetadataT()
    entry.name, entry.buffer = _NOTES, _add_buffer(schema, model, json.dumps(dict(notes)).encode())
    model.metadata = [*(model.metadata or ()), entry]
    return _pack(model, len(content))


def _looked_up(schema: Any, model: Any, graph: Any, operator: Any) -> list[Any]:
    """What stands in the place of an operator: it alone, or a lookup if it takes rows of a table of weights."""
    if _builtin(model.operatorCodes[operator.opcodeIndex]) != schema.BuiltinOperator.GATHER:
        return [operator]
    table, token_ids = (graph.tensors[index] for index in operator.inputs)
    is_weight = model.buffers[table.buffer].data is not None and table.type == schema.TensorType.FLOAT32
    options = operator.builtinOptions
    if not is_weight or len(table.shape) != 2 or options.axis or options.batchDims:
        return [operator]
    count, width = int(np.prod(token_ids.shape)), int(table.shape[1])
    output = graph.tensors[operator.outputs[0]]
    flat = _add_tensor(schema, graph, token_ids.type, [count])
    rows = _add_tensor(schema, graph, table.type, [count, width])

    def make(builtin: int, inputs: list[int], result: int) -> Any:
        made = schema.OperatorT()
        made.opcodeIndex = _code(schema, model, builtin)
        made.inputs, made.outputs = np.array(inputs, np.int32), np.array([result], np.int32)
        return made

    def reshape(source: int, result: int, shape: Any) -> Any:
        target = np.array(shape, np.int32)
        buffer = _add_buffer(schema, model, target.tobytes())
        place = _add_tensor(schema, graph, schema.TensorType.INT32, target.shape, buffer)
        return make(schema.BuiltinOperator.RESHAPE, [source, place], result)

    return [
        reshape(operator.inputs[1], flat, [count]),
        make(schema.BuiltinOperator.EMBEDDING_LOOKUP, [flat, operator.inputs[0]], rows),
        reshape(rows, operator.outputs[0], output.shape),
    ]


def _schema() -> Any:
    """The format of the file. Both packages have it, and who only runs a file has no TensorFlow."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        from tensorflow.lite.python import schema_py_generated
    return schema_py_generated


def _unpack(content: bytes) -> Any:
    schema = _schema()
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))


def _pack(model: Any, size: int) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(size)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def _builtin(code: Any) -> int:
    return max(code.builtinCode, code.deprecatedBuiltinCode)  # The second is of files from before there were 127.


def _code(schema: Any, model: Any, builtin: int) -> int:
    """Number of an operator in the file's own list."""
    for number, code in enumerate(model.operatorCodes):
        if _builtin(code) == builtin:
            return number
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = builtin
    code.version = 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _add_buffer(schema: Any, model: Any, content: bytes) -> int:
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(content, np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _add_tensor(schema: Any, graph: Any, kind: int, shape: Any, buffer: int = 0) -> int:
    tensor = schema.TensorT()
    tensor.name = f"{graph.name.decode()}/lookup/{len(graph.tensors)}"
    tensor.shape, tensor.type, tensor.buffer = np.array(shape, np.int32), kind, buffer
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1
