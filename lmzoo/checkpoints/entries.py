"""How a checkpoint stores a tensor of a model: under one name or in pieces, and which way round."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """The names under which a tensor is stored.

    Args:
        names: of the pieces, side by side along the first axis of what is stored; one name for a tensor in one piece.
        transposed: whether a matrix is stored as torch's linear layers are: [output, input].
    """

    names: tuple[str, ...]
    transposed: bool = False

    @classmethod
    def of(cls, name: str, *, transposed: bool = False) -> Self:
        """The entry of a name that may stand for several: "a.{q,k}.b" is "a.q.b" and "a.k.b"."""
        match = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
        if match is None:
            return cls((name,), transposed)
        start, pieces, end = match.groups()
        return cls(tuple(f"{start}{piece}{end}" for piece in pieces.split(",")), transposed)

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Name -> shape as stored, for a tensor of `shape` in the model."""
        first, *rest = reversed(shape) if self.transposed else shape
        return dict.fromkeys(self.names, (first // len(self.names), *rest))

    def join(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """The model's tensor, of the stored pieces in the order of `names`."""
        stored = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return stored.T if self.transposed else stored

    def piece(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """What is stored under `name` of the model's tensor."""
        stored = tensor.T if self.transposed else tensor
        return np.split(stored, len(self.names))[self.names.index(name)]
