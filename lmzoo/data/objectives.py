"""What a model is to learn from a row of text: pure functions from rows to (inputs, labels, weights).

An objective knows no corpus and keeps no state. What is random in it comes from `Rows.seeds`, so that an example is the
same whenever and wherever it is made.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np

from lmzoo.data.packing import Method

Batch: TypeAlias = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]
"""Inputs by name, labels int32 and weights float32."""


def lengths_of(batch: Batch) -> tuple[int, ...]:
    """Places in the rows of a batch: T, and U too where there is a decoder."""
    sides = ("token_ids", "decoder_token_ids")
    return tuple(batch[0][side].shape[1] for side in sides if side in batch[0])


class Rows(NamedTuple):
    """Rows of packed text.

    Shapes:
        token_ids: [B, T] int32; 0 in padding.
        next_token_ids: [B, T] int32, the token that follows in the corpus; 0 where `has_next` is false.
        has_next: [B, T] bool, whether a token of the same document follows.
        segment_ids: [B, T] int32, the number of the document in its row; 0 is padding.
        positions: [B, T] int32, counted from 0 in every document of a row.
        seeds: [B] uint64, a hash of the run's seed and the example's index.

    Where an objective has a `frame`, a document's first place and its last ones are free for special tokens.
    `other` is a row for each row, drawn by its seed, of another document unless the corpus has but a few, for an
    objective that `needs_other`. `seq_length` is the number of places that an example is to have, where rows have more,
    as they do for an objective that has `costs`.
    """

    token_ids: np.ndarray
    next_token_ids: np.ndarray
    has_next: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    seeds: np.ndarray
    other: "Rows | None" = None
    seq_length: int | None = None


class Objective(Protocol):
    """Makes training examples of rows."""

    @property
    def separate_documents(self) -> bool:
        """Whether documents are kept apart; if not, a corpus is one long text."""
        ...

    @property
    def frame(self) -> int:
        """Special tokens around what of a document lies in a row: one in front, if there are any, the others behind."""
        ...

    @property
    def packings(self) -> tuple[Method, ...]:
        """The methods of packing whose rows it can take, the usual one first."""
        ...

    @property
    def needs_other(self) -> bool:
        """Whether it needs a second row, of another document, for each."""
        ...

    def costs(self, seq_length: int) -> np.ndarray | None:
        """Places that pieces of 0, 1, ... tokens take in an example of T, up to the longest piece that has room in one.

        None: as many as they have tokens and their frames have.
        """
        ...

    def __call__(self, rows: Rows) -> Batch:
        """Gives inputs, labels and weights whose first dimension is that of the rows."""
        ...


@dataclass(frozen=True)
class Causal:
    """Predict the next token.

    The token that ends a document is predicted, the first token of the next document is not: its weight is 0.

    Args:
        separate_documents: True emits `segment_ids` and `positions`, by which attention keeps to a document. False
            takes the corpus for one text that runs on past the ends of documents, and emits `token_ids` alone.
    """

    separate_documents: bool = True

    frame: ClassVar[int] = 0
    packings: ClassVar[tuple[Method, ...]] = ("stream", "pad", "best-fit")
    needs_other: ClassVar[bool] = False

    def costs(self, seq_length: int) -> None:
        """A piece takes as many places as it has tokens and its frame has."""

    def __call__(self, rows: Rows) -> Batch:
        """Gives token ids [B, T], the next ids [B, T], and weights [B, T] that are 0 where nothing follows."""
        inputs = {"token_ids": rows.token_ids}
        if self.separate_documents:
            inputs |= {"segment_ids": rows.segment_ids, "positions": rows.positions}
        return inputs, rows.next_token_ids, rows.has_next.astype(np.float32)
