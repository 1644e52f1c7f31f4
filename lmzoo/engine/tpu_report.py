"""What compiling a training step for a TPU told, and how it is printed."""

from __future__ import annotations

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a compiled program needs on each replica, as its compiler counts them.

    Attributes:
        arguments: weights, state of the optimizer, the batch.
        outputs: what the program returns, updated variables included.
        aliased: the part of the outputs that takes the place of arguments: variables updated in place.
        temporaries: activations, gradients and the like, at most at once.
        code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it, with what is updated in place counted once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class TPUReport:
    """What compiling a training step told.

    Attributes:
        topology: the TPU, such as "v5e:2x2".
        replicas: how many replicas it has.
        rows: rows of the batch that each replica gets.
        micro_batches: parts that each replica takes them in.
        compiler: "libtpu" with its version, or "XLA for the host".
        seconds: how long compiling took.
        problem: None, or why it does not compile or fit, in one line.
        compiles: whether every op has its place on the device. A program that does not fit may compile.
        memory: None where the compiler gave up before it counted.
        needed_bytes: memory of a replica; only this is known of a program that does not fit.
        available_bytes: what a program of a replica may use.
        flops: of one step's matrix products on one replica; NaN if a loop's length is not known.
        model_flops: what the caller expects of `flops`, or None.
    """

    topology: str
    replicas: int
    rows: int
    micro_batches: int
    compiler: str
    seconds: float
    problem: str | None
    compiles: bool
    memory: Memory | None
    needed_bytes: int | None
    available_bytes: int
    flops: float
    model_flops: float | None

    @property
    def is_for_tpu(self) -> bool:
        """Whether a TPU's compiler said all this."""
        return self.compiler.startswith("libtpu")

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None if not known, as the host's compiler has other temporaries than a TPU's."""
        if self.needed_bytes is None:
            return None
        doubtful = self.memory.temporaries if self.memory and not self.is_for_tpu else 0
        if self.needed_bytes - doubtful > self.available_bytes:
            return False
        return True if self.is_for_tpu else None

    def __str__(self) -> str:
        lines = [
            (
                "training step",
                f"{self.topology}, {self.replicas} replicas, each {self.rows} rows"
                + (f" in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""),
            ),
            ("compiles", f"{'yes' if self.compiles else 'no'}, {self.compiler}, {self.seconds:.0f} s"),
        ]
        if self.problem:
            lines.append(("problem", self.problem))
        if self.needed_bytes is not None:
            verdict = {True: "fits", False: "does not fit", None: "not known whether a TPU's temporaries fit"}[
                self.fits
            ]
            needed, available = _size(self.needed_bytes), _size(self.available_bytes)
            lines.append(("memory a replica", f"{needed} of {available}: {verdict}"))
        if self.memory:
            beside = self.memory.outputs - self.memory.aliased
            lines += [
                ("  arguments", f"{_size(self.memory.arguments)} (weights, optimizer, batch; updated in place)"),
                ("  outputs beside", _size(beside)),
                ("  temporaries", _size(self.memory.temporaries)),
                ("  program", _size(self.memory.code)),
            ]
        if not math.isnan(self.flops):
            share = f", {self.flops / self.model_flops:.2f} of the model's own count" if self.model_flops else ""
            lines.append(("FLOPs a replica", f"{self.flops:.4g} in matrix products{share}"))
        return "\n".join(f"{name:18}{value}" for name, value in lines)


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
