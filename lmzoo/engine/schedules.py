"""Learning-rate schedules: a linear warm-up, then one of five ways on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops


class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly over `warmup_steps` to `peak`, then follows `after`.

    The first step gets peak / warmup_steps, not 0, and step number warmup_steps is the first to get `peak`.

    Args:
        peak: highest learning rate, above 0.
        warmup_steps: steps of the rise, 0 or more.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and the rule.
    """

    def __init__(self, peak: float, warmup_steps: int = 0) -> None:
        super().__init__()
        if not peak > 0:
            raise ValueError(f"peak must be above 0, but is {peak}.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, but is {warmup_steps}.")
        self.peak, self.warmup_steps = float(peak), int(warmup_steps)

    def after(self, step: Any) -> Any:
        """Returns the learning rate as a share of `peak`, for a step (float32, from 0) past the warm-up."""
        raise NotImplementedError

    def __call__(self, step: Any) -> Any:
        """Returns the learning rate of a step, counted from 0."""
        step = ops.cast(step, "float32")
        rise = (step + 1.0) / max(self.warmup_steps, 1)
        return self.peak * ops.where(step < self.warmup_steps, rise, self.after(step))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {"peak": self.peak, "warmup_steps": self.warmup_steps}


class WarmupDecay(WarmupSchedule):
    """A warm-up schedule that reaches `final` at `total_steps` and stays there.

    Args:
        peak, warmup_steps: as in `WarmupSchedule`.
        total_steps: steps of the whole training, warm-up included, above `warmup_steps`.
        final: learning rate at the end, as a share of `peak`, 0 to 1.
    """

    def __init__(self, peak: float, total_steps: int, warmup_steps: int = 0, final: float = 0.1) -> None:
        super().__init__(peak, warmup_steps)
        if total_steps <= warmup_steps:
            raise ValueError(f"total_steps must be above warmup_steps={warmup_steps}, but is {total_steps}.")
        if not 0 <= final <= 1:
            raise ValueError(f"final must be a share of peak from 0 to 1, but is {final}.")
        self.total_steps, self.final = int(total_steps), float(final)

    def progress(self, step: Any, start: int) -> Any:
        """Returns how far a step is from `start` (0) to `total_steps` (1)."""
        return ops.clip((step + 1.0 - start) / (self.total_steps - start), 0.0, 1.0)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "total_steps": self.total_steps, "final": self.final}


@keras.saving.register_keras_serializable("lmzoo")
class Constant(WarmupSchedule):
    """Warm-up, then `peak` for ever."""

    def after(self, step: Any) -> Any:
        """Returns 1."""
        return ops.ones_like(step)


@keras.saving.register_keras_serializable("lmzoo")
class Cosine(WarmupDecay):
    """Warm-up, then half a cosine down to `final`.

    Reference: Loshchilov and Hutter, "SGDR", section 3, without restarts.
    """

    def after(self, step: Any) -> Any:
        """Returns the share of `peak`."""
        cosine = 0.5 * (1.0 + ops.cos(math.pi * self.progress(step, self.warmup_steps)))
        return self.final + (1.0 - self.final) * cosine


@keras.saving.register_keras_serializable("lmzoo")
class Linear(WarmupDecay):
    """Warm-up, then a straight line down to `final`."""

    def after(self, step: Any) -> Any:
        """Returns the share of `peak`."""
        return 1.0 - (1.0 - self.final) * self.progress(step, self.warmup_steps)


@keras.saving.register_keras_serializable("lmzoo")
class WarmupStableDecay(WarmupDecay):
    """Warm-up, then `peak`, then a straight line down to `final` over the last `decay_steps`.

    Reference: Hu et al., "MiniCPM", section 4.

    Args:
        peak, total_steps, warmup_steps, final: as in `WarmupDecay`.
        decay_steps: steps of the descent, 1 to total_steps - warmup_steps; None is a tenth of `total_steps`.
    """

    def __init__(
        self, peak: float, total_steps: int, warmup_steps: int = 0, final: float = 0.1, decay_steps: int | None = None
    ) -> None:
        super().__init__(peak, total_steps, warmup_steps, final)
        if decay_steps is None:
            decay_steps = max(1, min(total_steps // 10, total_steps - warmup_steps))
        if not 1 <= decay_steps <= total_steps - warmup_steps:
            raise ValueError(
                f"decay_steps must be from 1 to total_steps - warmup_steps = {total_steps - warmup_steps}, "
                f"but is {decay_steps}."
            )
        self.decay_steps = int(decay_steps)

    def after(self, step: Any) -> Any:
        """Returns the share of `peak`."""
        return 1.0 - (1.0 - self.final) * self.progress(step, self.total_steps - self.decay_steps)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "decay_steps": self.decay_steps}


@keras.saving.register_keras_serializable("lmzoo")
class InverseSquareRoot(WarmupSchedule):
    """Warm-up, then peak * sqrt(warmup_steps / step).

    Reference: Vaswani et al., "Attention Is All You Need", section 5.3; with `flat`, Raffel et al. (T5), section
    3.1.2, whose 1 / sqrt(max(step, 10^4)) is InverseSquareRoot(0.01, 10_000, flat=True).

    Args:
        peak: highest learning rate.
        warmup_steps: steps of the rise, 1 or more.
        flat: whether the warm-up stays at `peak` instead of rising to it.
    """

    def __init__(self, peak: float, warmup_steps: int = 10_000, flat: bool = False) -> None:
        super().__init__(peak, warmup_steps)
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps must be 1 or more for an inverse square root, but is {warmup_steps}.")
        self.flat = bool(flat)

    def after(self, step: Any) -> Any:
        """Returns the share of `peak`."""
        return ops.sqrt(self.warmup_steps / ops.maximum(step + 1.0, float(self.warmup_steps)))

    def __call__(self, step: Any) -> Any:
        """Returns the learning rate of a step, counted from 0."""
        return self.peak * self.after(ops.cast(step, "float32")) if self.flat else super().__call__(step)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "flat": self.flat}


SCHEDULES: dict[str, Callable[..., WarmupSchedule]] = {
    "constant": Constant,
    "cosine": Cosine,
    "linear": Linear,
    "inverse_sqrt": InverseSquareRoot,
    "inverse_sqrt_flat": functools.partial(InverseSquareRoot, flat=True),
    "wsd": WarmupStableDecay,
}


def make_schedule(
    name: str,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    final: float = 0.1,
    decay_steps: int | None = None,
) -> WarmupSchedule:
    """Returns a schedule by name; what a schedule has no use for is left out.

    Args:
        name: a key of `SCHEDULES`: constant, cosine, linear, inverse_sqrt, inverse_sqrt_flat or wsd.
        peak: highest learning rate.
        total_steps: optimizer steps of the whole training.
        warmup_steps: steps of the linear rise; of "inverse_sqrt_flat", those at `peak`.
        final: learning rate at the end, as a share of `peak`.
        decay_steps: steps of the descent of "wsd".

    Raises:
        ValueError: the name is unknown, or an argument is out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, but is {name!r}.")
    if name not in ("cosine", "linear", "wsd"):
        return SCHEDULES[name](peak, warmup_steps)
    settings: dict[str, Any] = {"total_steps": total_steps, "warmup_steps": warmup_steps, "final": final}
    if name == "wsd":
        settings["decay_steps"] = decay_steps
    return SCHEDULES[name](peak, **settings)
