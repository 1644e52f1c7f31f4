"""What a SavedModel holds, read from its protocol buffer alone, and a process to run it in that has TensorFlow only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2

# The loader of a process in which what we build on cannot be imported. Reads requests, prints results, both as JSON.
RUNNER = """
import functools, json, sys

blocked = ("lmzoo", "keras", "tf_keras", "tensorflow_text", "tokenizers", "safetensors")
sys.modules.update(dict.fromkeys(blocked))  # Importing what stands there as None fails.
import tensorflow as tf

load = functools.cache(tf.saved_model.load)

def run(path, signature, inputs):
    function = load(path).signatures[signature]
    types = {name: spec.dtype for name, spec in function.structured_input_signature[1].items()}
    outputs = function(**{name: tf.constant(value, types[name]) for name, value in inputs.items()})
    return {name: decoded(value.numpy().tolist()) for name, value in outputs.items()}

def decoded(value):
    if isinstance(value, list):
        return [decoded(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value

print(json.dumps([run(*request) for request in json.load(sys.stdin)]))
assert not [name for name in blocked if sys.modules[name] is not None]
"""


def run_elsewhere(requests: list[tuple[Path, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Runs signatures of bundles in a new process: (path, signature, inputs) to outputs, each."""
    content = json.dumps([(str(path), signature, inputs) for path, signature, inputs in requests])
    command = [sys.executable, "-c", RUNNER]
    done = subprocess.run(command, input=content, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Bundle:
    """The graph of a SavedModel."""

    def __init__(self, path: Path) -> None:
        saved_model = saved_model_pb2.SavedModel()
        saved_model.ParseFromString((path / "saved_model.pb").read_bytes())
        (self.meta_graph,) = saved_model.meta_graphs
        self.signatures = self.meta_graph.signature_def
        self.functions = {f.signature.name: f for f in self.meta_graph.graph_def.library.function}

    def nodes(self, signature: str) -> list[Any]:
        """All nodes that can run for a signature: those its outputs come from, and those of all functions called."""
        graph = {node.name: node for node in self.meta_graph.graph_def.node}
        found: dict[str, Any] = {}
        waiting = [output.name.split(":")[0] for output in self.signatures[signature].outputs.values()]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = graph[name]
                waiting += [source.lstrip("^").split(":")[0] for source in graph[name].input]
        nodes, functions = list(found.values()), list(found.values())
        called: set[str] = set()
        while functions:
            for name in self._calls(functions.pop()):
                if name not in called:
                    called.add(name)
                    nodes += self.functions[name].node_def
                    functions += self.functions[name].node_def
        return nodes

    @staticmethod
    def _calls(node: Any) -> list[str]:
        values = node.attr.values()
        return [f.name for value in values for f in (value.func, *value.list.func) if f.name]

    def all_ops(self) -> set[str]:
        """Names of all operations in the SavedModel."""
        functions = [node for function in self.functions.values() for node in function.node_def]
        return {node.op for node in (*self.meta_graph.graph_def.node, *functions)}


def has_strings(node: Any) -> bool:
    """Whether a node works on strings or hash tables."""
    types = [kind for value in node.attr.values() for kind in (value.type, *value.list.type)]
    return types_pb2.DT_STRING in types or "Table" in node.op or "String" in node.op or "Regex" in node.op
