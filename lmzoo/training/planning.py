"""Scaling plan: what a pretraining run needs of memory, arithmetic and time, before a device is rented for it."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lmzoo.config import ModelConfig, closest
from lmzoo.data.objectives import lengths_of
from lmzoo.engine.strategy import BatchPlan
from lmzoo.models import find_preset
from lmzoo.training.building import SHAPE_SETTINGS, with_vocab_size
from lmzoo.training.memory import (
    COMPUTE_BYTES,
    Memory,
    Variables,
    count_variables,
    kept_bytes,
    parse_bytes,
    row_bytes,
    step_memory,
)
from lmzoo.training.objectives import ObjectiveName, empty_batch, objective_before_text

PEAK_FLOPS: dict[str, float] = {
    "v100": 125e12,
    "t4": 65e12,
    "a100": 312e12,
    "h100": 989e12,
    "l4": 121e12,
    "tpu-v3": 61.5e12,  # A core, which is what a strategy counts; later chips count as one.
    "tpu-v4": 275e12,
    "tpu-v5e": 197e12,
    "tpu-v5p": 459e12,
}
"""Accelerator -> the makers' figure for dense matrix products in bfloat16 (float16 where there is none)."""

# Fields of the model's config that a plan, like a run, may replace.
_SHAPE = ("vocab_size", *SHAPE_SETTINGS)
_OBJECTIVE = ("objective", "noise_density", "mean_span_length")
_CHINCHILLA = 20
_MOST_ROWS = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What a plan is made for; also the flags of `lmzoo plan`."""

    preset: str = "gpt2"
    """Shape of the model."""
    vocab_size: int | None = None
    """Instead of the preset's."""
    num_layers: int | None = None
    """Instead of the preset's."""
    num_decoder_layers: int | None = None
    """Instead of the preset's."""
    num_heads: int | None = None
    """Instead of the preset's."""
    head_dim: int | None = None
    """Instead of the preset's."""
    model_dim: int | None = None
    """Instead of the preset's."""
    feedforward_dim: int | None = None
    """Instead of the preset's."""
    dropout_rate: float = 0.0
    """In training."""
    objective: ObjectiveName = "auto"
    """What is learnt; auto is the architecture's own. It says how long the rows of a decoder are."""
    noise_density: float = 0.15
    """Share of the tokens that span corruption takes out."""
    mean_span_length: float | None = None
    """Tokens that it takes out in a row, on average; by default 3, or 20 bytes."""
    seq_length: int | None = None
    """Tokens a row; by default the context length of the preset."""
    long_seq_length: int | None = None
    """Tokens a row in a second phase of a run, which is then what memory is reckoned for; by default there is none."""
    long_share: float = 0.1
    """Share of the steps that are of the second phase."""
    optimizer: Literal["adamw", "adafactor", "lamb", "lion", "muon"] = "adamw"
    """How gradients become updates."""
    dtype: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "mixed_bfloat16"
    """Precision of the computation; weights are float32."""
    remat: Literal["auto", "none", "block"] = "auto"
    """Whether blocks are recomputed going backward; auto does so if no row fits otherwise."""

    strategy: Literal["one", "mirrored", "multiworker", "tpu"] = "one"
    """Devices: one, the GPUs of one machine, those of several, or the cores of a TPU."""
    devices: int = 1
    """How many there are in all."""
    memory: str = "80GB"
    """Of each device: 80GB is 80e9 bytes, 80GiB is 80 * 2**30."""
    accelerator: str = "a100"
    """Whose peak to reckon with: v100, t4, a100, h100, l4, tpu-v3, tpu-v4, tpu-v5e or tpu-v5p."""
    peak_flops: float | None = None
    """Floating-point operations a second of one device, instead of an accelerator's."""
    mfu: float = 0.4
    """Share of the peak that training reaches."""

    micro_batch: int | None = None
    """Rows that a device takes at a time; by default as many as fit and divide the batch."""
    batch_tokens: int = 2**19
    """Tokens of one update, those that are written included; about half a million suit models of the size of GPT-2."""
    tokens: float | None = None
    """Tokens to train on; by default 20 a parameter."""

    def __post_init__(self) -> None:
        for name in ("devices", "batch_tokens", "seq_length", "long_seq_length", "micro_batch"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"PlanConfig.{name} is {value!r}, but must be an integer of 1 or more.")
        for name in ("peak_flops", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"PlanConfig.{name} is {value!r}, but must be a number above 0.")
        if not 0.0 < self.long_share < 1.0:
            raise ValueError(f"PlanConfig.long_share is {self.long_share!r}, but must lie in (0, 1).")
        if self.long_seq_length is not None and not 0 < (self.seq_length or 0) < self.long_seq_length:
            raise ValueError(
                f"PlanConfig.long_seq_length is {self.long_seq_length}, but seq_length is {self.seq_length}: give a "
                "shorter one for the first phase."
            )
        if not 0.0 < self.mfu <= 1.0:
            raise ValueError(f"PlanConfig.mfu is {self.mfu!r}, but must lie in (0, 1].")
        if self.strategy == "one" and self.devices > 1:
            raise ValueError(f"PlanConfig.devices is {self.devices}, but strategy 'one' has one. Try 'mirrored'.")
        if self.accelerator not in PEAK_FLOPS:
            raise ValueError(f"there is no accelerator {self.accelerator!r}.{closest(self.accelerator, [*PEAK_FLOPS])}")
        parse_bytes(self.memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that fits: how its batch is cut, what it holds, and how long it takes. `str(plan)` tells it all.

    Args:
        config: what it was made for.
        shape: the model's.
        lengths: places in a row: T, and U where there is a decoder; in the second phase if there are two.
        variables: weights and optimizer.
        rows_without_remat, rows_with_remat: the most rows that fit on a device at a time; 0 if not one does.
        remat: whether blocks are recomputed.
        batch: rows, devices and micro-batches.
        memory: of a device, for `batch.rows` rows at a time.
        activations_of_a_row: bytes that the forward pass keeps of one row, without and with remat.
        flops_per_token: of a training step, not counting what is computed again.
        tokens: to train on.
        steps: updates that this takes.
        tokens_per_second: expected of all devices together.
    """

    config: PlanConfig
    shape: ModelConfig
    lengths: tuple[int, ...]
    variables: Variables
    rows_without_remat: int
    rows_with_remat: int
    remat: bool
    batch: BatchPlan
    memory: Memory
    activations_of_a_row: tuple[int, int]
    flops_per_token: float
    tokens: float
    steps: int
    tokens_per_second: float

    @property
    def row_tokens(self) -> int:
        """Tokens a row, on both sides where there is a decoder; in the second phase if there are two."""
        return sum(self.lengths)

    @property
    def first_batch(self) -> int:
        """Rows of a global batch in the first phase: so many that it has about as many tokens as in the second."""
        if self.config.long_seq_length is None or self.config.seq_length is None:
            return self.batch.global_batch
        parts = self.batch.replicas * self.batch.micro_batches
        rows = self.batch.global_batch * self.config.long_seq_length / self.config.seq_length
        return round(rows / parts) * parts

    @property
    def seconds(self) -> float:
        """Expected time of the whole run."""
        return self.steps * self.batch.global_batch * self.row_tokens / self.tokens_per_second

    @property
    def command(self) -> str:
        """What starts the run; a source of text is to be added."""
        config, words = self.config, ["lmzoo", "pretrain", "--preset", self.config.preset]
        for name in _SHAPE:
            if getattr(config, name) is not None:
                words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
        if config.seq_length is not None:
            words += ["--context-length", str(self.shape.context_length)]
        if config.long_seq_length is not None:
            words += ["--seq-length", str(config.seq_length), "--long-seq-length", str(config.long_seq_length)]
            words += ["--long-share", str(config.long_share), "--long-batch-size", str(self.batch.global_batch)]
        if config.dropout_rate:
            words += ["--dropout-rate", str(config.dropout_rate)]
        for field in dataclasses.fields(config):
            if field.name in _OBJECTIVE and getattr(config, field.name) != field.default:
                words += [f"--{field.name.replace('_', '-')}", str(getattr(config, field.name))]
        words += ["--strategy", config.strategy, "--dtype", config.dtype, "--optimizer", config.optimizer]
        words += ["--batch-size", str(self.first_batch), "--micro-batches", str(self.batch.micro_batches)]
        words += ["--steps", str(self.steps), *(["--remat", "block"] if self.remat else [])]
        return shlex.join(words)

    def __str__(self) -> str:
        config, memory, variables = self.config, self.memory, self.variables
        available = parse_bytes(config.memory)
        step_tokens = self.batch.global_batch * self.row_tokens
        rows_of = f"rows of {_tokens(self.lengths)} tokens"
        if config.long_seq_length is not None:
            rows_of += f" in {config.long_share:.0%} of the steps, of {config.seq_length:,} before"
        without, with_remat = (_bytes(each) for each in self.activations_of_a_row)
        rows = [
            ("model", f"{config.preset}, {variables.parameters:,} parameters, {rows_of}"),
            ("weights", _bytes(variables.weights)),
            ("gradients", _bytes(4 * variables.parameters)),
            ("optimizer", f"{_bytes(variables.optimizer_state)} ({config.optimizer})"),
            ("activations of a row", f"{without}, {with_remat} with remat"),
            ("rows that fit a device", f"{self.rows_without_remat:,}, {self.rows_with_remat:,} with remat"),
            ("batch", f"{self.batch}: {step_tokens:,} tokens"),
            ("remat", "block" if self.remat else "none"),
            ("memory of a device", f"{_bytes(memory.total)} of {_bytes(available)}, most at the {memory.moment}:"),
            *((f"  {name}", _bytes(value)) for name, value in _parts(memory)),
            ("FLOPs", f"{self.flops_per_token:.3g} a token, {self.flops_per_token * step_tokens:.3g} a step"),
            (
                "run",
                f"{self.tokens:.3g} tokens, {self.tokens / variables.parameters:.1f} a parameter: {self.steps:,} steps",
            ),
            ("Chinchilla", f"{_CHINCHILLA * variables.parameters:.3g} tokens, {_CHINCHILLA} a parameter"),
            ("speed", self._speed()),
            ("start it with", self.command),
        ]
        lines = [f"{name:<{max(len(name) for name, _ in rows)}}  {value}" for name, value in rows]
        note = (
            "Memory was checked against measured peaks on CPUs only, without XLA, which needs less. On a CPU the "
            "process takes some 0.6 GB more for TensorFlow, and 20 MB a block for its graph."
        )
        return "\n".join([*lines, note])

    def _speed(self) -> str:
        whose = "the peak given" if self.config.peak_flops else f"the peak of {self.config.accelerator}"
        share = f"{self.config.mfu:.0%} of {whose}"
        if self.remat:
            share += ", a quarter of that spent on recomputing"
        return f"{self.tokens_per_second:,.0f} tokens a second, {_duration(self.seconds)} in all, at {share}"


def plan(config: PlanConfig | None = None, **fields: Any) -> Plan:
    """Works out how to train a preset on given devices.

    Args:
        config: the settings; or give its fields as keywords.
        fields: fields of `PlanConfig`.

    Raises:
        ValueError: a setting is out of range, or the model does not fit; then it says by how much.

    Reference:
        Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", table 3: about 20 tokens a parameter.
    """
    config = dataclasses.replace(config, **fields) if config is not None else PlanConfig(**fields)
    model_class, shape = find_preset(config.preset)
    given = {name: getattr(config, name) for name in _SHAPE if getattr(config, name) is not None}
    longest = config.long_seq_length or config.seq_length or shape.context_length
    shape = with_vocab_size(shape, given.pop("vocab_size", shape.vocab_size))
    shape = shape.replace(dropout_rate=config.dropout_rate, context_length=longest, **given)
    variables = count_variables(model_class, shape, optimizer=config.optimizer, dtype=config.dtype)
    objective = objective_before_text(config, model_class, shape)
    lengths = lengths_of(empty_batch(objective, 1, longest))

    def memory(rows: int, remat: bool, accumulates: bool) -> Memory:
        return step_memory(
            shape,
            variables,
            rows=rows,
            lengths=lengths,
            remat=remat,
            accumulates=accumulates,
            optimizer=config.optimizer,
            dtype=config.dtype,
            devices=config.devices,
        )

    available = parse_bytes(config.memory)
    for remat in {"none": (False,), "block": (True,), "auto": (False, True)}[config.remat]:
        batch = _cut(config, sum(lengths), lambda rows, parts: memory(rows, remat, parts > 1).total <= available)  # noqa: B023
        accumulates = batch.micro_batches > 1
        needed = memory(batch.rows, remat, accumulates)
        if needed.total <= available:
            break
    else:
        what = f"{batch.rows} row{'s' * (batch.rows > 1)} of {_tokens(lengths)} tokens at a time"
        raise ValueError(
            f"{config.preset} does not fit: with {what} and remat {'block' if remat else 'none'} a device needs "
            f"{_bytes(needed.total)}, {_bytes(needed.total - available)} more than its {_bytes(available)}. Weights, "
            "gradients and optimizer alone take "
            f"{_bytes(variables.weights + 4 * variables.parameters + variables.optimizer_state)}. "
            f"Try {_advice(config, remat)}."
        )
    flops = shape.training_flops_per_token(*lengths)
    if config.long_seq_length is not None and config.seq_length is not None:
        short = lengths_of(empty_batch(objective, 1, config.seq_length))
        flops += (1 - config.long_share) * (shape.training_flops_per_token(*short) - flops)
    tokens = config.tokens or float(_CHINCHILLA * variables.parameters)
    peak = config.peak_flops or PEAK_FLOPS[config.accelerator]
    # Recomputing repeats the forward pass, one of three parts.
    speed = config.devices * peak * config.mfu / flops * (0.75 if remat else 1.0)
    row = row_bytes(shape, 1, lengths, COMPUTE_BYTES[config.dtype])
    return Plan(
        config=config,
        shape=shape,
        lengths=lengths,
        variables=variables,
        rows_without_remat=_most(lambda rows: memory(rows, False, accumulates).total <= available),
        rows_with_remat=_most(lambda rows: memory(rows, True, accumulates).total <= available),
        remat=remat,
        batch=batch,
        memory=needed,
        activations_of_a_row=(kept_bytes(row, remat=False), kept_bytes(row, remat=True)),
        flops_per_token=flops,
        tokens=tokens,
        steps=math.ceil(tokens / (batch.global_batch * sum(lengths))),
        tokens_per_second=speed,
    )


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number of rows that fits, 0 if none does; what fits once fits with less."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _MOST_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _cut(config: PlanConfig, row_tokens: int, fits: Callable[[int, int], bool]) -> BatchPlan:
    """Cuts about `batch_tokens` into as few and as equal parts as fit; one row at a time if nothing does.

    Args:
        fits: whether a device has room for so many rows at a time, given the number of micro-batches.
    """
    rows = max(1, round(config.batch_tokens / row_tokens / config.devices))  # Of a device, in one update.
    if config.micro_batch is not None:
        return BatchPlan(config.micro_batch, config.devices, max(1, round(rows / config.micro_batch)))
    if fits(rows, 1):
        return BatchPlan(rows, config.devices)
    most = min(rows, max(1, _most(lambda count: fits(count, 2))))
    parts = math.ceil(rows / most)
    return BatchPlan(math.ceil(rows / parts), config.devices, parts)


def _advice(config: PlanConfig, remat: bool) -> str:
    ways = [] if remat else ["remat='block'"]
    ways += [] if (config.micro_batch or 1) == 1 else ["a smaller micro_batch"]
    ways += [] if config.optimizer == "adafactor" else ["optimizer='adafactor'"]
    return ", ".join([*ways, "a shorter seq_length", "a smaller model"])


def _parts(memory: Memory) -> list[tuple[str, int]]:
    """What the memory is made of, by name, without what is 0."""
    values = {name: value for name, value in dataclasses.asdict(memory).items() if name != "moment"}
    return [(name.replace("_", " "), value) for name, value in values.items() if value]


def _tokens(lengths: Sequence[int]) -> str:
    """Tokens a row to read: "512", or "512 + 114" where there is a decoder."""
    return " + ".join(f"{length:,}" for length in lengths)


def _bytes(count: float) -> str:
    """A number of bytes to read: "6.23 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    """A time to read, in its largest unit."""
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
