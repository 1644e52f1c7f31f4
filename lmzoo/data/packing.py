"""How documents become rows of fixed length: pure functions from the documents' ends to places in the corpus.

| method | a row is | rows cost |
|---|---|---|
| `stream` | the next T tokens of the corpus, whatever documents they belong to | nothing: no plan is held |
| `pad` | one document, or T tokens of a longer one, and padding | a plan of some bytes a document |
| `best-fit` | whole documents that fill the row as well as they can | a plan of some bytes a document |

An objective may put special tokens around every piece, such as [CLS] and [SEP]. Rows with such frames need a plan. What
an objective makes of a piece may be longer or shorter than it: the objective then says how many of T places the pieces
of each length cost, and a row holds as many tokens as there is room for what is made of them.

A *piece* is what of one document lies in one row. Pieces are numbered from 1 along the row (the segment ids; 0 is
padding), and positions count from 0 in each, so that they stay below T.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

Method: TypeAlias = Literal["stream", "pad", "best-fit"]


class Layout(NamedTuple):
    """What stands in some rows.

    Shapes:
        places: [B, T] int64, the place in the corpus of every token; 0 in padding, and some place in a frame.
        segment_ids: [B, T] int32, the number of the piece; 0 in padding.
        positions: [B, T] int32, the position inside the piece; 0 in padding.
        has_next: [B, T] bool, whether the next token of the corpus belongs to the same document.
    """

    places: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    has_next: np.ndarray


@dataclass(frozen=True, eq=False)
class StreamPacking:
    """Row i is the tokens [i * T, i * T + T) of the corpus; only the last row may have padding, at its end.

    Shapes:
        document_ends: [documents] int64, ascending, the tokens up to the end of each document.
    """

    document_ends: np.ndarray
    seq_length: int

    @property
    def num_rows(self) -> int:
        """Rows that hold the whole corpus."""
        return -(-int(self.document_ends[-1]) // self.seq_length)

    @property
    def num_places(self) -> int:
        """Places in them that are no padding."""
        return int(self.document_ends[-1])

    def layout(self, rows: np.ndarray) -> Layout:
        """Lays out rows [B] of any order."""
        ends, length = self.document_ends, self.seq_length
        starts = rows.astype(np.int64) * length
        column = np.arange(length)
        places = starts[:, None] + column  # [B, T]
        inside = places < ends[-1]
        # The documents that end in each row, as one flat list of (row, columns up to the end).
        first = np.searchsorted(ends, starts, side="right")
        count = np.searchsorted(ends, starts + length, side="right") - first
        row = np.repeat(np.arange(len(rows)), count)
        end = ends[_ranges(first, count)] - starts[row]  # 1 to T
        has_next = inside.copy()
        has_next[row, end - 1] = False
        begins = np.zeros(places.shape, np.int32)
        in_row = end < length
        begins[row[in_row], end[in_row]] = 1
        segments = (1 + np.cumsum(begins, axis=1, dtype=np.int32)) * inside
        positions = (column - np.maximum.accumulate(begins * column, axis=1)) * inside
        return Layout(np.where(inside, places, 0), segments, positions.astype(np.int32), has_next)

    def documents(self, rows: np.ndarray, document_ends: np.ndarray) -> np.ndarray:
        """The document that each of the rows [B] begins with."""
        return np.searchsorted(document_ends, rows * self.seq_length, side="right")


@dataclass(frozen=True, eq=False)
class PlannedPacking:
    """Rows by a plan: row i holds the pieces [row_ends[i - 1], row_ends[i]).

    Shapes:
        row_ends: [rows] int64, ascending.
        starts: [pieces] int64, the place in the corpus of a piece's first token.
        lengths: [pieces] int32, its number of tokens, the frame included.
        ends_document: [pieces] bool, whether its last token is its document's.

    Args:
        seq_length: T, tokens in a row.
        frame: places for special tokens around every piece: one in front, if there are any, and the others behind.
    """

    seq_length: int
    frame: int
    row_ends: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    ends_document: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows that hold the whole corpus."""
        return len(self.row_ends)

    @property
    def num_places(self) -> int:
        """Places in them that are no padding."""
        return int(self.lengths.sum(dtype=np.int64))

    def layout(self, rows: np.ndarray) -> Layout:
        """Lays out rows [B] of any order."""
        shape = len(rows), self.seq_length
        first = np.where(rows > 0, self.row_ends[rows - 1], 0)
        count = self.row_ends[rows] - first
        pieces = _ranges(first, count)
        lengths = self.lengths[pieces].astype(np.int64)
        row = np.repeat(np.arange(len(rows)), count)
        number = _ranges(np.ones_like(count), count)  # of a piece in its row
        piece_ends = np.cumsum(lengths)
        before = piece_ends - lengths
        column = before - before[number == 1][row]
        # From here on one element a token.
        position = _ranges(np.zeros_like(lengths), lengths)
        flat = np.repeat(row * self.seq_length + column, lengths) + position
        last = position == np.repeat(lengths - 1, lengths)
        fields = (
            (np.int64, np.repeat(self.starts[pieces], lengths) + self._inside(position, lengths)),
            (np.int32, np.repeat(number, lengths)),
            (np.int32, position),
            (np.bool_, ~(last & np.repeat(self.ends_document[pieces], lengths))),
        )
        return Layout(*(_scatter(shape, dtype, flat, values) for dtype, values in fields))

    def documents(self, rows: np.ndarray, document_ends: np.ndarray) -> np.ndarray:
        """The document that each of the rows [B] begins with."""
        first = np.where(rows > 0, self.row_ends[rows - 1], 0)
        return np.searchsorted(document_ends, self.starts[first], side="right")

    def _inside(self, position: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Positions among a piece's own tokens, the nearest for those of its frame."""
        if not self.frame:
            return position
        return np.clip(position - 1, 0, np.repeat(lengths - self.frame - 1, lengths))


Packing: TypeAlias = StreamPacking | PlannedPacking


def pack(
    document_ends: np.ndarray,
    seq_length: int,
    method: Method = "stream",
    frame: int = 0,
    costs: np.ndarray | None = None,
) -> Packing:
    """Plans the rows of a corpus.

    Args:
        document_ends: [documents] int64, ascending, the tokens up to the end of each document.
        seq_length: T, tokens in a row.
        method: see the table above.
        frame: places for special tokens around every piece; "stream" has none.
        costs: [longest piece + 1], of T places, what a piece of 0, 1, ... tokens takes; None: its tokens and its frame.
    """
    if seq_length <= frame:
        raise ValueError(f"seq_length: {seq_length}; a row holds at least {frame + 1} token{'s' if frame else ''}")
    if method == "stream" and not frame:
        return StreamPacking(document_ends, seq_length if costs is None else len(costs) - 1)
    if method in ("pad", "best-fit"):
        costs = np.arange(frame, seq_length + 1) if costs is None else costs
        # No pieces that a row has room for have more tokens together.
        width = int((seq_length * (np.arange(1, len(costs)) + frame) // costs[1:]).max())
        pieces = _pad(document_ends, width, frame, len(costs) - 1)
        return pieces if method == "pad" else _best_fit(pieces, costs[pieces.lengths - frame], seq_length)
    allowed = "'pad' or 'best-fit', as pieces have frames" if frame else "'stream', 'pad' or 'best-fit'"
    raise ValueError(f"packing: {method!r}; it must be {allowed}")


def _pad(document_ends: np.ndarray, width: int, frame: int, room: int) -> PlannedPacking:
    """Cuts documents into pieces that fill a row and one of the rest, each of which has a row to itself."""
    document_lengths = np.diff(document_ends, prepend=0)
    count = -(-document_lengths // room)
    offset = _ranges(np.zeros_like(count), count) * room
    left = np.repeat(document_lengths, count) - offset
    return PlannedPacking(
        width,
        frame,
        row_ends=np.arange(1, len(offset) + 1),
        starts=np.repeat(document_ends - document_lengths, count) + offset,
        lengths=(np.minimum(left, room) + frame).astype(np.int32),
        ends_document=left <= room,
    )


def _best_fit(pieces: PlannedPacking, costs: np.ndarray, room_for_all: int) -> PlannedPacking:
    """Puts the pieces, the costliest first, each into the fullest row that still has room for it.

    Pieces of one cost are placed together: a row with room r takes r // cost of them one after the other, as after each
    it is the fullest with room. So the work is a step for each pair of a cost and a room, not for each document.

    Reference: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3.
    """
    order = np.argsort(-costs, kind="stable")
    costs = costs[order]
    row_of = np.empty(len(order), np.int64)
    rows_with: dict[int, list[np.ndarray]] = {}  # room left -> rows that have it
    rooms: list[int] = []  # the keys, sorted
    num_rows = placed = 0
    group_ends = [*(np.flatnonzero(np.diff(costs)) + 1).tolist(), len(costs)]
    for end in group_ends:
        cost = int(costs[end - 1])
        while placed < end:
            fullest = bisect_left(rooms, cost)
            new = fullest == len(rooms)
            room = room_for_all if new else rooms[fullest]
            each = room // cost
            wanted = -(-(end - placed) // each)
            if new:
                rows = np.arange(num_rows, num_rows + wanted)
                num_rows += wanted
            else:
                del rooms[fullest]
                all_rows = np.concatenate(rows_with.pop(room))
                rows = all_rows[:wanted]
                _put_back(rows_with, rooms, room, all_rows[wanted:])
            here = min(end - placed, each * len(rows))
            row_of[placed : placed + here] = np.repeat(rows, each)[:here]
            placed += here
            in_last = here - each * (len(rows) - 1)
            _put_back(rows_with, rooms, room - each * cost, rows[:-1])
            _put_back(rows_with, rooms, room - in_last * cost, rows[-1:])
    by_row = np.argsort(row_of, kind="stable")
    order = order[by_row]
    return PlannedPacking(
        pieces.seq_length,
        pieces.frame,
        row_ends=np.cumsum(np.bincount(row_of, minlength=num_rows)),
        starts=pieces.starts[order],
        lengths=pieces.lengths[order],
        ends_document=pieces.ends_document[order],
    )


def _put_back(rows_with: dict[int, list[np.ndarray]], rooms: list[int], room: int, rows: np.ndarray) -> None:
    if room and len(rows):
        if room not in rows_with:
            rows_with[room] = []
            insort(rooms, room)
        rows_with[room].append(rows)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Joins the ranges [start, start + count)."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


def _scatter(shape: tuple[int, int], dtype: type, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Gives zeros with the values at flat places."""
    array: np.ndarray = np.zeros(shape, dtype)
    array.reshape(-1)[places] = values
    return array
