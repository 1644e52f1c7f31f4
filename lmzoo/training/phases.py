"""The phases of a pretraining run: most steps on short rows, and the last of them on long ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from lmzoo.training.settings import PretrainConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps on rows of one length.

    Args:
        number: of the phase, from 0.
        start: steps done when it begins.
        stop: steps done when it ends.
        seq_length: T, tokens a row.
        batch_size: rows of a global batch.
    """

    number: int
    start: int
    stop: int
    seq_length: int
    batch_size: int

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, padding included."""
        return self.batch_size * self.seq_length

    def __str__(self) -> str:
        return f"steps {self.start + 1} to {self.stop} on {self.batch_size} rows of {self.seq_length} tokens"


def make_phases(config: PretrainConfig, context_length: int, parts: int) -> tuple[Phase, ...]:
    """The phases of a run, each of at least one step.

    Args:
        config: the settings.
        context_length: positions of the model.
        parts: replicas times micro-batches, of which a batch must be a multiple.

    Raises:
        ValueError: a row is longer than the model reads, or the second phase's are no longer than the first's.

    Reference:
        Devlin et al. 2019, "BERT", appendix A.2: 90% of the steps on rows of 128 tokens, the rest on 512.
    """
    length, long_length = config.seq_length or context_length, config.long_seq_length
    for name, value in (("seq_length", length), ("long_seq_length", long_length)):
        if value is not None and value > context_length:
            raise ValueError(
                f"PretrainConfig.{name} is {value}, but the model reads {context_length} tokens at most "
                "(context_length)."
            )
    if long_length is None:
        return (Phase(0, 0, config.steps, length, config.batch_size),)
    if long_length <= length:
        raise ValueError(
            f"PretrainConfig.long_seq_length is {long_length}, but must be above seq_length, which is {length}"
            + ("." if config.seq_length else ", as many as the model has positions: give a shorter one.")
        )
    rows = config.long_batch_size or max(1, round(config.batch_size * length / long_length / parts)) * parts
    boundary = config.steps - max(1, round(config.long_share * config.steps))
    phases = (
        Phase(0, 0, boundary, length, config.batch_size),
        Phase(1, boundary, config.steps, long_length, rows),
    )
    return tuple(phase for phase in phases if phase.stop > phase.start)


def add_up(phases: Sequence[Phase], steps: int, each: Callable[[Phase], float]) -> float:
    """The sum over the first `steps` steps of what each one takes or makes, which depends on its phase."""
    return sum(max(0, min(steps, phase.stop) - phase.start) * each(phase) for phase in phases)
