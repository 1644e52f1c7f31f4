"""What a run records while it trains: loss, learning rate, speed, and share of the machine's peak."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from lmzoo.engine.model import ReplicatedModel
from lmzoo.files import write_whole


class MetricsLog(keras.callbacks.Callback):
    """Appends a record to `metrics.jsonl` and to TensorBoard every so many steps.

    A training record holds step, loss (mean since the record before), learning_rate, gradient_norm (of the last step,
    before clipping), tokens, tokens_per_second, real_tokens_per_second (without padding; if that is known), mfu (share
    of the measured peak; None if that is unknown) and seconds of training in this process. Evaluation and checkpoints
    do not count as training time.

    Args:
        directory: of the run; None writes nothing (on all workers but one).
        every: steps between two records, >= 1.
        tokens_at: gives the tokens of the first so many steps, of all devices.
        real_tokens_at: the same without padding.
        flops_at: gives the floating-point operations of the first so many steps; None if they are unknown.
        peak_flops: floating-point operations a second that the devices reach together, or None.
        check: is given step and loss of each record, and may raise.
    """

    model: ReplicatedModel

    def __init__(
        self,
        directory: Path | None,
        *,
        every: int,
        tokens_at: Callable[[int], float],
        real_tokens_at: Callable[[int], float] | None = None,
        flops_at: Callable[[int], float] | None = None,
        peak_flops: float | None = None,
        check: Callable[[int, float], None],
    ) -> None:
        super().__init__()
        self.path = None if directory is None else directory / "metrics.jsonl"
        self.every = every
        self.tokens_at = tokens_at
        self.real_tokens_at = real_tokens_at
        self.flops_at = flops_at
        self.peak_flops = peak_flops
        self.check = check
        self.seconds = self._new_seconds = 0.0
        self._summary = None if directory is None else tf.summary.create_file_writer(str(directory / "tensorboard"))

    def go_back_to(self, step: int, *, evaluated: bool) -> None:
        """Forgets what came after a step, because it is going to be done again.

        Args:
            step: of the checkpoint that training goes on from, 0 at the start.
            evaluated: whether that checkpoint has been evaluated.
        """
        self.step = self._recorded_step = step
        self._new_seconds = 0.0
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_before(line, step, evaluated)]
            write_whole(self.path, "".join(line + "\n" for line in kept))

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts the clock."""
        self._first_step, self._since = self.step, time.perf_counter()

    def on_train_end(self, logs: Any = None) -> None:
        """Stops the clock."""
        self._new_seconds += time.perf_counter() - self._since

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the step, and writes a record if it is time."""
        before, self.step = self.step, self._first_step + batch + 1  # Of several in one execution, Keras says the last.
        if self.step // self.every > before // self.every:
            self._record(logs or {})

    def _record(self, logs: dict[str, Any]) -> None:
        loss = self.model.take_recent_loss()
        now = time.perf_counter()
        seconds = self._new_seconds + now - self._since
        self.seconds += seconds

        def speed(count: Callable[[int], float]) -> float:
            return (count(self.step) - count(self._recorded_step)) / seconds

        record: dict[str, float | None] = {
            "step": self.step,
            "loss": loss,
            "learning_rate": _number(self.model.optimizer.learning_rate),
            "gradient_norm": _number(logs.get("gradient_norm", math.nan)),
            "tokens": int(self.tokens_at(self.step)),
            "tokens_per_second": round(speed(self.tokens_at), 1),
        }
        if self.real_tokens_at is not None:
            record["real_tokens_per_second"] = round(speed(self.real_tokens_at), 1)
        record["mfu"] = None
        if self.flops_at is not None and self.peak_flops:
            record["mfu"] = round(speed(self.flops_at) / self.peak_flops, 4)
        record["seconds"] = round(self.seconds, 3)
        self.write(record)
        self._since, self._new_seconds, self._recorded_step = now, 0.0, self.step
        self.check(self.step, loss)

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if self._summary is not None:
            self._summary.close()

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record, which names its step."""
        if self.path is None or self._summary is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        with self._summary.as_default(step=record["step"]):
            for name, value in record.items():
                if name != "step" and value is not None:
                    tf.summary.scalar(name, value)


def _number(scalar: Any) -> float:
    """The value of a scalar, be it a tensor or a variable, mirrored or not."""
    return float(keras.ops.convert_to_numpy(scalar))


def _is_before(line: str, step: int, evaluated: bool) -> bool:
    """Whether a line of metrics.jsonl is of a step that is not going to be done again."""
    try:
        record = json.loads(line)
        return record["step"] <= step - (0 if evaluated or "validation_loss" not in record else 1)
    except (ValueError, KeyError, TypeError):
        return False  # Cut short when the process was killed.


def measure_peak_flops(dtype: str, *, size: int = 1536, seconds: float = 0.25) -> float:
    """Floating-point operations a second that one device reaches on a large matrix product in `dtype`."""
    matrix = tf.cast(tf.random.stateless_normal((size, size), seed=(0, 1)), dtype)

    @tf.function(autograph=False)
    def multiply() -> tf.Tensor:
        return tf.reduce_sum(tf.cast(tf.matmul(matrix, matrix), tf.float32))

    multiply().numpy()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply().numpy()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best
