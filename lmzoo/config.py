"""What every architecture's configuration shares: validation, presets, and a dictionary form."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self


def closest(name: str, known: list[str]) -> str:
    """Ends an error about an unknown `name`: the nearest known name, and all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(known)}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """Memory that a training step needs for a batch, in bytes; see `ModelConfig.activation_bytes`.

    Args:
        num_blocks: how many blocks there are.
        block: what a block keeps of its forward pass until it goes backward.
        block_backward: the most that exists at a time while a block goes backward, what it keeps included: the middle
            between an executor's best order and its worst.
        block_input: what is kept of a block instead if it is recomputed: what it is given.
        shared: what is given to all blocks alike, and kept if they are recomputed.
        ends: what is kept outside of the blocks.
        head_tokens: tokens that the loss scores.
        head_dim: D, the width of their hidden states.
    """

    num_blocks: int
    block: int
    block_backward: int
    block_input: int
    shared: int
    ends: int
    head_tokens: int
    head_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a language model: frozen, validated, and equal to its dictionary form.

    A subclass adds its own fields and names its published shapes in `PRESETS`.

    Args:
        vocab_size: V, number of token ids; ids run from 0 to V - 1.
        context_length: T, the most positions that a row may have.
        eos_token_id: ends a document, and starts an empty prompt; None if there is none.
        pad_token_id: fills rows after their end; None is `eos_token_id`.

    Raises:
        ValueError: a field breaks its rule; the message names the field, the value and the rule.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    model_type: ClassVar[str]
    """Name of the architecture in config.json."""

    vocab_size: int
    context_length: int
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        self._require_positive("vocab_size", "context_length")
        self._require_token_id("eos_token_id", "pad_token_id")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The published shape `name`, with fields replaced by `overrides`.

        Raises:
            ValueError: `name` is not a preset of this class, or an override is not a field of it.
        """
        if name not in cls.PRESETS:
            raise ValueError(f"{cls.__name__} has no preset {name!r}.{closest(name, list(cls.PRESETS))}")
        return cls.from_dict({**cls.PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is not a field, or a field without a default is missing.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ValueError(f"{cls.__name__} has no field {key!r}.{closest(key, list(fields))}")
        missing = [
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and name not in values
        ]
        if missing:
            raise ValueError(f"{cls.__name__} needs {', '.join(missing)}: these fields have no default.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self).from_dict({**self.to_dict(), **changes})

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Self:
        """The config of a checkpoint, from the content of its config.json.

        Raises:
            ValueError: it asks for what this architecture does not have, or a field breaks its rule.
        """
        raise NotImplementedError

    def to_hugging_face(self) -> dict[str, Any]:
        """Content of config.json, as `transformers` reads it."""
        raise NotImplementedError

    def count_params(self) -> int:
        """Number of trainable parameters, computed from the shape alone: nothing is allocated."""
        raise NotImplementedError

    @property
    def head_params(self) -> int:
        """Number of parameters of heads that published counts, and so `count_params`, leave out."""
        return 0

    def training_flops_per_token(self, seq_length: int) -> float:
        """Floating-point operations of one training step (forward and backward) for each token of a row.

        Reference:
            Chowdhery et al. 2022, "PaLM", appendix B.
        """
        raise NotImplementedError

    def activation_bytes(self, rows: int, seq_length: int, compute_bytes: int) -> ActivationBytes:
        """What one step of training keeps and makes of `rows` rows of packed documents, beside weights and gradients.

        Args:
            rows: B, on one device at a time.
            seq_length: T, tokens a row.
            compute_bytes: of a number in the compute dtype: 4 for float32, 2 under a mixed policy.
        """
        raise NotImplementedError

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not (_is_integer(value) and value >= 1):
                raise ValueError(f"{type(self).__name__}.{name} is {value!r}, but must be an integer of 1 or more.")

    def _require_above_zero(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not (_is_number(value) and 0.0 < value < math.inf):
                raise ValueError(f"{type(self).__name__}.{name} is {value!r}, but must be a number above 0.")

    def _require_rate(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not (_is_number(value) and 0.0 <= value < 1.0):
                raise ValueError(f"{type(self).__name__}.{name} is {value!r}, but must lie in [0, 1).")

    def _require_token_id(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (_is_integer(value) and 0 <= value < self.vocab_size):
                raise ValueError(
                    f"{type(self).__name__}.{name} is {value!r}, but must be None or an integer in "
                    f"[0, vocab_size), and vocab_size is {self.vocab_size}."
                )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)
