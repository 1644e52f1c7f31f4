"""What a run records while it trains: loss, learning rate, speed, and share of the machine's peak."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf


class MetricsLog(keras.callbacks.Callback):
    """Appends a record to `metrics.jsonl` and to TensorBoard every so many steps.

    A training record holds step, loss (mean since the record before), learning_rate, gradient_norm (of the last step,
    before clipping), tokens, tokens_per_second, mfu (share of the measured peak; None if that is unknown) and seconds
    of training in this process. Evaluation and checkpoints do not count as training time.

    Args:
        directory: of the run.
        every: steps between two records, >= 1.
        tokens_per_step: in a global batch.
        flops_per_token: of a training step.
        peak_flops: floating-point operations a second that the devices reach together, or None.
        first_step: steps done before this run.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        first_step: int = 0,
    ) -> None:
        super().__init__()
        self.path = directory / "metrics.jsonl"
        self.every = every
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.seconds = 0.0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():  # Steps after the checkpoint that training goes on from are going to be done again.
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= first_step]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._summary = tf.summary.create_file_writer(str(directory / "tensorboard"))

    def begin_round(self, step: int) -> None:
        """Says how many steps were done when the next call of `fit` begins."""
        self.step = self._first_step = step
        self._since = time.perf_counter()
        self._last_step = step
        self._last_sums = (0.0, 0.0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the step, and writes a record if it is time."""
        self.step = self._first_step + batch + 1  # Of several steps in one execution, Keras reports the last.
        if self.step // self.every > self._last_step // self.every:
            self._record(logs or {})

    def _record(self, logs: dict[str, Any]) -> None:
        loss = self.model.metrics[0]
        sums = (_number(loss.total), _number(loss.count))
        weight = sums[1] - self._last_sums[1]
        mean = (sums[0] - self._last_sums[0]) / weight if weight else math.nan
        now = time.perf_counter()
        seconds, steps = now - self._since, self.step - self._last_step
        self.seconds += seconds
        speed = steps * self.tokens_per_step / seconds
        mfu = speed * self.flops_per_token / self.peak_flops if self.peak_flops else None
        self.write(
            {
                "step": self.step,
                "loss": mean,
                "learning_rate": _number(self.model.optimizer.learning_rate),
                "gradient_norm": float(logs.get("gradient_norm", math.nan)),
                "tokens": self.step * self.tokens_per_step,
                "tokens_per_second": round(speed, 1),
                "mfu": None if mfu is None else round(mfu, 4),
                "seconds": round(self.seconds, 3),
            }
        )
        self._since, self._last_step, self._last_sums = now, self.step, sums

    def close(self) -> None:
        """Closes the TensorBoard file."""
        self._summary.close()

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record, which names its step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        with self._summary.as_default(step=record["step"]):
            for name, value in record.items():
                if name != "step" and value is not None:
                    tf.summary.scalar(name, value)


def _number(scalar: Any) -> float:
    """The value of a scalar, be it a tensor or a variable, mirrored or not."""
    return float(keras.ops.convert_to_numpy(scalar))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # A line cut short by a killed run.


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
