"""Byte-pair merges in a graph: all words of a batch at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf


class MergeTable(tf.Module):
    """Merges adjacent symbols of words as byte-pair encoding does.

    In a word, byte-pair encoding merges the pair of the lowest rank, the leftmost of equals, until no pair has a
    rank. Words do not know one another, and equal pairs of a word can be merged together, so one step of the loop here
    merges in every word all the pairs of that word's lowest rank. The number of steps is that of the different merges
    that the word with most of them needs: 13 for 5,000 equal characters, not 5,000.

    Equal pairs may be merged together only if merging one does not bring forth a pair of a lower rank, to be merged
    before the others. Merges that were learned one after another hardly ever do; where a list of merges can, each step
    ends in a word behind the first merge that does.

    Reference: Sennrich et al. 2016, section 3.2.

    Args:
        merges: pairs of tokens in the order of their ranks, as two strings or as one with a space between.
        vocabulary: token to id.
    """

    def __init__(self, merges: Iterable[str | Sequence[str]], vocabulary: Mapping[str, int]):
        super().__init__()
        self._width = max(vocabulary.values(), default=0) + 1
        ranks: dict[int, int] = {}
        merged = []
        first_use: dict[int, int] = {}
        for rank, merge in enumerate(merges):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            left_id, right_id = vocabulary[left], vocabulary[right]
            ranks[left_id * self._width + right_id] = rank
            merged.append(vocabulary[left + right])
            for part in (left_id, right_id):
                first_use.setdefault(part, rank)
        # The rank of pairs that do not merge, with a row of its own in `_merged`.
        self._none = len(merged)
        self._in_order = all(first_use.get(token, rank) >= rank for rank, token in enumerate(merged))
        self._merged = tf.constant([*merged, 0], tf.int64)
        ranks = ranks or {-1: self._none}  # a table must not be empty
        keys = tf.constant(np.fromiter(ranks, np.int64, len(ranks)))
        values = tf.constant(np.fromiter(ranks.values(), np.int64, len(ranks)))
        self._ranks = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(keys, values), default_value=self._none
        )

    def apply(self, symbols: tf.Tensor, owner: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Merges until nothing is left to merge.

        Args:
            symbols: int64 [N], the symbols of all words, one word after another.
            owner: int64 [N], ascending: the word of each symbol.

        Returns:
            The symbols that remain, their words, and the places at which they begin, int64 [M] each.
        """
        # Symbols of finished words leave the loop for their places in `done`, so that a long word does not drag the
        # others through all of its steps.
        done = tf.fill(tf.shape(symbols), tf.constant(-1, tf.int64))
        place = tf.range(tf.size(symbols, tf.int64))

        def step(symbols: tf.Tensor, word: tf.Tensor, place: tf.Tensor, done: tf.Tensor) -> tuple[tf.Tensor, ...]:
            ranks = self._pair_ranks(symbols[:-1], symbols[1:], word[:-1] == word[1:])
            ranks = tf.concat([ranks, [self._none]], 0)
            lowest = tf.gather(tf.math.segment_min(ranks, word), word)
            live = lowest < self._none
            over = tf.where(~live)
            done = tf.tensor_scatter_nd_update(done, tf.gather(place, over), tf.gather_nd(symbols, over))
            left = _without_overlaps(tf.where(live & (ranks == lowest))[:, 0])
            if not self._in_order:
                left = self._until_lower_rank(symbols, word, ranks, left)
            left = left[:, None]
            symbols = tf.tensor_scatter_nd_update(symbols, left, tf.gather(self._merged, tf.gather_nd(ranks, left)))
            live = tf.tensor_scatter_nd_update(live, left + 1, tf.zeros_like(left[:, 0], tf.bool))
            kept = tf.where(live)[:, 0]
            return tf.gather(symbols, kept), tf.gather(word, kept), tf.gather(place, kept), done

        vector = tf.TensorShape([None])
        _, _, _, done = tf.while_loop(
            lambda symbols, *_: tf.size(symbols) > 0,
            step,
            (symbols, owner, place, done),
            shape_invariants=(vector, vector, vector, vector),
        )
        left = tf.where(done >= 0)[:, 0]
        return tf.gather(done, left), tf.gather(owner, left), left

    def _pair_ranks(self, left: tf.Tensor, right: tf.Tensor, same_word: tf.Tensor) -> tf.Tensor:
        ranks = self._ranks.lookup(left * self._width + right)
        return tf.where(same_word, ranks, self._none)

    def _until_lower_rank(self, symbols: tf.Tensor, word: tf.Tensor, ranks: tf.Tensor, left: tf.Tensor) -> tf.Tensor:
        """Of the pairs at `left`, those up to the first in each word whose merge brings forth a lower rank.

        Taken from left to right, the symbol before a pair may be the fresh result of the pair before it, while the
        symbol behind it is still untouched.
        """
        rank = tf.gather(ranks, left)
        result = tf.gather(self._merged, rank)
        owner = tf.gather(word, left)
        before, behind = tf.maximum(left - 1, 0), tf.minimum(left + 2, tf.size(symbols, tf.int64) - 1)
        adjacent = tf.concat([tf.zeros_like(left[:1], tf.bool), left[1:] - 2 == left[:-1]], 0)
        previous = tf.where(adjacent, tf.roll(result, 1, 0), tf.gather(symbols, before))
        ends = [
            self._pair_ranks(previous, result, (before < left) & (tf.gather(word, before) == owner)),
            self._pair_ranks(
                result, tf.gather(symbols, behind), (behind > left + 1) & (tf.gather(word, behind) == owner)
            ),
        ]
        stop = tf.cast(tf.minimum(*ends) < rank, tf.int64)
        stops_before = tf.cumsum(stop, exclusive=True)
        first = tf.gather(tf.math.segment_min(stops_before, owner), owner)
        return tf.boolean_mask(left, stops_before == first)


def _without_overlaps(left: tf.Tensor) -> tf.Tensor:
    """Of pairs that start at `left` [K], ascending, every other one in each run of overlapping ones."""
    starts = tf.concat([tf.ones_like(left[:1], tf.bool), left[1:] != left[:-1] + 1], 0)
    run = tf.cumsum(tf.cast(starts, tf.int64)) - 1
    offset = left - tf.gather(tf.boolean_mask(left, starts), run)
    return tf.boolean_mask(left, offset % 2 == 0)
