"""The in-graph twins of tokenizers whose symbols are bytes or characters: byte-level BPE, and one token a character."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import tensorflow as tf
import tokenizers

from lmzoo.data.graph_code_points import row_ids
from lmzoo.data.graph_merges import MergeTable
from lmzoo.data.graph_pairs import trims_offsets
from lmzoo.data.graph_tokenizers import (
    BOUNDARY,
    GraphTokenizer,
    Pieces,
    code_point_ranges,
    is_special,
    num_characters,
    require,
    string_table,
    unknown_id,
    unless_special,
)
from lmzoo.data.tokenizer_training import byte_characters

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# White space as Unicode's property has it; Python's `isspace` takes in four control characters more.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class ByteLevelGraphTokenizer(GraphTokenizer):
    """Byte-level BPE with GPT-2's pre-tokenizer.

    A text is cut into words by GPT-2's pattern; the ids of a word depend on nothing else, so each different word of a
    batch is encoded once: by looking it up if the vocabulary has it whole, by merging its bytes if not.

    Reference: Radford et al. 2019, section 2.2, and its published encoder. The pattern's look-ahead, which RE2 lacks,
    is a separate replacement that comes first.
    """

    def __init__(self, spec: dict[str, Any], whole_words: dict[bytes, int]):
        model, vocabulary = spec["model"], spec["model"]["vocab"]
        super().__init__(spec, token_to_bytes)
        self._add_prefix_space = spec["pre_tokenizer"]["add_prefix_space"]
        self._use_regex = spec["pre_tokenizer"].get("use_regex", True)
        self._words = string_table({**whole_words, **self._special_keys()})
        byte_ids = [vocabulary.get(character, -1) for character in byte_characters()]
        incomplete = -1 in byte_ids
        require(not (incomplete and model["byte_fallback"]), "its byte_fallback is True")
        self._byte_ids = tf.constant(byte_ids, tf.int64)
        self._incomplete = incomplete
        self._unknowns = _Unknowns(unknown_id(model), model["fuse_unk"])
        self._byte_widths = tf.constant([len(character.encode()) for character in byte_characters()], tf.int64)
        self._merges = MergeTable(model["merges"], vocabulary)
        self._trims = trims_offsets(spec["post_processor"])
        spaces = set(_WHITE_SPACE) | {byte_characters()[ord(" ")]}
        tokens = [_inside(token, spaces) for token in self._tokens]
        self._leading = tf.constant([before for before, _ in tokens], tf.int32)
        self._trailing = tf.constant([behind for _, behind in tokens], tf.int32)
        self._trace()

    def _encode_pieces(self, pieces: tf.RaggedTensor) -> tf.RaggedTensor:
        words = self._split_words(pieces)  # [B, words]
        unique, index = tf.unique(words.values, out_idx=tf.int64)
        ids = tf.gather(self._encode_words(unique).ids, index)  # [all words, None]
        return tf.RaggedTensor.from_row_splits(ids.values, tf.gather(ids.row_splits, words.row_splits), validate=False)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def encode_with_offsets(self, texts: tf.Tensor) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Token ids, ragged int32 [B, None], and their characters [start, end), ragged int32 [B, None, 2].

        A token of some bytes of a character has all of the character.
        """
        with tf.device("CPU:0"):
            texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
            pieces = self._split_special(texts)
            words, piece_of_word = self._split_pieces(pieces.strings.values)
            unique, index = tf.unique(words, out_idx=tf.int64)
            symbols = self._encode_words(unique)
            columns = (symbols.ids, *map(symbols.ids.with_values, (symbols.begins, symbols.ends)))
            ids, begins, ends = (tf.gather(column, index) for column in columns)  # [all words, None]
            starts, stops, byte_splits = self._places(pieces, words, piece_of_word)
            word = row_ids(ids)
            first = tf.gather(byte_splits, word)
            last = tf.where(ends.values < 0, tf.gather(byte_splits, word + 1), first + ends.values) - 1
            begin, end = tf.gather(starts, first + begins.values), tf.gather(stops, last)
            words_of_texts = tf.searchsorted(piece_of_word, pieces.strings.row_splits)
            splits = tf.gather(ids.row_splits, words_of_texts)
            ids = tf.RaggedTensor.from_row_splits(tf.cast(ids.values, tf.int32), splits, validate=False)
            # The white space that a special token took from beside itself counts as its own.
            behind = pieces.ends - pieces.starts - pieces.leads - num_characters(pieces.strings.values)
            behind = tf.where(is_special(pieces.strings.values), behind, 0)
            piece = tf.gather(piece_of_word, word)
            leading = tf.gather(self._leading, ids.values) + tf.gather(pieces.leads, piece)
            trailing = tf.gather(self._trailing, ids.values) + tf.gather(behind, piece)
            for add_prefix_space in self._trims:
                begin, end = _trimmed(ids, begin, end, leading, trailing, add_prefix_space)
            return ids, ids.with_values(tf.stack([begin, end], 1))

    def _split_words(self, pieces: tf.RaggedTensor) -> tf.RaggedTensor:
        """Pre-tokenization, [B, pieces] to [B, words]; empty words among them stand for nothing."""
        words, piece = self._split_pieces(pieces.values)
        splits = tf.searchsorted(piece, tf.cast(pieces.row_splits, tf.int64), out_type=tf.int64)
        return tf.RaggedTensor.from_row_splits(words, splits, validate=False)

    def _split_pieces(self, pieces: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The words of pieces [P], and the piece of each."""
        texts = tf.where(self._lacks_space(pieces), tf.strings.join([" ", pieces]), pieces)
        if not self._use_regex:
            return texts, tf.range(tf.size(texts, tf.int64))
        letters, numbers, spaces = (code_point_ranges()[name] for name in "LNS")
        # White space before a word leaves its last character to the word, or alone.
        words = tf.strings.regex_replace(texts, f"([{spaces}])([{spaces}][^{spaces}])", rb"\1" + BOUNDARY + rb"\2")
        pattern = f"{_CONTRACTIONS}| ?[{letters}]+| ?[{numbers}]+| ?[^{spaces}{letters}{numbers}]+|[{spaces}]+"
        words = tf.strings.regex_replace(words, pattern, rb"\0" + BOUNDARY)
        split = tf.strings.split(unless_special(texts, words), BOUNDARY)
        return split.values, row_ids(split)

    def _lacks_space(self, pieces: tf.Tensor) -> tf.Tensor:
        """Whether a space is put in front of pieces [P]."""
        if not self._add_prefix_space:
            return tf.zeros_like(pieces, tf.bool)
        return (pieces != "") & (tf.strings.substr(pieces, 0, 1) != " ") & ~is_special(pieces)

    def _places(
        self, pieces: Pieces, words: tf.Tensor, piece_of_word: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Where in its text the character [start, end) of each byte of words [W] is, [N] each, and the words' bytes."""
        is_token = is_special(words)
        # A special token is one byte on its way through the tables; "\0" stands in for it.
        bytes_ = tf.strings.unicode_decode(tf.where(is_token, "\0", words), "ISO-8859-1")
        word = row_ids(bytes_)
        piece = tf.gather(piece_of_word, word)
        number = tf.cumsum(tf.cast(bytes_.values & 0xC0 != 0x80, tf.int32))  # of the character, from 1 on
        first = tf.searchsorted(piece, piece)
        number -= tf.gather(number, first)  # in its piece, from 0 on
        # The space that was put in front counts as the first character.
        number = tf.maximum(number - tf.cast(tf.gather(self._lacks_space(pieces.strings.values), piece), tf.int32), 0)
        start = tf.gather(pieces.starts, piece)
        stop = tf.where(tf.gather(is_token, word), tf.gather(pieces.ends, piece), start + number + 1)
        return start + number, stop, bytes_.row_splits

    def _encode_words(self, words: tf.Tensor) -> _Symbols:
        """The tokens of words [W]."""
        whole = self._words.lookup(words)
        # A word that is a token already is one symbol from the start; "\0" stands in for its bytes.
        bytes_ = tf.strings.unicode_decode(tf.where(whole >= 0, "\0", words), "ISO-8859-1")
        owner = row_ids(bytes_)
        token = tf.gather(whole, owner)
        symbols = tf.where(token >= 0, token, tf.gather(self._byte_ids, bytes_.values))
        begins = tf.range(tf.size(symbols, tf.int64)) - tf.gather(bytes_.row_starts(), owner)
        ends = tf.where(token >= 0, tf.constant(-1, tf.int64), begins + 1)
        if self._incomplete:
            widths = tf.gather(self._byte_widths, bytes_.values)
            symbols, owner, begins, ends = self._unknowns.resolve(symbols, owner, begins, ends, widths)
        symbols, owner, left = self._merges.apply(symbols, owner)
        right = tf.concat([left[1:], tf.fill([tf.minimum(tf.size(left), 1)], tf.size(begins, tf.int64))], 0) - 1
        ids = tf.RaggedTensor.from_value_rowids(symbols, owner, bytes_.nrows(), validate=False)
        return _Symbols(ids, tf.gather(begins, left), tf.gather(ends, right))


def _trimmed(
    ids: tf.RaggedTensor,
    begin: tf.Tensor,
    end: tf.Tensor,
    leading: tf.Tensor,
    trailing: tf.Tensor,
    add_prefix_space: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Offsets without the white space at both ends of a token, as the library counts it: by the token."""
    if add_prefix_space:
        first = tf.equal(tf.range(tf.size(ids.values, tf.int64)), tf.gather(ids.row_starts(), row_ids(ids)))
        leading = tf.where((first | (begin == 0)) & (leading == 1), 0, leading)
    begin = tf.minimum(begin + leading, end)
    return begin, tf.where(end >= trailing, tf.maximum(end - trailing, begin), end)


class _Symbols(NamedTuple):
    """Tokens of words.

    Shapes: W words, T tokens of all of them.
        ids: int64 [W, None].
        begins, ends: int64 [T], the bytes [begin, end) of its word that a token is; an end of -1 is that of the word.
    """

    ids: tf.RaggedTensor
    begins: tf.Tensor
    ends: tf.Tensor


class CharGraphTokenizer(GraphTokenizer):
    """One token a character, that is, a Unicode code point."""

    def __init__(self, spec: dict[str, Any]):
        model, vocabulary = spec["model"], spec["model"]["vocab"]
        super().__init__(spec, str.encode)
        characters = sorted((ord(token), index) for token, index in vocabulary.items() if len(token) == 1)
        # One more row, for the code points after the last character.
        code_points, ids = zip(*characters, (-1, -1), strict=True)
        self._code_points = tf.constant(code_points, tf.int32)
        self._ids = tf.constant(ids, tf.int64)
        self._special_ids = string_table(self._special_keys())
        self._unknowns = _Unknowns(unknown_id(model), model["fuse_unk"])
        self._trace()

    def _encode_pieces(self, pieces: tf.RaggedTensor) -> tf.RaggedTensor:
        ids, owner, *_ = self._symbols(pieces.values)
        splits = tf.searchsorted(owner, pieces.row_splits)
        return tf.RaggedTensor.from_row_splits(ids, splits, validate=False)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def encode_with_offsets(self, texts: tf.Tensor) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Token ids, ragged int32 [B, None], and their characters [start, end), ragged int32 [B, None, 2]."""
        with tf.device("CPU:0"):
            texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
            pieces = self._split_special(texts)
            ids, owner, begins, ends = self._symbols(pieces.strings.values)
            starts = tf.gather(tf.cast(pieces.starts, tf.int64), owner)
            ends = tf.where(ends < 0, tf.gather(tf.cast(pieces.ends, tf.int64), owner), starts + ends)
            offsets = tf.cast(tf.stack([starts + begins, ends], 1), tf.int32)
            ids = tf.RaggedTensor.from_row_splits(
                tf.cast(ids, tf.int32), tf.searchsorted(owner, pieces.strings.row_splits), validate=False
            )
            return ids, ids.with_values(offsets)

    def _symbols(self, pieces: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Of each token of pieces [P]: its id, its piece, and the characters [begin, end) of the piece; -1 for all."""
        special = self._special_ids.lookup(pieces)
        characters = tf.strings.unicode_decode(tf.where(special >= 0, "\0", pieces), "UTF-8")
        owner = row_ids(characters)
        row = tf.searchsorted(self._code_points[:-1], characters.values)
        found = tf.gather(self._code_points, row) == characters.values
        ids = tf.where(found, tf.gather(self._ids, row), -1)
        token = tf.gather(special, owner)
        begins = tf.range(tf.size(ids, tf.int64)) - tf.gather(characters.row_starts(), owner)
        ends = tf.where(token >= 0, tf.constant(-1, tf.int64), begins + 1)
        widths = 1 + tf.reduce_sum(tf.cast(characters.values[:, None] >= [0x80, 0x800, 0x10000], tf.int64), 1)
        return self._unknowns.resolve(tf.where(token >= 0, token, ids), owner, begins, ends, widths)


class _Unknowns:
    """What becomes of symbols that are not in the vocabulary.

    Args:
        token: the id of the token that takes their place; without one, they are dropped.
        fuse: whether it takes the place of a whole run of them.
    """

    def __init__(self, token: int | None, fuse: bool):
        self._token, self._fuse = token, fuse

    def resolve(
        self, ids: tf.Tensor, owner: tf.Tensor, begins: tf.Tensor, ends: tf.Tensor, widths: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Puts the unknown token where an id is -1.

        Args:
            ids, owner: [N], symbols and the ascending numbers of their words.
            begins, ends: [N], what of its word a symbol is.
            widths: [N], the bytes that the library counts for a symbol.

        Returns:
            The first four arguments for the symbols that are left.
        """
        missing = ids < 0
        if self._token is None:
            begins, ends = _without(missing, owner, begins, ends, widths)
            return tuple(tf.boolean_mask(values, ~missing) for values in (ids, owner, begins, ends))
        ids = tf.where(missing, tf.constant(self._token, tf.int64), ids)
        if not self._fuse:
            return ids, owner, begins, ends
        again = missing[1:] & missing[:-1] & (owner[1:] == owner[:-1])
        first = tf.where(~tf.concat([tf.zeros_like(missing[:1]), again], 0))[:, 0]
        last = tf.where(~tf.concat([again, tf.zeros_like(missing[:1])], 0))[:, 0]
        return tf.gather(ids, first), tf.gather(owner, first), tf.gather(begins, first), tf.gather(ends, last)


def _without(
    missing: tf.Tensor, owner: tf.Tensor, begins: tf.Tensor, ends: tf.Tensor, widths: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Begins and ends of symbols as the library has them when others are dropped: as if they had not been there."""
    before = tf.cumsum(widths, exclusive=True)
    kept = tf.where(missing, tf.zeros_like(widths), widths)
    first = tf.searchsorted(owner, owner, out_type=tf.int64)
    kept_before = tf.cumsum(kept, exclusive=True)
    begin = tf.gather(before, first) + kept_before - tf.gather(kept_before, first)
    at = tf.searchsorted(before, begin, side="right", out_type=tf.int64) - 1
    last = tf.searchsorted(before, begin + tf.maximum(kept, 1) - 1, side="right", out_type=tf.int64) - 1
    whole = ends < 0
    return tf.where(whole, begins, tf.gather(begins, at)), tf.where(whole, ends, tf.gather(ends, last))


def _inside(token: str, spaces: set[str]) -> tuple[int, int]:
    """The spaces at the front and at the back of a token; all of them twice if it is nothing else."""
    text = "".join(" " if character in spaces else "x" for character in token)
    return len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))


def token_to_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; its own UTF-8 if it is not written in bytes."""
    values = _byte_values()
    if all(character in values for character in token):
        return bytes(values[character] for character in token)
    return token.encode()


@functools.cache
def _byte_values() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


def whole_words(backend: tokenizers.Tokenizer) -> dict[bytes, int]:
    """The words, as bytes, that the library's model makes one token of, so that they need no merging in the graph."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    values = _byte_values()
    words = [token for token in vocabulary if token and all(character in values for character in token)]
    encodings = tokenizers.Tokenizer(backend.model).encode_batch_fast(words)
    return {
        token_to_bytes(word): encoding.ids[0]
        for word, encoding in zip(words, encodings, strict=True)
        if len(encoding.ids) == 1
    }
