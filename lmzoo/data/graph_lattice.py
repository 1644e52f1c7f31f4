"""Unigram segmentation in a graph: the best way through the pieces of words, all words of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from lmzoo.data.graph_code_points import row_ids
from lmzoo.data.graph_trees import CODE_POINT_BITS, token_trees

_UNKNOWN_PENALTY = 10.0  # below the lowest score of a piece, for a character that is none


class Lattice(tf.Module):
    """Cuts words into the pieces whose scores add up to most; of equals, into those that begin earliest.

    All pieces that begin at any character are found at once, a step in a trie for each further character. Then a loop
    goes through the places in a word, all words a character at a time, and another one back along the best pieces.

    Args:
        vocabulary: pieces in the order of their ids, with their scores.
        unknown: the id for what is made of no pieces.
        byte_fallback: whether it is written in the pieces `<0x00>`... instead, if there are any.

    Reference: Kudo 2018, section 3.1; Viterbi 1967.
    """

    def __init__(self, vocabulary: Sequence[Sequence[str | float]], unknown: int, byte_fallback: bool):
        super().__init__()
        ids = {str(token): index for index, (token, _) in enumerate(vocabulary)}
        self._token_of, self._children = token_trees(ids)
        scores = [float(score) for _, score in vocabulary]
        self._scores = tf.constant(scores, tf.float64)
        self._unknown, self._unknown_score = unknown, min(scores) - _UNKNOWN_PENALTY
        byte_ids = [ids.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
        self._byte_ids = tf.constant(byte_ids, tf.int64) if byte_fallback and max(byte_ids) >= 0 else None

    def cut(self, words: tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Cuts words.

        Args:
            words: int32 [W, None], their characters.

        Returns:
            Of each piece, in order: its word, its id, and the characters [first, last) of its word, int64 each.
        """
        word = row_ids(words)
        starts = words.row_starts()
        begin, end, token = self._all_pieces(words.values, word)
        # A node is a place in a word, before its first character or behind any.
        node_of_start = begin + tf.gather(word, begin)
        node_of_end = node_of_start + end - begin
        depth = end - tf.gather(starts, tf.gather(word, begin))
        order = tf.argsort(_rank(depth, end, begin))
        begin, end, token, node_of_start, node_of_end, depth = (
            tf.gather(values, order) for values in (begin, end, token, node_of_start, node_of_end, depth)
        )
        score = tf.where(
            token < 0,
            tf.constant(self._unknown_score, tf.float64),
            tf.gather(self._scores, tf.maximum(token, 0)),
        )
        best = self._best(node_of_start, node_of_end, depth, score, tf.size(word, tf.int64) + words.nrows())
        chosen = self._trace_back(best, node_of_start, words)
        order = tf.argsort(tf.gather(begin, chosen))
        chosen = tf.gather(chosen, order)
        begin, end, token = (tf.gather(values, chosen) for values in (begin, end, token))
        return self._named(begin, end, token, words.values, word, starts)

    def _all_pieces(self, characters: tf.Tensor, word: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Where each piece that could be one begins and ends, and its id; -1 for a character that is no piece."""
        size = tf.size(word, tf.int64)
        characters = tf.cast(characters, tf.int64)

        def step(depth: tf.Tensor, at: tf.Tensor, node: tf.Tensor, *found: tf.Tensor) -> tuple[tf.Tensor, ...]:
            here = at + depth
            inside = here < size
            here = tf.where(inside, here, at)
            inside &= tf.gather(word, here) == tf.gather(word, at)
            at, node, here = (tf.boolean_mask(values, inside) for values in (at, node, here))
            node = self._children.lookup(node * (1 << CODE_POINT_BITS) + tf.gather(characters, here))
            ok = tf.where(node >= 0)[:, 0]
            at, node = tf.gather(at, ok), tf.gather(node, ok)
            token = tf.gather(self._token_of, node)
            which = tf.where(token >= 0)[:, 0]
            begin = tf.gather(at, which)
            new = (begin, begin + depth + 1, tf.gather(token, which))
            return depth + 1, at, node, *(tf.concat(pair, 0) for pair in zip(found, new, strict=True))

        vector = tf.TensorShape([None])
        empty = tf.zeros([0], tf.int64)
        *_, begin, end, token = tf.while_loop(
            lambda _, at, *rest: tf.size(at) > 0,
            step,
            (tf.constant(0, tf.int64), tf.range(size), tf.zeros_like(word), empty, empty, empty),
            shape_invariants=(tf.TensorShape([]), *(vector,) * 5),
        )
        single = tf.boolean_mask(begin, end == begin + 1)[:, None]
        alone = tf.tensor_scatter_nd_update(tf.ones_like(word, tf.bool), single, tf.zeros_like(single[:, 0], tf.bool))
        alone = tf.where(alone)[:, 0]
        nothing = tf.fill(tf.shape(alone), tf.constant(-1, tf.int64))
        pairs = ((begin, alone), (end, alone + 1), (token, nothing))
        begin, end, token = (tf.concat(pair, 0) for pair in pairs)
        return begin, end, token

    def _best(
        self, start: tf.Tensor, end: tf.Tensor, depth: tf.Tensor, score: tf.Tensor, num_nodes: tf.Tensor
    ) -> tf.Tensor:
        """The best piece that ends at each node, -1 where a word begins; pieces come sorted by depth, end and start."""
        longest = tf.reduce_max(tf.concat([[0], depth], 0))
        splits = tf.searchsorted(depth, tf.range(longest + 2), out_type=tf.int64)
        total = tf.zeros([num_nodes], tf.float64)
        best = tf.fill([num_nodes], tf.constant(-1, tf.int64))
        target = tf.cumsum(tf.cast(tf.concat([tf.zeros_like(end[:1], tf.bool), end[1:] != end[:-1]], 0), tf.int64))

        def step(place: tf.Tensor, total: tf.Tensor, best: tf.Tensor) -> tuple[tf.Tensor, ...]:
            first, behind = splits[place], splits[place + 1]
            candidates = tf.gather(total, start[first:behind]) + score[first:behind]
            group = target[first:behind] - target[first]
            most = tf.math.segment_max(candidates, group)
            number = tf.range(first, behind)
            wins = tf.where(candidates == tf.gather(most, group), number, behind)
            winner = tf.math.segment_min(wins, group)
            node = tf.gather(end, winner)[:, None]
            total = tf.tensor_scatter_nd_update(total, node, most)
            return place + 1, total, tf.tensor_scatter_nd_update(best, node, winner)

        *_, best = tf.while_loop(
            lambda place, *_: place <= longest, step, (tf.constant(1, tf.int64), total, best), parallel_iterations=1
        )
        return best

    def _trace_back(self, best: tf.Tensor, start: tf.Tensor, words: tf.RaggedTensor) -> tf.Tensor:
        """The pieces on the best way through each word, in any order."""
        node = words.row_limits() + tf.range(words.nrows())
        node = tf.boolean_mask(node, words.row_lengths() > 0)

        def step(node: tf.Tensor, chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            piece = tf.gather(best, node)
            node = tf.gather(start, piece)
            return tf.boolean_mask(node, tf.gather(best, node) >= 0), tf.concat([chosen, piece], 0)

        vector = tf.TensorShape([None])
        _, chosen = tf.while_loop(
            lambda node, _: tf.size(node) > 0,
            step,
            (node, tf.zeros([0], tf.int64)),
            shape_invariants=(vector, vector),
        )
        return chosen

    def _named(
        self,
        begin: tf.Tensor,
        end: tf.Tensor,
        token: tf.Tensor,
        characters: tf.Tensor,
        word: tf.Tensor,
        starts: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Pieces with unknown ones beside each other made one, or written in bytes."""
        owner = tf.gather(word, begin)
        unknown = (token < 0) | (token == self._unknown)
        again = unknown[1:] & unknown[:-1] & (owner[1:] == owner[:-1])
        none = tf.zeros_like(unknown[:1])
        first = tf.where(~tf.concat([none, again], 0))[:, 0]
        last = tf.where(~tf.concat([again, none], 0))[:, 0]
        literal = tf.gather(token, first) >= 0
        alone = first == last
        begin, end, owner = tf.gather(begin, first), tf.gather(end, last), tf.gather(owner, first)
        ids = tf.where(tf.gather(unknown, first), tf.constant(self._unknown, tf.int64), tf.gather(token, first))
        offset = tf.gather(starts, owner)
        columns = (owner, ids, begin - offset, end - offset)
        if self._byte_ids is None:
            return columns
        spell = tf.gather(unknown, first) & ~(literal & alone)
        return tf.cond(
            tf.reduce_any(spell), lambda: self._spelled(columns, spell, begin, end, characters), lambda: columns
        )

    def _spelled(
        self,
        columns: tuple[tf.Tensor, ...],
        spell: tf.Tensor,
        begin: tf.Tensor,
        end: tf.Tensor,
        characters: tf.Tensor,
    ) -> tuple[tf.Tensor, ...]:
        """The pieces with some of them written in bytes, each of which stands for all characters of its piece."""
        at = tf.where(spell)[:, 0]
        lengths = tf.gather(end - begin, at)
        place = tf.ragged.range(tf.gather(begin, at), tf.gather(end, at))
        texts = tf.strings.unicode_encode(
            tf.RaggedTensor.from_row_lengths(tf.gather(characters, place.values), lengths, validate=False), "UTF-8"
        )
        bytes_ = tf.strings.unicode_decode(texts, "ISO-8859-1")
        byte_ids = tf.gather(self._byte_ids, bytes_.values)
        row = row_ids(bytes_)
        lacking = tf.math.unsorted_segment_min(byte_ids, row, tf.size(at)) < 0
        counts = tf.tensor_scatter_nd_update(
            tf.ones_like(columns[0]), at[:, None], tf.where(lacking, tf.ones_like(lengths), bytes_.row_lengths())
        )
        source = row_ids(tf.RaggedTensor.from_row_lengths(tf.zeros([tf.reduce_sum(counts)]), counts, validate=False))
        owner, ids, first, last = (tf.gather(values, source) for values in columns)
        spelled = tf.tensor_scatter_nd_update(tf.zeros_like(spell), at[:, None], ~lacking)
        where = tf.where(tf.gather(spelled, source))
        ids = tf.tensor_scatter_nd_update(ids, where, tf.boolean_mask(byte_ids, ~tf.gather(lacking, row)))
        return owner, ids, first, last


def _rank(depth: tf.Tensor, end: tf.Tensor, begin: tf.Tensor) -> tf.Tensor:
    """A number that sorts pieces by their depth, then by their end, then by their beginning."""
    most = 1 + tf.reduce_max(tf.concat([[0], end], 0))
    longest = 1 + tf.reduce_max(tf.concat([[0], end - begin], 0))
    return (depth * most + end) * longest - (end - begin)
