"""Masked language modelling over two texts: does the second follow the first, and in which order do they stand?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmzoo.data.masking import MaskedLM
from lmzoo.data.objectives import Batch, Rows
from lmzoo.data.packing import Method
from lmzoo.data.randomness import uniform

_LABEL, _SPLIT, _OTHER_SPLIT = range(100, 103)  # what random numbers are for; others than those of masking


@dataclass(frozen=True)
class _SentencePairs:
    """[CLS] A [SEP] B [SEP], of which tokens are hidden, with a label for the pair.

    A row holds a piece of one document, cut in two behind a token that may end a sentence; if the piece has none,
    before a word, and else before any token. B has no tokens if the piece is a single one. Nothing needs to be cut off,
    since a piece is no longer than what a row holds.
    """

    masked: MaskedLM

    separate_documents: ClassVar[bool] = True
    frame: ClassVar[int] = 3
    packings: ClassVar[tuple[Method, ...]] = ("pad",)
    needs_other: ClassVar[bool] = False

    def costs(self, seq_length: int) -> None:
        """A piece takes as many places as it has tokens and its frame has."""

    def _batch(self, rows: Rows, first: np.ndarray, second: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> Batch:
        """Frames two texts, given by their tokens [B, T] and sizes [2, B], and hides some of them.

        Args:
            rows: what the texts are made of.
            first, second: [B, T] int32, what comes after a text's end does not count.
            sizes: [2, B], tokens of the first and of the second text.
            labels: [B] bool, of the pair.
        """
        facts = self.masked.facts
        column = np.arange(rows.token_ids.shape[1])[None]
        one, two = sizes[0][:, None], sizes[1][:, None]
        real = rows.segment_ids.max(1, keepdims=True) > 0  # a row of nothing but padding stays so
        in_first, in_second = (column > 0) & (column <= one), (column > one + 1) & (column <= one + 1 + two)
        token_ids = np.take_along_axis(first, np.clip(column - 1, 0, column.shape[1] - 1), 1) * in_first
        token_ids += np.take_along_axis(second, np.maximum(column - one - 2, 0), 1) * in_second
        token_ids[:, 0] = facts.cls_token_id
        token_ids += np.int32(facts.sep_token_id) * ((column == one + 1) | (column == one + two + 2))
        padding_mask = (column < one + two + 3) & real
        token_ids *= padding_mask
        token_ids, mask_positions, original, weights = self.masked.hide(token_ids, padding_mask, rows.seeds)
        inputs = {
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "token_type_ids": np.where(padding_mask, column > one + 1, False).astype(np.int32),
            "mask_positions": mask_positions,
            "next_sentence_labels": np.where(real[:, 0], labels, False).astype(np.int32),
        }
        return inputs, original, weights

    def _split(
        self, tokens: np.ndarray, size: np.ndarray, least: np.ndarray, seeds: np.ndarray, purpose: int
    ) -> np.ndarray:
        """Where to cut texts [B, T] of some sizes [B] so that `least` [B] tokens or more stay behind the cut."""
        facts = self.masked.facts
        cut = np.arange(1, tokens.shape[1])[None]
        keys = uniform(seeds, purpose, tokens.shape[1] - 1)
        keys += 2 * facts.ends_sentence[tokens[:, :-1]] + ~facts.continues_word[tokens[:, 1:]]
        keys[cut >= size[:, None]] = -2
        keys[cut > (size - least)[:, None]] -= 4
        return np.minimum(1 + keys.argmax(1), size)


class NextSentence(_SentencePairs):
    """Hidden tokens, and whether B is what follows A.

    Half of the time it is (`next_sentence_labels` 0). Else (1) B is as many tokens of another document, which begin
    behind the end of a sentence likewise. Where the other document has too few, B is cut to as many whichever it is: so
    neither the length of a pair nor the way that its texts begin tells which.

    Args:
        masked: how tokens are hidden.

    Reference: Devlin et al. 2019, section 3.1. There a tenth of the pairs is kept short.
    """

    needs_other: ClassVar[bool] = True

    def __call__(self, rows: Rows) -> Batch:
        """Gives the pairs, `next_sentence_labels` [B], and what was hidden [B, M]."""
        assert rows.other is not None
        tokens, size = _bare(rows)
        split = self._split(tokens, size, np.ones_like(size), rows.seeds, _SPLIT)
        rest = size - split
        others, other_size = _bare(rows.other)
        start = self._split(others, other_size, rest, rows.seeds, _OTHER_SPLIT)
        start = np.where(other_size - start >= rest, start, np.maximum(other_size - rest, 0))
        is_other = uniform(rows.seeds, _LABEL, 1)[:, 0] < 0.5
        second = np.where(is_other[:, None], _shifted(others, start), _shifted(tokens, split))
        sizes = np.stack([split, np.minimum(rest, other_size - start)])
        return self._batch(rows, tokens, second, sizes, is_other)


class SentenceOrder(_SentencePairs):
    """Hidden tokens, and whether two texts that follow one another have changed places.

    Half of the time they have not (`next_sentence_labels` 0), half of the time they have (1).

    Args:
        masked: how tokens are hidden.

    Reference: Lan et al. 2020 (ALBERT), section 3.1.
    """

    def __call__(self, rows: Rows) -> Batch:
        """Gives the pairs, `next_sentence_labels` [B], and what was hidden [B, M]."""
        tokens, size = _bare(rows)
        split = self._split(tokens, size, np.ones_like(size), rows.seeds, _SPLIT)
        swapped = uniform(rows.seeds, _LABEL, 1)[:, 0] < 0.5
        rest = _shifted(tokens, split)
        first, second = (np.where(swapped[:, None], *texts) for texts in ((rest, tokens), (tokens, rest)))
        sizes = np.stack([np.where(swapped, size - split, split), np.where(swapped, split, size - split)])
        return self._batch(rows, first, second, sizes, swapped)


def _bare(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of rows [B, T] without their frames, and how many there are in each row [B]."""
    size = np.maximum((rows.segment_ids > 0).sum(1) - _SentencePairs.frame, 0)
    return np.roll(rows.token_ids, -1, 1), size


def _shifted(tokens: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Rows [B, T] from a column of their own on."""
    length = tokens.shape[1]
    return np.take_along_axis(tokens, np.minimum(start[:, None] + np.arange(length), length - 1), 1)
