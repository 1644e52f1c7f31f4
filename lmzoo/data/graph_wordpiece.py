"""The in-graph twin of BERT's tokenizer: WordPiece after BERT's normalizer and pre-tokenizer.

Text becomes one long vector of code points, which tables turn into words; each different word of a batch is cut into
pieces once. Every result keeps the number of the character that it came from, so offsets are those into the text as it
was given.

Reference: Devlin et al. 2019 and its published tokenizer; Wu et al. 2016 (WordPiece).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import tensorflow as tf
import tokenizers

from lmzoo.data.graph_code_points import DROPPED, LETTER, ORDERS, SPACE, CodePointTable, Expanded, row_ids
from lmzoo.data.graph_tokenizers import SPECIAL, PieceGraphTokenizer, decoded, require, string_table
from lmzoo.data.graph_trees import CODE_POINT_BITS, token_trees


class WordPieceGraphTokenizer(PieceGraphTokenizer):
    """WordPiece as BERT's, cased or not.

    `encode_with_offsets(texts)`: the ids, and beside each the characters [start, end) of the text that it stands for,
    as ragged int32 [B, None, 2]. Each maximal part of a text that is not UTF-8 counts as the one character that takes
    its place.

    `encode_pairs(first, second, max_length)`: what BERT reads, special tokens included; see `Tokenizer.encode_pairs`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, spec: dict[str, Any]):
        model, normalizer = spec["model"], spec["normalizer"] or {}
        require(normalizer.get("type") == "BertNormalizer", f"its normalizer is {normalizer.get('type')}")
        kind = (spec["pre_tokenizer"] or {}).get("type")
        require(kind == "BertPreTokenizer", f"its pre-tokenizer is {kind}")
        require(backend.decoder is not None, "it has no decoder")
        for token in spec["added_tokens"]:
            for option in ("normalized", "lstrip", "rstrip"):
                require(not token[option], f"its token {token['content']!r} has {option}=True")
        vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"]
        require(model["unk_token"] in vocabulary, f"its vocabulary lacks its unk_token, {model['unk_token']!r}")
        super().__init__(spec, functools.partial(decoded, backend))
        accents = normalizer["strip_accents"]
        self._code_points = CodePointTable(
            normalizer["clean_text"],
            normalizer["handle_chinese_chars"],
            normalizer["lowercase"] if accents is None else accents,
            normalizer["lowercase"],
        )
        self._unknown, self._longest = vocabulary[model["unk_token"]], model["max_input_chars_per_word"]
        words = {token: index for token, index in vocabulary.items() if len(token) <= self._longest}
        self._words = string_table({token.encode(): index for token, index in words.items()} | self._special_keys())
        lengths = {SPECIAL + token["content"].encode(): len(token["content"]) for token in self._added}
        self._special_lengths = string_table(lengths)
        inside = {token[len(prefix) :]: index for token, index in words.items() if token.startswith(prefix)}
        self._pieces = _PieceTable(words, inside)
        self._trace()

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Token ids, ragged int32 [B, None], of the texts, tf.string [B]."""
        return self.encode_with_offsets(texts)[0]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def encode_with_offsets(self, texts: tf.Tensor) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Token ids, ragged int32 [B, None], and their characters [start, end), ragged int32 [B, None, 2]."""
        with tf.device("CPU:0"):
            texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
            words = self._split_words(self._split_special(texts).strings)
            pieces = self._encode_words(words.strings)
            # Where each piece begins and ends among the characters of all words.
            word = row_ids(pieces.ids)
            word_begin, word_end = tf.gather(words.splits, word), tf.gather(words.splits, word + 1)
            begin = word_begin + pieces.begins
            end = tf.where(pieces.lengths < 0, word_end, begin + pieces.lengths)
            offsets = tf.stack([tf.gather(words.starts, begin), tf.gather(words.ends, end - 1)], 1)
            splits = tf.gather(pieces.ids.row_splits, words.text_splits)
            return (
                tf.RaggedTensor.from_row_splits(tf.cast(pieces.ids.values, tf.int32), splits, validate=False),
                tf.RaggedTensor.from_row_splits(tf.cast(offsets, tf.int32), splits, validate=False),
            )

    def _split_words(self, pieces: tf.RaggedTensor) -> _Words:
        """The words of texts [B, pieces] that are cut at their special tokens."""
        lengths = self._special_lengths.lookup(pieces.values)
        is_special = lengths >= 0
        # A special token is one character on its way through the tables; "\0" stands in for it.
        characters = tf.strings.unicode_decode(tf.where(is_special, "\0", pieces.values), "UTF-8")
        piece = row_ids(characters)
        widths = tf.where(tf.gather(is_special, piece), tf.gather(lengths, piece), 1)
        ends = tf.cumsum(widths)
        text_splits = tf.gather(characters.row_splits, pieces.row_splits)
        text = row_ids(tf.RaggedTensor.from_row_splits(ends, text_splits, validate=False))
        earlier = tf.gather(tf.concat([[0], ends], 0), tf.gather(text_splits, text))  # characters of earlier texts

        results = self._code_points.expand(characters.values, tf.gather(is_special, piece))
        if self._code_points.reorders:
            movable = tf.reduce_any((results.order > 0) & (results.kinds != DROPPED))
            results = Expanded(*tf.cond(movable, lambda: tuple(_reordered(results, piece)), lambda: tuple(results)))
        results = _select(results, results.kinds != DROPPED)
        owner = tf.gather(piece, results.source)
        letter = results.kinds == LETTER
        joined = letter[1:] & letter[:-1] & (owner[1:] == owner[:-1])
        begins = tf.concat([tf.ones_like(owner[:1], tf.bool), ~joined], 0)
        no_space = results.kinds != SPACE
        begins, results = tf.boolean_mask(begins, no_space), _select(results, no_space)

        first = tf.where(begins)[:, 0]
        splits = tf.concat([first, [tf.size(begins, tf.int64)]], 0)
        strings = tf.strings.unicode_encode(
            tf.RaggedTensor.from_row_splits(results.code_points, splits, validate=False), "UTF-8"
        )
        source = tf.gather(results.source, first)
        owner = tf.gather(piece, source)
        special = tf.where(tf.gather(is_special, owner))
        return _Words(
            strings=tf.tensor_scatter_nd_update(
                strings, special, tf.gather(pieces.values, tf.gather_nd(owner, special))
            ),
            text_splits=tf.searchsorted(source, text_splits, out_type=tf.int64),
            splits=splits,
            starts=tf.gather(ends - widths - earlier, results.source),
            ends=tf.gather(ends - earlier, results.source),
        )

    def _encode_words(self, words: tf.Tensor) -> _Pieces:
        """The pieces of words [W], each different word of which is cut once."""
        words, index = tf.unique(words, out_idx=tf.int64)
        whole = self._words.lookup(words)
        too_long = (whole < 0) & (tf.strings.length(words, "UTF8_CHAR") > self._longest)
        whole = tf.where(too_long, tf.constant(self._unknown, tf.int64), whole)
        # A word that needs no cutting is one character; "\0" stands in for its own.
        characters = tf.strings.unicode_decode(tf.where(whole >= 0, "\0", words), "UTF-8")
        word = row_ids(characters)
        token = tf.gather(whole, word)
        cut = token < 0
        at = tf.where(cut)[:, 0]
        ids, lengths, is_piece = self._pieces.cut(tf.gather(characters.values, at), tf.gather(word, at), self._unknown)
        at = at[:, None]
        token = tf.tensor_scatter_nd_update(token, at, ids)
        lengths = tf.tensor_scatter_nd_update(tf.fill(tf.shape(token), tf.constant(-1, tf.int64)), at, lengths)
        is_piece = tf.tensor_scatter_nd_update(~cut, at, is_piece)
        begins = tf.range(tf.size(token, tf.int64)) - tf.gather(characters.row_starts(), word)
        kept = tf.where(is_piece)[:, 0]
        table = tf.stack([tf.gather(values, kept) for values in (token, begins, lengths)], 1)
        word = tf.gather(word, kept)
        all_pieces = tf.RaggedTensor.from_value_rowids(table, word, tf.size(words, tf.int64), validate=False)
        all_pieces = tf.gather(all_pieces, index)
        ids, begins, lengths = tf.unstack(all_pieces.values, axis=1)
        return _Pieces(all_pieces.with_values(ids), begins, lengths)


class _Words(NamedTuple):
    """Words of texts.

    Shapes: B texts, W words in all of them, C characters in all of those.
        strings: [W] tf.string, special tokens marked by a leading `SPECIAL`.
        text_splits: [B + 1] int64, the words of each text.
        splits: [W + 1] int64, the characters of each word.
        starts, ends: [C] int64, where in its text the character is that each came from.
    """

    strings: tf.Tensor
    text_splits: tf.Tensor
    splits: tf.Tensor
    starts: tf.Tensor
    ends: tf.Tensor


class _Pieces(NamedTuple):
    """Pieces of words.

    Shapes: W words, P pieces in all of them.
        ids: ragged int64 [W, None].
        begins: [P] int64, the character of its word at which a piece begins.
        lengths: [P] int64, its characters; -1 for all that the word has.
    """

    ids: tf.RaggedTensor
    begins: tf.Tensor
    lengths: tf.Tensor


class _PieceTable(tf.Module):
    """Cuts words into the longest pieces, from left to right.

    The longest piece that starts at a character does not depend on where the pieces before it end. So it is sought for
    all characters of all words at once, a step in two tries for each further character; then every word is followed
    from piece to piece, all words a piece at a time.

    Args:
        first: pieces that begin a word, with their ids.
        inside: pieces that come later, without their prefix.
    """

    def __init__(self, first: dict[str, int], inside: dict[str, int]):
        super().__init__()
        # Node 0 is the root of `first`, node 1 of `inside`.
        self._token_of, self._children = token_trees(first, inside)

    def cut(self, characters: tf.Tensor, word: tf.Tensor, unknown: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Cuts words.

        Args:
            characters: int32 [N], the characters of all words, one word after another.
            word: int64 [N], ascending: the word of each character.
            unknown: the id of a word that cannot be cut.

        Returns:
            Of the piece that starts at each character, [N]: its id, its length (-1 for the whole of a word), and
            whether it is one of the pieces of its word.
        """
        size = tf.size(word, tf.int64)
        first = tf.concat([tf.ones_like(word[:1], tf.bool), word[1:] != word[:-1]], 0)
        ids, lengths = self._longest(tf.cast(characters, tf.int64), word, first)
        starts = tf.where(first)[:, 0]
        splits = tf.concat([starts, [size]], 0)
        number = tf.cumsum(tf.cast(first, tf.int64)) - 1
        word_ends = tf.gather(splits, number + 1)

        def step(at: tf.Tensor, is_piece: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            is_piece = tf.tensor_scatter_nd_update(is_piece, at[:, None], tf.ones_like(at, tf.bool))
            then = at + tf.gather(lengths, at)
            goes_on = (tf.gather(ids, at) >= 0) & (then < tf.gather(word_ends, at))
            return tf.boolean_mask(then, goes_on), is_piece

        vector = tf.TensorShape([None])
        _, is_piece = tf.while_loop(
            lambda at, _: tf.size(at) > 0, step, (starts, tf.zeros_like(first)), shape_invariants=(vector, vector)
        )
        # A word that came to a character at which no piece starts is unknown as a whole.
        stuck = tf.cast(is_piece & (ids < 0), tf.int64)
        bad = tf.gather(tf.math.segment_sum(stuck, number), number) > 0
        return (
            tf.where(bad, tf.constant(unknown, tf.int64), ids),
            tf.where(bad, tf.constant(-1, tf.int64), lengths),
            tf.where(bad, first, is_piece),
        )

    def _longest(self, characters: tf.Tensor, word: tf.Tensor, first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The id, -1 if there is none, and the length of the longest piece that starts at each character [N]."""
        size = tf.size(word, tf.int64)
        none = tf.fill([size], tf.constant(-1, tf.int64))

        def step(
            depth: tf.Tensor, at: tf.Tensor, node: tf.Tensor, ids: tf.Tensor, lengths: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            here = at + depth
            inside = here < size
            here = tf.where(inside, here, at)
            inside &= tf.gather(word, here) == tf.gather(word, at)
            at, node, here = (tf.boolean_mask(values, inside) for values in (at, node, here))
            node = self._children.lookup(node * (1 << CODE_POINT_BITS) + tf.gather(characters, here))
            found = node >= 0
            at, node = tf.boolean_mask(at, found), tf.boolean_mask(node, found)
            token = tf.gather(self._token_of, node)
            ends = tf.where(token >= 0)
            which = tf.gather(at, ends)
            ids = tf.tensor_scatter_nd_update(ids, which, tf.gather_nd(token, ends))
            lengths = tf.tensor_scatter_nd_update(lengths, which, tf.fill(tf.shape(ends)[:1], depth + 1))
            return depth + 1, at, node, ids, lengths

        vector = tf.TensorShape([None])
        root = tf.where(first, tf.constant(0, tf.int64), tf.constant(1, tf.int64))
        *_, ids, lengths = tf.while_loop(
            lambda _, at, *rest: tf.size(at) > 0,
            step,
            (tf.constant(0, tf.int64), tf.range(size), root, none, none),
            shape_invariants=(tf.TensorShape([]), vector, vector, vector, vector),
        )
        return ids, lengths


def _select(results: Expanded, kept: tf.Tensor) -> Expanded:
    at = tf.where(kept)[:, 0]
    return Expanded(*(tf.gather(values, at) for values in results))


def _reordered(results: Expanded, piece: tf.Tensor) -> Expanded:
    """Puts combining marks into canonical order.

    The library takes the first result of a character, wherever it has moved, for that of the next character in line.
    """
    owner = tf.gather(piece, results.source)
    stays = tf.concat([tf.ones_like(owner[:1], tf.bool), owner[1:] != owner[:-1]], 0) | (results.order == 0)
    run = tf.cumsum(tf.cast(stays, tf.int64))
    by_order = tf.argsort(run * ORDERS + tf.cast(results.order, tf.int64), stable=True)
    moved = Expanded(*(tf.gather(values, by_order) for values in results))
    in_line = tf.boolean_mask(results.source, results.is_first)
    return moved._replace(source=tf.gather(in_line, tf.cumsum(tf.cast(moved.is_first, tf.int64)) - 1))
