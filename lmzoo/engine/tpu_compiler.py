"""Compiles a StableHLO program for a TPU topology, on a machine without a TPU; run as a process of its own.

    python tpu_compiler.py PROGRAM TOPOLOGY RESULT

PROGRAM is a portable StableHLO artifact for one replica; as many replicas are compiled as TOPOLOGY has devices. RESULT
is the JSON file to write. A process of its own, because jax and TensorFlow each bring their own XLA and its settings,
and because a compiler that crashes should take nothing with it. It needs jax and libtpu, and nothing of lmzoo.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Set before libtpu is loaded: there is no TPU to ask for, and compiling alone needs no lock on one.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import numpy as np
from jax.experimental import topologies
from jax.interpreters import mlir
from jaxlib import xla_client
from jaxlib.mlir.dialects import stablehlo


def main(program: str, topology: str, result: str) -> None:
    """Writes what the compiler says about a program: {"error": kind, "message"} or {"seconds", "memory"}."""
    answer: dict[str, Any] = {"compiler": f"libtpu {importlib.metadata.version('libtpu')}"}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        answer |= {"error": "topology", "message": str(error)}
    else:
        answer |= _compile(Path(program).read_bytes(), devices)
    Path(result).write_text(json.dumps(answer), encoding="utf-8")


def _compile(program: bytes, devices: list[Any]) -> dict[str, Any]:
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = len(devices), 1
    options.device_assignment = xla_client.DeviceAssignment.create(np.arange(len(devices)).reshape(-1, 1))
    context = mlir.make_ir_context()
    with context:
        module = stablehlo.deserialize_portable_artifact(context, program)
        _remove_copies(module.operation)
        start = time.perf_counter()
        try:
            executable = devices[0].client.compile(module, xla_client.DeviceList(tuple(devices)), options)
        except Exception as error:
            return {"error": "program", "message": str(error), "seconds": time.perf_counter() - start}
    memory = executable.get_compiled_memory_stats()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    sizes = {name: getattr(memory, f"{stem}_size_in_bytes") for name, stem in names.items()}
    return {
        "seconds": time.perf_counter() - start,
        "memory": {**sizes, "code": memory.generated_code_size_in_bytes},
    }


def _remove_copies(operation: Any) -> None:
    """Replaces each `mhlo.copy` by its operand: TensorFlow writes this op, and jax's own dialects have none such."""
    for region in operation.regions:
        for block in region:
            for each in list(block):
                inner = each.operation
                if inner.name == "mhlo.copy":
                    inner.results[0].replace_all_uses_with(inner.operands[0])
                    inner.erase()
                else:
                    _remove_copies(inner)


if __name__ == "__main__":
    main(*sys.argv[1:])
