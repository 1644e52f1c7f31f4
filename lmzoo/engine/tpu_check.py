"""Whether a training step compiles for a TPU, and fits it, found out on a machine without one.

The step is the one that `fit` runs on each replica, traced as one replica of the topology, all-reduce included, and
compiled by the TPU's own compiler (libtpu) in a process beside, which needs no device. Without libtpu, XLA compiles
it for the host, which finds the ops that no TPU can run but says little about a TPU's memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.compiler.xla.service import hlo_pb2

from lmzoo.engine.model import ReplicatedModel
from lmzoo.engine.tpu_report import GIB, Memory, TPUReport

# Generation -> replicas a chip, and GiB that a program of a replica may use: what libtpu 0.0.52 says that it has
# when a program needs more. A chip of v2 to v4 has two cores here, each of them a replica with half of the memory.
_GENERATIONS = {
    "v2": (2, 7.48),
    "v3": (2, 15.48),
    "v4": (2, 15.25),
    "v5e": (1, 15.75),
    "v5p": (1, 95.73),
    "v6e": (1, 31.24),
    "tpu7x": (2, 94.74),
}


def replicas_of(topology: str) -> int:
    """Returns how many replicas a TPU has.

    Args:
        topology: generation and chips along each axis, such as "v5e:2x2" or "v4:2x2x1".

    Raises:
        ValueError: it is not of that form, or of a generation that is not known here.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not match or match.group(1) not in _GENERATIONS:
        raise ValueError(
            f"topology must be a generation ({', '.join(_GENERATIONS)}) and its chips along each axis, such as "
            f"'v5e:2x2' or 'v4:2x2x1', but is {topology!r}."
        )
    chips = math.prod(int(axis) for axis in match.group(2).split("x"))
    return chips * _GENERATIONS[match.group(1)][0]


def check_on_tpu(
    model: ReplicatedModel,
    batch: Any,
    topology: str = "v5e:2x2",
    *,
    model_flops: float | None = None,
    python: str | None = None,
) -> TPUReport:
    """Compiles one training step of a model for a TPU topology; nothing runs, and no weight changes.

    Args:
        model: compiled, with weights, and made without a strategy.
        batch: the global batch as (inputs, labels, weights): arrays, tensors or `tf.TensorSpec`s of known shapes. Each
            replica gets an equal share of the rows.
        topology: generation and chips along each axis: "v5e:2x2", "v4:2x2x1".
        model_flops: FLOPs of a step over the whole batch by the model's own formula, to compare with.
        python: an interpreter that has jax and libtpu. None is this one if it has them; if not, XLA compiles the step
            for the host.

    Raises:
        ValueError: an unknown topology, a batch of unknown shape or not a multiple of replicas times micro-batches, or
            a model made under a strategy of several replicas.
        RuntimeError: the compiler could not be started.
    """
    replicas = replicas_of(topology)
    if model.distribute_strategy.num_replicas_in_sync > 1:
        raise ValueError(
            f"the model was made under {type(model.distribute_strategy).__name__}. Make it without a strategy: the "
            "check brings its own."
        )
    specs = _share(batch, replicas, model._micro_batches)
    if python is None and all(importlib.util.find_spec(name) for name in ("jax", "libtpu")):
        python = sys.executable
    step, leaves = _traceable(model, specs, replicas)
    step.get_concrete_function(*leaves)  # An error in the model's own code is not one of the compiler.
    flops, start = math.nan, time.perf_counter()
    try:
        lowered = step.experimental_get_compiler_ir(*leaves)
        flops = matmul_flops(lowered(stage="hlo_serialized"))
        answer = _compile_for_tpu(lowered, topology, python) if python else _compile_for_host(lowered)
    except (ValueError, tf.errors.OpError) as error:
        answer = {"compiler": f"TensorFlow {tf.__version__}", "error": "program", "message": str(error)}
    message, memory = answer.get("message", ""), Memory(**answer["memory"]) if "memory" in answer else None
    needed_bytes = memory.total if memory else _needed_bytes(message)
    if answer.get("error") == "topology":
        raise ValueError(f"topology {topology!r} is none that {answer['compiler']} knows: {first_line(message)}")
    return TPUReport(
        topology=topology,
        replicas=replicas,
        rows=leaves[0].shape[0],
        micro_batches=model._micro_batches,
        compiler=answer["compiler"],
        seconds=answer.get("seconds", time.perf_counter() - start),
        problem=first_line(message) if message else None,
        compiles="error" not in answer or needed_bytes is not None,
        memory=memory,
        needed_bytes=needed_bytes,
        available_bytes=int(_GENERATIONS[topology.partition(":")[0]][1] * GIB),
        flops=flops,
        model_flops=None if model_flops is None else model_flops / replicas,
    )


def host_ops(model: ReplicatedModel, batch: Any) -> list[str]:
    """Returns the ops of a training step that a TPU cannot run, or that would make a run impossible to repeat.

    These are ops on strings, calls into Python, ops whose result has a shape that only the data tells, and random ops
    that keep their state to themselves. A step that goes to a TPU has none.

    Args:
        model, batch: as in `check_on_tpu`, the batch for one replica.

    Returns:
        "op 'name' (in function): why" for each, nested functions included.
    """
    step, leaves = _traceable(model, _share(batch, 1, model._micro_batches), 1)
    graph = step.get_concrete_function(*leaves).graph
    found = [(each, function, _fault(each)) for function, each in _operations(graph, "the step", set())]
    return [f"{each.type} {each.name!r} (in {function}): {fault}" for each, function, fault in found if fault]


def matmul_flops(hlo: bytes) -> float:
    """Returns the FLOPs of all matrix products of a program, those in a loop as often as it goes round.

    Args:
        hlo: a serialized HloModuleProto.

    Returns:
        2 for each multiplication and addition; of a conditional's branches the larger counts; NaN if there is a loop
        whose length is not written in the program.
    """
    module = hlo_pb2.HloModuleProto.FromString(hlo)
    computations = {each.id: each for each in module.computations}
    known: dict[int, float] = {}

    def count(number: int) -> float:
        if number not in known:
            instructions = {each.id: each for each in computations[number].instructions}
            known[number] = math.fsum(of_instruction(each, instructions) for each in instructions.values())
        return known[number]

    def of_instruction(each: Any, instructions: dict[int, Any]) -> float:
        if each.opcode == "dot":
            left = instructions[each.operand_ids[0]].shape.dimensions
            summed = [left[axis] for axis in each.dot_dimension_numbers.lhs_contracting_dimensions]
            return 2.0 * math.prod([*each.shape.dimensions, *summed])
        inner = [count(number) for number in each.called_computation_ids]
        if each.opcode == "while":
            body, condition = each.called_computation_ids
            return count(body) * _trip_count(computations, condition) if count(body) else 0.0
        return max(inner, default=0.0) if each.opcode == "conditional" else math.fsum(inner)

    return count(module.entry_computation_id)


def first_line(message: str) -> str:
    """Returns what a compiler's error says, in one line: the op that cannot be compiled where it is named."""
    missing = re.findall(r"(\w+) \(No registered [^{]*\{\{node ([^}]+)\}\}", message)
    if missing:
        return f"no kernel for a TPU: {', '.join(f'{kind} {name!r}' for kind, name in missing)}"
    return next((" ".join(line.split()) for line in message.splitlines() if line.strip()), "no message")


class _Topology(tf.distribute.StrategyExtended):
    """Replicas of which only one is ever traced; a sum over all of them is one XLA op."""

    def __init__(self, strategy: tf.distribute.Strategy, replicas: int) -> None:
        super().__init__(strategy)
        self._replicas = replicas

    @property
    def _num_replicas_in_sync(self) -> int:
        return self._replicas

    def _get_local_replica_id(self, replica_id_in_sync_group: int) -> int:
        return replica_id_in_sync_group

    def value_container(self, value: Any) -> Any:
        """A variable is its own container, as without a strategy."""
        return value

    def _use_merge_call(self) -> bool:
        return False

    def _replica_ctx_all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> list[tf.Tensor]:
        if reduce_op != tf.distribute.ReduceOp.SUM:
            raise ValueError(f"the check of a TPU knows how to sum over replicas, and not {reduce_op}.")
        group = [list(range(self._replicas))]
        return [
            gen_xla_ops.xla_all_reduce(each, group_assignment=group, reduce_op="Add", mode="CrossReplica")
            for each in value
        ]


class _TopologyStrategy(tf.distribute.Strategy):
    def __init__(self, replicas: int) -> None:
        super().__init__(_Topology(self, replicas))


def _traceable(model: ReplicatedModel, specs: Any, replicas: int) -> tuple[Any, list[tf.TensorSpec]]:
    """The step of one of `replicas` as a function of the leaves of its batch, variables captured; and the leaves."""
    model._build_optimizer()
    model._maybe_symbolic_build(data_batch=specs)
    strategy = _TopologyStrategy(replicas)
    flat = keras.tree.flatten(specs)

    def step(*leaves: tf.Tensor) -> Any:
        given = iter(leaves)
        data = keras.tree.pack_sequence_as(specs, [None if each is None else next(given) for each in flat])
        with tf.distribute.ReplicaContext(strategy, gen_xla_ops.xla_replica_id()):
            return model._train_replica(data)

    return tf.function(step, jit_compile=True, autograph=False), [each for each in flat if each is not None]


def _share(batch: Any, replicas: int, micro_batches: int) -> Any:
    """TensorSpecs of one replica's part of a global batch."""

    def share(leaf: Any) -> tf.TensorSpec | None:
        if leaf is None:
            return None
        spec = leaf if isinstance(leaf, tf.TensorSpec) else tf.TensorSpec(*_shape_and_dtype(leaf))
        if not spec.shape.is_fully_defined() or not spec.shape.rank:
            raise ValueError(
                f"a TPU needs batches of one known shape, but this one has {spec.shape}. Batch with "
                "drop_remainder=True and give every example the same length."
            )
        if spec.shape[0] % (replicas * micro_batches):
            raise ValueError(
                f"the global batch of {spec.shape[0]} rows must be a multiple of {replicas * micro_batches} = "
                f"{replicas} replicas x {micro_batches} micro-batches."
            )
        return tf.TensorSpec([spec.shape[0] // replicas, *spec.shape[1:]], spec.dtype)

    return keras.tree.map_structure(share, batch)


def _shape_and_dtype(leaf: Any) -> tuple[Any, tf.DType]:
    tensor = tf.convert_to_tensor(leaf)
    return tensor.shape, tensor.dtype


def _compile_for_tpu(lowered: Any, topology: str, python: str) -> dict[str, Any]:
    """What `tpu_compiler.py` says about a lowered step."""
    with tempfile.TemporaryDirectory(prefix="lmzoo-tpu-") as directory:
        program, result = Path(directory, "program"), Path(directory, "result")
        program.write_bytes(lowered(stage="stablehlo_serialized"))
        done = subprocess.run(
            [python, str(Path(__file__).with_name("tpu_compiler.py")), str(program), topology, str(result)],
            env={**os.environ, "TPU_LOG_DIR": directory},  # Or libtpu leaves its logs in /tmp.
            capture_output=True,
            text=True,
            check=False,
        )
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
    said = "\n".join(done.stderr.splitlines()[-5:])
    if done.returncode < 0:
        return {"compiler": "libtpu", "error": "program", "message": f"the compiler died of signal {-done.returncode}."}
    raise RuntimeError(f"the TPU compiler did not start with {python}. It needs jax and libtpu; it said:\n{said}")


def _compile_for_host(lowered: Any) -> dict[str, Any]:
    """What XLA for the host says about a lowered step; memory from where it placed each buffer."""
    start = time.perf_counter()
    module = hlo_pb2.HloProto.FromString(lowered(stage="optimized_hlo_proto_serialized"))
    memory = dict.fromkeys((field.name for field in dataclasses.fields(Memory)), 0)
    for each in module.buffer_assignment.buffer_allocations:
        if each.is_entry_computation_parameter:
            memory["arguments"] += each.size
            if each.maybe_live_out:
                memory["outputs"] += each.size
                memory["aliased"] += each.size
        elif each.maybe_live_out:
            memory["outputs"] += each.size
        elif each.is_constant:
            memory["code"] += each.size
        elif not each.is_thread_local:
            memory["temporaries"] += each.size
    return {"compiler": "XLA for the host", "seconds": time.perf_counter() - start, "memory": memory}


def _needed_bytes(message: str) -> int | None:
    """How much memory a compiler said that it would have needed."""
    match = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    return int(float(match.group(1)) * 2 ** (10 * (1 + "KMGT".index(match.group(2))))) if match else None


def _operations(graph: Any, function: str, seen: set[str]) -> Iterator[tuple[str, tf.Operation]]:
    """(function, operation) of a graph and all that it calls."""
    for each in graph.get_operations():
        yield function, each
        for value in each.node_def.attr.values():
            for name in (value.func.name, *(part.name for part in value.list.func)):
                if name and name not in seen:
                    seen.add(name)
                    yield from _operations(graph._get_function(name).graph, name, seen)


def _fault(operation: tf.Operation) -> str | None:
    """Why an operation has no place in a step for a TPU, or None."""
    tensors = (*operation.inputs, *operation.outputs)
    if operation.type in ("PyFunc", "EagerPyFunc", "PyFuncStateless"):
        return "calls Python"
    if any(each.dtype.base_dtype == tf.string for each in tensors):
        return "works on strings"
    hidden_seed = operation.op_def.is_stateful and any(each.name == "seed2" for each in operation.op_def.attr)
    if hidden_seed or re.match(r"Stateful(?!PartitionedCall)", operation.type):
        return "draws random numbers from a state of its own"
    for each in operation.outputs if operation.type != "Placeholder" else ():  # What is passed in was made elsewhere.
        if each.dtype not in (tf.resource, tf.variant) and not each.shape.is_fully_defined():
            return f"gives a shape that only the data tells, {each.shape}"
    return None


def _trip_count(computations: dict[int, Any], condition: int) -> float:
    """How often a loop goes round: the smallest number that its condition compares with."""
    numbers, waiting, seen = [], [condition], set()
    while waiting:
        number = waiting.pop()
        seen.add(number)
        for each in computations[number].instructions:
            waiting += [called for called in each.called_computation_ids if called not in seen]
            if each.opcode == "constant" and not each.shape.dimensions:
                numbers += [*each.literal.s32s, *each.literal.s64s]
    return min(numbers, default=math.nan)
