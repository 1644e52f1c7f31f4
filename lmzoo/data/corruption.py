"""From rows of text to what an encoder reads and a decoder writes: which tokens are noise, and what is left of them.

Pure functions of arrays. A *piece* is what of one document lies in one row, as in `lmzoo.data.packing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from lmzoo.data.randomness import uniform

if TYPE_CHECKING:
    from lmzoo.data.tokenizers import Tokenizer

_CUT = 200  # what random numbers are for; others than those of masking
MODE_TOKENS = ("[NLU]", "[NLG]", "[S2S]")
"""UL2's, for tasks of understanding, of writing freely, and of going on with a text."""


@dataclass(frozen=True)
class SentinelFacts:
    """What an objective with a decoder must know of a tokenizer's tokens.

    Args:
        eos_token_id: ends each text, on both sides.
        sentinel_ids: of the tokens that stand for spans, in the order in which they are used.
        pad_token_id: fills rows up.
        start_token_id: what the decoder reads first.
        mode_ids: of UL2's mode tokens, by their names without brackets.
    """

    eos_token_id: int
    sentinel_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    start_token_id: int = 0
    mode_ids: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Those of a tokenizer: `<extra_id_0>`, `<extra_id_1>`... as far as it has them; decoders start with padding.

        Raises:
            ValueError: it has no token that ends a text, or none for padding.
        """
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if eos is None or pad is None:
            missing = "eos_token" if eos is None else "pad_token"
            raise ValueError(
                f"the tokenizer has no {missing}; train one of kind 'unigram', or name it in special_tokens"
            )
        # mT5's are pieces of its vocabulary, and begin as words do.
        mark = "" if tokenizer.token_to_id("<extra_id_0>") is not None else "▁"
        sentinels: list[int] = []
        while (index := tokenizer.token_to_id(f"{mark}<extra_id_{len(sentinels)}>")) is not None:
            sentinels.append(index)
        found = ((mode.strip("[]"), tokenizer.token_to_id(mode)) for mode in MODE_TOKENS)
        modes = tuple((mode, index) for mode, index in found if index is not None)
        return cls(eos, tuple(sentinels), pad, pad, modes)


class Pieces(NamedTuple):
    """The pieces of some rows, one after the other.

    Shapes:
        real: [B, W] bool, False for padding.
        number: [tokens], of the piece that each token of the rows belongs to.
        place: [tokens], of each token in its piece.
        rows: [P], the row of each piece.
        lengths: [P], its tokens.
        first: [B], number of the first piece of each row.
    """

    real: np.ndarray
    number: np.ndarray
    place: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, segment_ids: np.ndarray) -> Self:
        """Those of rows [B, W], by the number of the piece in its row; 0 is padding."""
        real = segment_ids > 0
        row = np.nonzero(real)[0]
        segment = segment_ids[real]
        begins = np.ones(len(row), bool)
        begins[1:] = (segment[1:] != segment[:-1]) | (row[1:] != row[:-1])
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=len(row))
        number = np.cumsum(begins) - 1
        rows = row[starts]
        return cls(
            real,
            number,
            np.arange(len(row)) - np.repeat(starts, lengths),
            rows,
            lengths,
            np.searchsorted(rows, np.arange(len(segment_ids))),
        )


def span_counts(
    lengths: np.ndarray, noise_density: float | np.ndarray, mean_span_length: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of noise tokens and of spans of them in texts of some lengths, all of the same shape.

    A text of two tokens or more has at least one of noise and one that is none; a text of one token has no noise.

    Reference: Raffel et al. 2020, section 3.1.4, and the released code, whose arithmetic in float32 this is.
    """
    noise = np.rint(lengths.astype(np.float32) * np.asarray(noise_density, np.float32))
    noise = np.minimum(np.maximum(noise, 1), lengths - 1).astype(np.int64)
    spans = np.rint(noise.astype(np.float32) / np.asarray(mean_span_length, np.float32)).astype(np.int64)
    return noise, np.maximum(np.minimum(spans, lengths - noise), 1)


def random_spans(pieces: Pieces, noise: np.ndarray, spans: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Draws which tokens are noise: [tokens] bool.

    Spans of text and of noise take turns, beginning with text and ending with noise. All ways to cut the tokens of
    either kind into so many spans are equally likely.

    Args:
        pieces: of the rows.
        noise: [P], tokens of noise in each piece.
        spans: [P], spans of noise; as many are of text.
        seeds: [B] uint64.

    Reference: Raffel et al. 2020, the released code (`random_spans_noise_mask`).
    """
    batch, width = pieces.real.shape
    number, place, text = pieces.number, pieces.place, (pieces.lengths - noise)[pieces.number]
    # The first places of a piece stand for its text, the others for its noise: two groups, each of which is cut.
    is_noise = place >= text
    in_group = place - np.where(is_noise, text, 0)
    group = 2 * (number - np.repeat(pieces.first, pieces.real.sum(1))) + is_noise
    # Groups in order, in each its first place and then the others by a random number. The number of bits depends on the
    # width alone, so that a row is the same in any batch.
    row, column = np.nonzero(pieces.real)
    place_bits, group_bits = np.uint64(width.bit_length()), (2 * width).bit_length()
    random_bits = 64 - int(place_bits) - group_bits
    keys = (uniform(seeds, _CUT, width)[pieces.real] * 2.0**random_bits).astype(np.uint64)
    keys[in_group == 0] = 0
    keys |= group.astype(np.uint64) << np.uint64(random_bits)
    order = np.full((batch, width), np.iinfo(np.uint64).max)
    order[pieces.real] = keys << place_bits | column.astype(np.uint64)
    order.sort(axis=1)
    drawn = (order[pieces.real] & np.uint64((1 << int(place_bits)) - 1)).astype(np.int64)
    begins = np.zeros((batch, width), bool)
    begins[row, drawn] = in_group < spans[number]  # Sorted, a group lies where it lay before.
    # Each place now knows how many spans of its group begin up to it; the spans of both groups are then interleaved.
    begun = spans * np.where(noise > 0, 2, 1)
    span = np.cumsum(begins[pieces.real]) - 1 - _before(begun)[number] - np.where(is_noise, spans[number], 0)
    sizes = np.bincount(2 * (_before(spans)[number] + span) + is_noise, minlength=2 * int(spans.sum()))
    return np.repeat(np.arange(len(sizes)) % 2 == 1, sizes)


class Side(NamedTuple):
    """What an encoder or a decoder has of some rows.

    Shapes:
        token_ids: [B, T] int32.
        segment_ids: [B, T] int32, the number of the piece in its row; 0 is padding.
        positions: [B, T] int32, counted from 0 in each piece.
    """

    token_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def replace_spans(
    tokens: np.ndarray, hidden: np.ndarray, pieces: Pieces, facts: SentinelFacts
) -> tuple[np.ndarray, np.ndarray]:
    """Puts a sentinel in the place of each run of hidden tokens, the next one for each run of a piece.

    Args:
        tokens: [tokens] int32.
        hidden: [tokens] bool.
        pieces: of the rows.
        facts: has the sentinels.

    Returns:
        The tokens and sentinels, and which of the places are left, both [tokens].

    Reference: Raffel et al. 2020, the released code (`noise_span_to_unique_sentinel`).
    """
    begins = hidden.copy()
    begins[1:] &= ~hidden[:-1] | (pieces.place[1:] == 0)
    runs = np.cumsum(begins)
    run = runs - (runs - begins)[pieces.place == 0][pieces.number]  # of its piece, from 1
    sentinels = np.asarray(facts.sentinel_ids, np.int32)
    return np.where(hidden, sentinels[np.maximum(run, 1) - 1], tokens), begins | ~hidden


def put_together(
    tokens: np.ndarray, kept: np.ndarray, pieces: Pieces, width: int, facts: SentinelFacts, modes: np.ndarray | None
) -> Side:
    """Puts what is left of each piece into its row, an end behind it.

    Args:
        tokens: [tokens] int32.
        kept: [tokens] bool.
        pieces: of the rows.
        width: places of a row.
        facts: has the token that ends a text.
        modes: [P], tokens that stand in front of the pieces, if there are any.

    Raises:
        ValueError: a row has more tokens than places.
    """
    front = 0 if modes is None else 1
    lengths = np.bincount(pieces.number[kept], minlength=len(pieces.lengths)) + front + 1
    rows, before = pieces.rows, _before(lengths)
    column = before - before[pieces.first[rows]] if len(rows) else before
    if len(rows) and (longest := int((column + lengths).max())) > width:
        raise ValueError(f"a row of {longest} tokens; it has {width} places: make rows by the objective's own `costs`")
    position = np.arange(lengths.sum()) - np.repeat(before, lengths)
    values = np.full(len(position), facts.eos_token_id, np.int32)
    if modes is not None:
        values[before] = modes
    values[(position >= front) & (position < np.repeat(lengths - 1, lengths))] = tokens[kept]
    flat = np.repeat(rows * width + column, lengths) + position
    segments = np.repeat(np.arange(len(rows)) - pieces.first[rows] + 1, lengths)
    side = Side(*(np.full((len(pieces.real), width), fill, np.int32) for fill in (facts.pad_token_id, 0, 0)))
    for array, content in zip(side, (values, segments, position), strict=True):
        array.reshape(-1)[flat] = content
    return side


def _before(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts
