"""What keeps a run from harm: an end that was asked for, losses that leave the rails, input that does not come."""

from __future__ import annotations

import collections
import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import keras
import tensorflow as tf

from lmzoo.engine.model import ReplicatedModel
from lmzoo.engine.strategy import num_workers

_LEAST_LOSSES = 10
_MOST_LOSSES = 50


class Termination:
    """Turns SIGTERM, by which a machine is taken away, into an orderly end with exit status 0.

    Where nothing can be lost the process ends at once. Inside `held()` it goes on, and `requested` says that it should
    come to an end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._held = False
        self._before: Any = None

    def __enter__(self) -> Termination:
        self._before = signal.getsignal(signal.SIGTERM)
        self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        if _is_main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def listen(self) -> None:
        """Takes the signal (back): TensorFlow takes it for itself when it joins a cluster. Only a main thread can."""
        if _is_main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the signal is only noted."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._held:
            raise SystemExit(0)


@contextlib.contextmanager
def told_of_lost_workers() -> Iterator[None]:
    """Inside, what TensorFlow raises when another worker is gone becomes a ConnectionError that says what to do."""
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.DeadlineExceededError) as error:
        reason = next(iter(error.message.splitlines()), "")
        raise ConnectionError(
            f"lost another worker ({reason}). Start all of them again, to go on from the newest checkpoint."
        ) from error


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class StopOnTermination(keras.callbacks.Callback):
    """Ends `fit` after the step in which the process was asked to end: all workers after the same one."""

    model: ReplicatedModel

    def __init__(self, termination: Termination) -> None:
        super().__init__()
        self._termination = termination

    @property
    def stopped(self) -> bool:
        """Whether the wish of any worker has come to all of them."""
        alone = num_workers(self.model.distribute_strategy) == 1
        return self._termination.requested if alone else self.model.is_asked_to_stop

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Passes the wish on, and ends training once all workers know of it."""
        if self._termination.requested:
            self.model.ask_to_stop()
        if self.stopped:
            self.model.stop_training = True


class LossSpikeError(ArithmeticError):
    """The training loss has jumped."""


class LossGuard:
    """Ends a run without finite gradients, and calls for a step back when the loss jumps.

    Args:
        max_skipped: how many steps in a row may be left out because loss or gradient was not finite.
        spike_factor: a loss above so many times the median of the newest 50 is a spike; None finds none.
        losses: training losses of earlier records, oldest first.
    """

    def __init__(self, *, max_skipped: int, spike_factor: float | None, losses: Sequence[float] = ()) -> None:
        self.max_skipped = max_skipped
        self.spike_factor = spike_factor
        self.forget(losses)

    def forget(self, losses: Sequence[float]) -> None:
        """Goes back to the losses of an earlier time."""
        self.losses = collections.deque(losses, maxlen=_MOST_LOSSES)

    def check(self, model: ReplicatedModel, step: int, loss: float, where: Callable[[int, int], str]) -> None:
        """Looks at a record.

        Args:
            model: that trains.
            step: of the record.
            loss: mean since the record before; NaN if no step counted.
            where: says what steps, from the first to the last, were made of, and where the last good checkpoint is.

        Raises:
            FloatingPointError: the newest `max_skipped` steps were all left out.
            LossSpikeError: the loss has jumped.
        """
        skipped = model.skipped_in_a_row
        if skipped >= self.max_skipped:
            raise FloatingPointError(
                f"neither loss nor gradient was finite in {skipped} steps in a row, {step - skipped + 1} to {step}; "
                f"they were made of {where(step - skipped + 1, step)}. Try a lower learning rate, a longer warm-up, or "
                "other data."
            )
        if not math.isfinite(loss):
            return
        if self.spike_factor is not None and len(self.losses) >= _LEAST_LOSSES:
            median = statistics.median(self.losses)
            if loss > self.spike_factor * median:
                raise LossSpikeError(
                    f"the loss jumped to {loss:.4f} at step {step}, {loss / median:.2f} times the median before it"
                )
        self.losses.append(loss)


class StallWatch(keras.callbacks.Callback):
    """Tells when no step has ended for a while, and whether it is the input that does not come.

    Args:
        seconds: without a step, > 0.
        say: is told a line, from a thread of its own.
        describe: says of step n of this call of `fit`, from 0, what its batch is made of.
        parts: into how many parts a batch is cut, each of which is noted by itself.
    """

    def __init__(
        self, seconds: float, say: Callable[[str], None], describe: Callable[[int], str], *, parts: int = 1
    ) -> None:
        super().__init__()
        self._seconds, self._say, self._describe, self._parts = seconds, say, describe, parts
        self._steps = self._made = 0
        self._ahead: set[int] = set()
        self._lock = threading.Lock()
        self._done = threading.Event()

    def note_part(self, number: int) -> None:
        """Notes that the input pipeline has made a part, counted from 0; called from its threads, in any order."""
        with self._lock:
            self._ahead.add(number)
            while self._made in self._ahead:
                self._ahead.remove(self._made)
                self._made += 1

    def on_train_begin(self, logs: Any = None) -> None:
        """Starts to watch."""
        self._last = time.monotonic()
        threading.Thread(target=self._watch, name="stall-watch", daemon=True).start()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Notes that a step has ended."""
        self._steps, self._last = batch + 1, time.monotonic()

    def on_train_end(self, logs: Any = None) -> None:
        """Ends the watch."""
        self.stop()

    def stop(self) -> None:
        """Ends the watch, after an error too."""
        self._done.set()

    def _watch(self) -> None:
        told = 0
        while not self._done.wait(min(1.0, self._seconds / 4)):
            quiet = time.monotonic() - self._last
            if quiet < self._seconds:
                told = 0
            elif quiet >= (told + 1) * self._seconds:
                told += 1
                self._say(f"no step for {quiet:.0f} s: {self._why(self._made // self._parts)}")

    def _why(self, made: int) -> str:
        if made > self._steps:
            return "the next batch is ready, so it is the step itself that takes long"
        missing = f"the input pipeline has not made the next batch yet, {self._describe(made)}"
        return missing if made else f"the step is still being compiled, or {missing}"
