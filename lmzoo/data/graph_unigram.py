"""The in-graph twin of Unigram tokenizers behind Metaspace, as SentencePiece's: those of T5, ALBERT and XLM-R.

Text becomes one long vector of code points, which the normalizers change; each different word of a batch is then cut
into the pieces whose scores add up to most, all words at once. Every character keeps the place that the library gives
it, so offsets are those into the text as it was given.

Reference: Kudo 2018, section 3; Kudo and Richardson 2018 (SentencePiece).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import tensorflow as tf
import tokenizers

from lmzoo.data.graph_code_points import begins, row_ids
from lmzoo.data.graph_lattice import Lattice
from lmzoo.data.graph_normalizers import TOKEN, Characters, is_space, make_normalizers, put_before, select
from lmzoo.data.graph_tokenizers import SPECIAL, PieceGraphTokenizer, Pieces, decoded, require, string_table

_SPACE = ord(" ")
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class UnigramGraphTokenizer(PieceGraphTokenizer):
    """Unigram behind Metaspace.

    `encode_with_offsets(texts)`: the ids, and beside each the characters [start, end) of the text that it stands for,
    as ragged int32 [B, None, 2]. Each maximal part of a text that is not UTF-8 counts as the one character that takes
    its place.

    `encode_pairs(first, second, max_length)`: what an encoder reads, special tokens included; see
    `Tokenizer.encode_pairs`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, spec: dict[str, Any]):
        model = spec["model"]
        require(model["unk_id"] is not None, "it has no unknown token")
        decoder = spec["decoder"] or {}
        decoders = [part["type"] for part in decoder.get("decoders", [decoder] if decoder else [])]
        require(
            decoders in (["Metaspace"], ["ByteFallback", "Metaspace"]),
            f"its decoder is {' and '.join(decoders) or None}",
        )
        for token in spec["added_tokens"]:
            changes = token["normalized"] and spec["normalizer"] is not None
            require(not changes, f"its token {token['content']!r} has normalized=True")
        steps = _steps(spec["pre_tokenizer"])
        kinds = [step["type"] for step in steps]
        require(
            kinds in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]), f"its pre-tokenizer is {' and '.join(kinds)}"
        )
        self._at_spaces, metaspace = len(steps) == 2, steps[-1]
        by_bytes = len(decoders) == 2
        super().__init__(
            spec,
            lambda token, first: (
                bytes([_byte(token)]) if by_bytes and _byte(token) >= 0 else decoded(backend, token, first)
            ),
        )
        self._mark = ord(metaspace["replacement"])
        self._prepends, self._splits = metaspace["prepend_scheme"], metaspace["split"]
        self._normalizers = make_normalizers(spec["normalizer"], lambda what: require(False, what))
        self._words = string_table({**_whole_words(backend), **self._special_keys()})
        self._byte_of = None
        if by_bytes:
            self._byte_of = tf.constant([_byte(token) for token in self._tokens], tf.int32)
        self._lattice = Lattice(model["vocab"], model["unk_id"], model["byte_fallback"])
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
            pieces = self._split_special(texts)
            words = self._split_words(pieces)
            unique, index = tf.unique(words.strings, out_idx=tf.int64)
            ids, first, last = (tf.gather(column, index) for column in self._encode_words(unique))  # [words, None]
            word = row_ids(ids)
            begin = tf.gather(words.splits, word) + first.values
            end = tf.where(
                last.values < 0, tf.gather(words.splits, word + 1), tf.gather(words.splits, word) + last.values
            )
            offsets = tf.stack([tf.gather(words.starts, begin), tf.gather(words.ends, end - 1)], 1)
            splits = tf.gather(ids.row_splits, words.text_splits)
            ids = tf.RaggedTensor.from_row_splits(tf.cast(ids.values, tf.int32), splits, validate=False)
            return ids, ids.with_values(offsets)

    @tf.function(autograph=False)
    def decode(self, ids: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
        """Texts, tf.string [B], of the token ids, int32 [B, T] or ragged [B, None]."""
        if self._byte_of is None:
            return super().decode(ids)
        with tf.device("CPU:0"):
            values, row, num_rows = self._kept_ids(ids)
            is_byte = tf.gather(self._byte_of, values) >= 0
            goes_on = tf.concat([tf.zeros_like(is_byte[:1]), is_byte[1:] & is_byte[:-1]], 0) & ~begins(row)
            run = tf.cumsum(tf.cast(~goes_on, tf.int64)) - 1
            num_runs = 1 + tf.reduce_max(tf.concat([[-1], run], 0))
            tokens = tf.where(begins(row), tf.gather(self._token_bytes, values), tf.gather(self._later_bytes, values))
            pieces = tf.strings.unsorted_segment_join(tokens, run, num_runs)
            # Bytes that are not UTF-8 all together are replaced one by one.
            texts = tf.strings.unicode_transcode(pieces, "UTF-8", "UTF-8", errors="replace")
            lost = tf.strings.unsorted_segment_join(tf.fill(tf.shape(tokens), "\ufffd"), run, num_runs)
            row = tf.boolean_mask(row, ~goes_on)
            texts = tf.where(texts == pieces, texts, lost)
            # Bytes may spell the mark of a space.
            mark = chr(self._mark)
            texts = tf.where(
                begins(row) & (self._prepends != "never"),
                tf.strings.regex_replace(texts, mark, ""),
                tf.strings.regex_replace(texts, mark, " "),
            )
            return tf.strings.unsorted_segment_join(texts, row, num_rows)

    def _split_words(self, pieces: Pieces) -> _Words:
        """The words of texts that are cut at their special tokens."""
        strings = pieces.strings.values
        is_token = tf.strings.substr(strings, 0, 1) == SPECIAL
        # A special token is one character on its way through the normalizers; "\0" stands in for it.
        decoded = tf.strings.unicode_decode(tf.where(is_token, "\0", strings), "UTF-8")
        piece = row_ids(decoded)
        of_token = tf.gather(is_token, piece)
        number = tf.cast(tf.range(tf.size(piece, tf.int64)) - tf.gather(decoded.row_starts(), piece), tf.int32)
        starts = tf.gather(pieces.starts, piece) + number
        characters = Characters(
            tf.where(of_token, TOKEN, decoded.values),
            piece,
            starts,
            tf.where(of_token, tf.gather(pieces.ends, piece), starts + 1),
        )
        for normalizer in self._normalizers:
            characters = normalizer(characters)
        characters, first = self._marked(characters)

        at = tf.where(first)[:, 0]
        splits = tf.concat([at, [tf.size(first, tf.int64)]], 0)
        of_word = tf.gather(characters.piece, at)
        code_points = tf.where(characters.code_points == TOKEN, 0, characters.code_points)
        words = tf.strings.unicode_encode(tf.RaggedTensor.from_row_splits(code_points, splits, validate=False), "UTF-8")
        words = tf.where(tf.gather(is_token, of_word), tf.gather(strings, of_word), words)
        text_splits = tf.searchsorted(of_word, pieces.strings.row_splits, out_type=tf.int64)
        return _Words(words, text_splits, splits, characters.starts, characters.ends)

    def _marked(self, characters: Characters) -> tuple[Characters, tf.Tensor]:
        """The characters with a mark for each space and before each piece, and which of them begin a word."""
        first = begins(characters.piece)
        if self._at_spaces:
            space = is_space(characters.code_points)
            first |= tf.concat([tf.zeros_like(space[:1]), space[:-1]], 0)
            first, characters = tf.boolean_mask(first, ~space), select(characters, ~space)
        code_points = tf.where(characters.code_points == _SPACE, self._mark, characters.code_points)
        characters = characters._replace(code_points=code_points)
        bare = first & (code_points != self._mark) & (code_points != TOKEN)
        if self._prepends == "first":
            bare &= characters.starts == 0
        if self._prepends != "never":
            old_first = first
            characters, is_new, source = put_before(characters, bare, self._mark)
            first = tf.gather(old_first & ~bare, source) | is_new
        if self._splits:
            first |= characters.code_points == self._mark
        return characters, first

    def _encode_words(self, words: tf.Tensor) -> tuple[tf.RaggedTensor, tf.RaggedTensor, tf.RaggedTensor]:
        """Tokens of words, and the characters [first, last) of its word that each is, int64 [W, None]; -1 is all."""
        whole = self._words.lookup(words)
        # A word that needs no cutting is one token.
        cut = tf.where(whole < 0)[:, 0]
        characters = tf.strings.unicode_decode(tf.gather(words, cut), "UTF-8")
        word, ids, first, last = self._lattice.cut(characters)
        known = tf.where(whole >= 0)[:, 0]
        order = tf.argsort(tf.concat([tf.gather(cut, word), known], 0), stable=True)
        word, ids, first, last = (
            tf.gather(tf.concat(columns, 0), order)
            for columns in (
                (tf.gather(cut, word), known),
                (ids, tf.gather(whole, known)),
                (first, tf.zeros_like(known)),
                (last, tf.fill(tf.shape(known), tf.constant(-1, tf.int64))),
            )
        )
        rows = tf.RaggedTensor.from_value_rowids(ids, word, tf.size(words, tf.int64), validate=False)
        return rows, rows.with_values(first), rows.with_values(last)


class _Words(NamedTuple):
    """Words of texts.

    Shapes: B texts, W words in all of them, C characters in all of those.
        strings: [W] tf.string, special tokens marked by a leading `SPECIAL`.
        text_splits: [B + 1] int64, the words of each text.
        splits: [W + 1] int64, the characters of each word.
        starts, ends: [C] int32, the characters [start, end) of its text that each stands for.
    """

    strings: tf.Tensor
    text_splits: tf.Tensor
    splits: tf.Tensor
    starts: tf.Tensor
    ends: tf.Tensor


def _byte(token: str) -> int:
    """The byte that a token stands for, -1 if it stands for none."""
    return int(token[3:5], 16) if _BYTE.fullmatch(token) else -1


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _whole_words(backend: tokenizers.Tokenizer) -> dict[bytes, int]:
    """The words that the library's model makes one token of."""
    words = [word for word in backend.get_vocab(with_added_tokens=False) if word]
    encodings = tokenizers.Tokenizer(backend.model).encode_batch_fast(words)
    return {
        word.encode(): encoding.ids[0]
        for word, encoding in zip(words, encodings, strict=True)
        if len(encoding.ids) == 1
    }
