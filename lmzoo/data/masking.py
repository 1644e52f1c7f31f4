"""Masked language modelling: which tokens are hidden, and what stands in their place."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeAlias

import numpy as np

from lmzoo.data.objectives import Batch, Rows
from lmzoo.data.packing import Method
from lmzoo.data.randomness import uniform

if TYPE_CHECKING:
    from lmzoo.data.tokenizers import Tokenizer

Unit: TypeAlias = Literal["token", "word", "span"]

_CHOICE, _COUNT, _LENGTH, _FATE, _TOKEN = range(5)  # what random numbers are for
_STOP = 0.2  # of a span after each of its words
_LONGEST_SPAN = 10  # words
_SENTENCE_ENDS = frozenset(".!?。！？…")


@dataclass(frozen=True, eq=False)
class TokenFacts:
    """What an objective must know of a tokenizer's tokens.

    Args:
        vocab_size: V.
        mask_token_id, cls_token_id, sep_token_id: the special tokens that an objective puts into text.
        special_token_ids: all that are never hidden and never put in the place of another.
        continues_word: [V] bool, whether a token goes on with the word of the token before it.
        ends_sentence: [V] bool, whether a sentence may end with a token.

    Raises:
        ValueError: a special token's id is outside the vocabulary, or an array has another size.
    """

    vocab_size: int
    mask_token_id: int
    cls_token_id: int
    sep_token_id: int
    special_token_ids: tuple[int, ...]
    continues_word: np.ndarray
    ends_sentence: np.ndarray
    is_special: np.ndarray = field(init=False, repr=False)
    ordinary_ids: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        own = (self.mask_token_id, self.cls_token_id, self.sep_token_id)
        for index in (*own, *self.special_token_ids):
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"special token id {index}: it must be in the vocabulary, [0, {self.vocab_size})")
        for name in ("continues_word", "ends_sentence"):
            shape = getattr(self, name).shape
            if shape != (self.vocab_size,):
                raise ValueError(f"{name}: shape {shape}; it must be ({self.vocab_size},), that of the vocabulary")
        is_special = np.zeros(self.vocab_size, bool)
        is_special[[*own, *self.special_token_ids]] = True
        if is_special.all():
            raise ValueError(f"vocab_size: {self.vocab_size}, all of them special; there is nothing to be hidden")
        object.__setattr__(self, "is_special", is_special)
        object.__setattr__(self, "ordinary_ids", np.flatnonzero(~is_special).astype(np.int32))

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Those of a tokenizer.

        A token continues a word if it begins with "##" (WordPiece), or if it does not begin with the mark of a space
        (byte-level BPE and Unigram, as RoBERTa counts words). What has no [CLS] or [SEP] uses `<s>` or `</s>`.

        Raises:
            ValueError: the tokenizer has no mask token, or none to begin or to end a text.
        """
        roles = {
            "mask_token": tokenizer.mask_token_id,
            "cls_token": _either(tokenizer.cls_token_id, tokenizer.bos_token_id),
            "sep_token": _either(tokenizer.sep_token_id, tokenizer.eos_token_id),
        }
        missing = [role for role, index in roles.items() if index is None]
        if missing:
            raise ValueError(f"the tokenizer has no {' and no '.join(missing)}; train one of kind 'wordpiece'")
        size = tokenizer.vocab_size
        tokens = [tokenizer.id_to_token(index) or "" for index in range(size)]
        roles_of_tokens = map(tokenizer.token_to_id, tokenizer.special_tokens.values())
        special = tuple(sorted({index for index in roles_of_tokens if index is not None}))
        if tokenizer.kind == "wordpiece":
            continues = [token.startswith("##") for token in tokens]
        elif tokenizer.kind == "char":
            continues = [token.isalnum() for token in tokens]
        else:
            continues = [not token.startswith(("Ġ", "▁")) for token in tokens]
        mask, start, end = (index for index in roles.values() if index is not None)
        ends = [token[-1:] in _SENTENCE_ENDS for token in tokens]
        return cls(size, mask, start, end, special, np.array(continues, bool), np.array(ends, bool))


@dataclass(frozen=True)
class MaskedLM:
    """Predict tokens that are hidden, each document of a row framed as [CLS] document [SEP].

    The number hidden of a row's n tokens is `mask_rate * n`, rounded up or down at random so that the mean is exact.
    Of the hidden ones 80% become the mask token, 10% a random ordinary token, and 10% stay. Special tokens, unknown
    ones included, are never hidden.

    Args:
        facts: of the tokenizer that made the corpus.
        mask_rate: the share of tokens that are hidden, more than 0 and at most 1.
        unit: what is drawn: "token"; "word", all the tokens of a word or none, which may leave the last token or two
            of the number out where no word is short enough; "span", runs of whole words, whose number is 1 to 10, the
            last of which is cut where the number is reached. A span's tokens have one fate: all become masks, or all
            random, or all stay.
        max_predictions: M, the places for hidden tokens in a row; None for as many as there can be.

    Raises:
        ValueError: a number is out of range, or the unit is none of these.

    Reference: Devlin et al. 2019, section 3.1; whole words: its repository, May 2019; Joshi et al. 2020 (SpanBERT),
    section 3.1. There a span's place is drawn anew each time; here a row is cut into spans, of which some are drawn.
    """

    facts: TokenFacts
    mask_rate: float = 0.15
    unit: Unit = "token"
    max_predictions: int | None = None

    separate_documents: ClassVar[bool] = True
    frame: ClassVar[int] = 2
    packings: ClassVar[tuple[Method, ...]] = ("best-fit", "pad")
    needs_other: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate <= 1:
            raise ValueError(f"mask_rate: {self.mask_rate}; it must be more than 0 and at most 1")
        if self.unit not in ("token", "word", "span"):
            raise ValueError(f"unit: {self.unit!r}; it must be 'token', 'word' or 'span'")
        if self.max_predictions is not None and self.max_predictions < 1:
            raise ValueError(f"max_predictions: {self.max_predictions}; it must be at least 1")

    def costs(self, seq_length: int) -> None:
        """A piece takes as many places as it has tokens and its frame has."""

    def __call__(self, rows: Rows) -> Batch:
        """Gives the rows with tokens hidden, and `mask_positions`, labels and weights [B, M]."""
        token_ids = framed(rows.token_ids, rows.segment_ids, rows.positions, self.facts)
        token_ids, *hidden = self.hide(token_ids, rows.segment_ids > 0, rows.seeds)
        inputs = {"token_ids": token_ids, "segment_ids": rows.segment_ids, "positions": rows.positions}
        return inputs | {"mask_positions": hidden[0]}, hidden[1], hidden[2]

    def hide(
        self, token_ids: np.ndarray, real: np.ndarray, seeds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Hides tokens of rows that are framed already.

        Args:
            token_ids: [B, T] int32.
            real: [B, T] bool, False for padding.
            seeds: [B] uint64.

        Returns:
            What is left of the rows [B, T], and the places [B, M], ascending, the tokens [B, M] and the weights [B, M]
            of what was hidden; 0 in places that are not needed.
        """
        length = token_ids.shape[1]
        free = real & ~self.facts.is_special[token_ids]
        unit = self._units(token_ids, free, seeds)
        most = math.ceil(self.mask_rate * length)
        places = most if self.max_predictions is None else min(self.max_predictions, length)
        wanted = np.floor(self.mask_rate * free.sum(1) + uniform(seeds, _COUNT, 1)[:, 0]).astype(np.int64)
        chosen = _draw(unit, free, np.minimum(wanted, places), seeds, whole=self.unit == "word")

        row, column = np.nonzero(chosen)
        number = chosen.sum(1)
        place = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
        original = token_ids[row, column]
        fate = uniform(seeds, _FATE, length)[row, unit[row, column] if self.unit == "span" else column]
        ordinary = self.facts.ordinary_ids
        other = ordinary[(uniform(seeds, _TOKEN, length)[row, column] * len(ordinary)).astype(np.int64)]
        left = token_ids.copy()
        left[row, column] = np.where(fate < 0.8, self.facts.mask_token_id, np.where(fate < 0.9, other, original))
        positions, labels, weights = (
            np.zeros((len(seeds), places), dtype) for dtype in (np.int32, np.int32, np.float32)
        )
        positions[row, place], labels[row, place], weights[row, place] = column, original, 1
        return left, positions, labels, weights

    def _units(self, token_ids: np.ndarray, free: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """The number of the unit that each token belongs to, ascending along the row, [B, T]."""
        length = token_ids.shape[1]
        if self.unit == "token":
            return np.broadcast_to(np.arange(length), token_ids.shape)
        begins = np.ones(token_ids.shape, bool)
        inside = free[:, 1:] & free[:, :-1]  # between documents there are special tokens
        begins[:, 1:] = ~(inside & self.facts.continues_word[token_ids[:, 1:]])
        words = np.cumsum(begins, axis=1) - 1
        if self.unit == "word":
            return words
        # Spans of words lie one after another; one ends early where text does.
        lengths = _span_lengths(uniform(seeds, _LENGTH, length))
        ends = np.cumsum(lengths, axis=1)
        row = np.arange(len(seeds))[:, None] * (length + 1)
        of_word = np.searchsorted(
            (np.minimum(ends, length) + row).reshape(-1), (np.minimum(words, length) + row).reshape(-1), side="right"
        )
        spans = of_word.reshape(words.shape) - np.arange(len(seeds))[:, None] * length
        changes = np.ones(token_ids.shape, bool)
        changes[:, 1:] = (spans[:, 1:] != spans[:, :-1]) | (free[:, 1:] != free[:, :-1])
        return np.cumsum(changes, axis=1) - 1


def framed(token_ids: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray, facts: TokenFacts) -> np.ndarray:
    """Puts [CLS] in the first place of every document of rows [B, T] and [SEP] in the last."""
    inside = segment_ids > 0
    last = inside.copy()
    last[:, :-1] &= segment_ids[:, 1:] != segment_ids[:, :-1]
    token_ids = np.where(last, np.int32(facts.sep_token_id), token_ids)
    return np.where(inside & (positions == 0), np.int32(facts.cls_token_id), token_ids)


def _draw(unit: np.ndarray, free: np.ndarray, wanted: np.ndarray, seeds: np.ndarray, whole: bool) -> np.ndarray:
    """Draws units until as many tokens as wanted [B] are in them: which tokens those are, [B, T] bool.

    Args:
        unit: [B, T], ascending along the row.
        free: [B, T] bool, the tokens that may be drawn.
        wanted: [B].
        seeds: [B].
        whole: whether a unit that has more tokens than are wanted yet is passed over, rather than cut.
    """
    rows, length = unit.shape
    keys = np.take_along_axis(uniform(seeds, _CHOICE, length), unit, 1)
    keys[~free] = 2.0  # behind all the others
    if not whole:
        order = np.argsort(keys, axis=1, kind="stable")
        chosen = np.zeros(unit.shape, bool)
        np.put_along_axis(chosen, order, np.arange(length) < wanted[:, None], 1)
        return chosen
    sizes = np.zeros(unit.shape, np.int64)
    row = np.broadcast_to(np.arange(rows)[:, None], unit.shape)
    np.add.at(sizes, (row[free], unit[free]), 1)
    first = np.where(sizes > 0, uniform(seeds, _CHOICE, length), 2.0)
    order = np.argsort(first, axis=1)
    sizes_in_order = np.take_along_axis(sizes, order, 1)
    taken = np.zeros(unit.shape, bool)
    left = wanted.copy()
    for turn in range(length):
        size = sizes_in_order[:, turn]
        fits = (size <= left) & (size > 0)
        taken[:, turn] = fits
        left -= np.where(fits, size, 0)
        if not left.any():
            break
    drawn = np.zeros(unit.shape, bool)
    np.put_along_axis(drawn, order, taken, 1)
    return np.take_along_axis(drawn, unit, 1) & free


def _span_lengths(numbers: np.ndarray) -> np.ndarray:
    """Words of spans, by the geometric distribution cut off at the longest, from uniform numbers."""
    return 1 + np.searchsorted(_span_shares(), numbers, side="right")


@functools.cache
def _span_shares() -> np.ndarray:
    """The share of spans that have at most 1, 2, ... words, but for the longest."""
    shares = np.cumsum((1 - _STOP) ** np.arange(_LONGEST_SPAN))
    return (shares / shares[-1])[:-1]


def _either(first: int | None, second: int | None) -> int | None:
    return second if first is None else first
