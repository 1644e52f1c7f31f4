"""The in-graph twins of tokenizers: strings to ids and back with core TensorFlow operations only.

A twin gives the ids that the `tokenizers` library gives, on every input, and can be exported: a process that has
TensorFlow and neither lmzoo nor `tokenizers` runs it. There are twins for byte-level BPE with GPT-2's pre-tokenizer,
for one token a character, and, in `graph_wordpiece`, for BERT's WordPiece.

Text that is not UTF-8 counts as `bytes.decode("utf-8", errors="replace")` would read it. That leaves the bytes 0xFF
and 0xFE, which no UTF-8 text holds, to mark boundaries and special tokens inside strings.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tokenizers
from tokenizers import pre_tokenizers

from lmzoo.data.graph_code_points import row_ids
from lmzoo.data.graph_merges import MergeTable

_BOUNDARY = b"\xff"
SPECIAL = b"\xfe"
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"


def make_graph_tokenizer(backend: tokenizers.Tokenizer) -> GraphTokenizer:
    """The twin of a tokenizer of the `tokenizers` library.

    Raises:
        ValueError: no twin can be made; the message names the part that has none.
    """
    spec = json.loads(backend.to_str())
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"]
    for token in spec["added_tokens"]:
        require(not token["single_word"], f"its token {token['content']!r} has single_word=True")
    if model["type"] == "WordPiece":
        from lmzoo.data.graph_wordpiece import WordPieceGraphTokenizer

        with tf.init_scope(), tf.device("CPU:0"):
            return WordPieceGraphTokenizer(backend, spec)
    require(model["type"] == "BPE", f"its model is {model['type']}")
    require(spec["normalizer"] is None, f"it has a normalizer ({(spec['normalizer'] or {}).get('type')})")
    require(not model["dropout"], f"its dropout is {model['dropout']}")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        require(not model[affix], f"its {affix} is {model[affix]!r}")
    decoder = (spec["decoder"] or {}).get("type")
    with tf.init_scope(), tf.device("CPU:0"):
        if pre_tokenizer is None and not model["merges"]:
            require(decoder == "Fuse", f"its decoder is {decoder}")
            for option in ("byte_fallback", "ignore_merges"):
                require(not model[option], f"its {option} is True")
            return CharGraphTokenizer(spec)
        kind = (pre_tokenizer or {}).get("type")
        require(kind == "ByteLevel", f"its pre-tokenizer is {kind}")
        require(decoder == "ByteLevel", f"its decoder is {decoder}")
        return ByteLevelGraphTokenizer(spec, _whole_words(backend))


class GraphTokenizer(tf.Module):
    """Strings to token ids and back, as graphs that `tf.saved_model.save` takes along.

    `encode(texts)`: tf.string [B] to a ragged int32 [B, None]; no special tokens are added around a text, but the
    literal of one inside it becomes that token.

    `decode(ids)`: int32 [B, T], or ragged [B, None], to tf.string [B], without special tokens; ids outside the
    vocabulary, which a model with a padded embedding can emit, give nothing. Bytes that are not UTF-8, as when a
    character is cut in two, become U+FFFD.

    Shapes: B texts, T tokens.
    """

    def __init__(self, spec: dict[str, Any], to_bytes: Callable[[str], bytes]):
        super().__init__()
        self._added = spec["added_tokens"]
        tokens = {index: token for token, index in spec["model"]["vocab"].items()}
        tokens.update((token["id"], token["content"]) for token in self._added)
        skipped = {token["content"] for token in self._added if token["special"]}
        # One more row, empty, for the ids that are not in the vocabulary.
        table = [b""] * (max(tokens, default=-1) + 2)
        for index, token in tokens.items():
            table[index] = b"" if token in skipped else to_bytes(token)
        self._token_bytes = tf.constant(table)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Token ids, ragged int32 [B, None], of the texts, tf.string [B]."""
        with tf.device("CPU:0"):
            texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
            return tf.cast(self._encode_pieces(self._split_special(texts)), tf.int32)

    @tf.function(autograph=False)
    def decode(self, ids: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
        """Texts, tf.string [B], of the token ids, int32 [B, T] or ragged [B, None]."""
        with tf.device("CPU:0"):
            if not isinstance(ids, tf.RaggedTensor):
                ids = tf.RaggedTensor.from_tensor(ids)
            outside = tf.size(self._token_bytes) - 1
            inside = (ids.values >= 0) & (ids.values < tf.cast(outside, ids.dtype))
            pieces = tf.gather(self._token_bytes, tf.where(inside, ids.values, tf.cast(outside, ids.dtype)))
            texts = tf.strings.unsorted_segment_join(pieces, row_ids(ids), ids.nrows())
            return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")

    def _encode_pieces(self, pieces: tf.RaggedTensor) -> tf.RaggedTensor:
        """Ids [B, None] of texts cut at their special tokens [B, None], each of which starts with `SPECIAL`."""
        raise NotImplementedError

    def _trace(self) -> None:
        """Traces `decode` for both kinds of input, since only what has been traced is saved."""
        self.decode.get_concrete_function(tf.TensorSpec([None, None], tf.int32))
        self.decode.get_concrete_function(tf.RaggedTensorSpec([None, None], tf.int32))

    def _special_keys(self) -> dict[bytes, int]:
        return {SPECIAL + token["content"].encode(): token["id"] for token in self._added}

    def _split_special(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Cuts texts [B] at their special tokens: [B, None], each special token marked by a leading `SPECIAL`.

        The leftmost token wins, and the longest of those that start there. Tokens to be found in normalized text come
        second, in what the others leave. A token with `lstrip` or `rstrip` takes the white space beside it along.
        """
        pieces = tf.RaggedTensor.from_row_lengths(texts, tf.ones_like(texts, tf.int64))
        for normalized in (False, True):
            tokens = [token for token in self._added if token["normalized"] is normalized]
            if not tokens:
                continue
            contents = sorted((token["content"] for token in tokens), key=len, reverse=True)
            pattern = "|".join(_literal(content) for content in contents)
            marked = tf.strings.regex_replace(pieces.values, pattern, _BOUNDARY + SPECIAL + rb"\0" + _BOUNDARY)
            cut = tf.strings.split(_unless_special(pieces.values, marked), _BOUNDARY)
            values = _strip_beside(cut.values, tokens)
            row_splits = tf.gather(cut.row_splits, pieces.row_splits)
            pieces = tf.RaggedTensor.from_row_splits(values, row_splits, validate=False)
        return pieces


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
        byte_ids = [vocabulary.get(character, -1) for character in _byte_characters()]
        incomplete = -1 in byte_ids
        require(not (incomplete and model["byte_fallback"]), "its byte_fallback is True")
        self._byte_ids = tf.constant(byte_ids, tf.int64)
        self._unknown = _unknown_id(model) if incomplete else None
        self._fuse_unknown = model["fuse_unk"]
        self._incomplete = incomplete
        self._merges = MergeTable(model["merges"], vocabulary)
        self._trace()

    def _encode_pieces(self, pieces: tf.RaggedTensor) -> tf.RaggedTensor:
        words = self._split_words(pieces)  # [B, words]
        unique, index = tf.unique(words.values, out_idx=tf.int64)
        ids = tf.gather(self._encode_words(unique), index)  # [all words, None]
        return tf.RaggedTensor.from_row_splits(ids.values, tf.gather(ids.row_splits, words.row_splits), validate=False)

    def _split_words(self, pieces: tf.RaggedTensor) -> tf.RaggedTensor:
        """Pre-tokenization, [B, pieces] to [B, words]; empty words among them stand for nothing."""
        texts = pieces.values
        if self._add_prefix_space:
            bare = (texts != "") & (tf.strings.substr(texts, 0, 1) != " ")
            texts = tf.where(bare, tf.strings.join([" ", texts]), texts)
            texts = _unless_special(pieces.values, texts)
        if not self._use_regex:
            return pieces.with_values(texts)
        letters, numbers, spaces = (_code_point_ranges()[name] for name in "LNS")
        # White space before a word leaves its last character to the word, or alone.
        words = tf.strings.regex_replace(texts, f"([{spaces}])([{spaces}][^{spaces}])", rb"\1" + _BOUNDARY + rb"\2")
        pattern = f"{_CONTRACTIONS}| ?[{letters}]+| ?[{numbers}]+| ?[^{spaces}{letters}{numbers}]+|[{spaces}]+"
        words = tf.strings.regex_replace(words, pattern, rb"\0" + _BOUNDARY)
        words = tf.strings.split(_unless_special(texts, words), _BOUNDARY)
        row_splits = tf.gather(words.row_splits, pieces.row_splits)
        return tf.RaggedTensor.from_row_splits(words.values, row_splits, validate=False)

    def _encode_words(self, words: tf.Tensor) -> tf.RaggedTensor:
        """Token ids, ragged int64 [W, None], of words [W]."""
        whole = self._words.lookup(words)
        # A word that is a token already is one symbol from the start; "\0" stands in for its bytes.
        bytes_ = tf.strings.unicode_decode(tf.where(whole >= 0, "\0", words), "ISO-8859-1")
        owner = row_ids(bytes_)
        token = tf.gather(whole, owner)
        symbols = tf.where(token >= 0, token, tf.gather(self._byte_ids, bytes_.values))
        if self._incomplete:
            symbols, owner = _resolve_unknown(symbols, owner, self._unknown, self._fuse_unknown)
        symbols, owner = self._merges.apply(symbols, owner)
        return tf.RaggedTensor.from_value_rowids(symbols, owner, bytes_.nrows(), validate=False)


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
        self._unknown = _unknown_id(model)
        self._fuse_unknown = model["fuse_unk"]
        self._trace()

    def _encode_pieces(self, pieces: tf.RaggedTensor) -> tf.RaggedTensor:
        special = self._special_ids.lookup(pieces.values)
        characters = tf.strings.unicode_decode(tf.where(special >= 0, "\0", pieces.values), "UTF-8")
        owner = row_ids(characters)
        row = tf.searchsorted(self._code_points[:-1], characters.values)
        found = tf.gather(self._code_points, row) == characters.values
        ids = tf.where(found, tf.gather(self._ids, row), -1)
        token = tf.gather(special, owner)
        ids, owner = _resolve_unknown(tf.where(token >= 0, token, ids), owner, self._unknown, self._fuse_unknown)
        ids = tf.RaggedTensor.from_value_rowids(ids, owner, characters.nrows(), validate=False)
        return tf.RaggedTensor.from_row_splits(ids.values, tf.gather(ids.row_splits, pieces.row_splits), validate=False)


def token_to_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; its own UTF-8 if it is not written in bytes."""
    values = _byte_values()
    if all(character in values for character in token):
        return bytes(values[character] for character in token)
    return token.encode()


@functools.cache
def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself if it is printable and not a space, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


@functools.cache
def _byte_values() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_byte_characters())}


def _whole_words(backend: tokenizers.Tokenizer) -> dict[bytes, int]:
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


@functools.cache
def _code_point_ranges() -> dict[str, str]:
    """The letters "L", the numbers "N" and the white space "S", as ranges inside an RE2 bracket.

    They are asked of the library, whose Unicode tables are not those of RE2 or of Python.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str
    probes = {"L": "a", "N": "1", "O": "!"}

    def kind(character: str) -> str:
        return next((name for name, probe in probes.items() if len(split(probe + character)) == 1), "S")

    kinds = np.full(0x110000, "O")  # surrogates, which no text holds, stay as they are
    for code_point in range(0x80):
        kinds[code_point] = kind(chr(code_point))
    # Outside ASCII nothing joins characters of different kinds, so every word of one long text is of one kind.
    rest = np.r_[0x80:0xD800, 0xE000:0x110000]
    text = "".join(map(chr, rest))
    for _, (start, end) in split(text):
        kinds[rest[start:end]] = kind(text[start])
    ranges = {}
    for name in "LNS":
        edges = np.flatnonzero(np.diff(np.concatenate([[False], kinds == name, [False]]).astype(np.int8)))
        bounds = zip(edges[::2], edges[1::2] - 1, strict=True)
        ranges[name] = "".join(f"\\x{{{first:X}}}-\\x{{{last:X}}}" for first, last in bounds)
    return ranges


def _resolve_unknown(ids: tf.Tensor, owner: tf.Tensor, unknown: int | None, fuse: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Puts the unknown token where an id is -1, once for a run of them if `fuse`; without one, drops them."""
    missing = ids < 0
    if unknown is None:
        keep = ~missing
    elif fuse:
        again = missing[1:] & missing[:-1] & (owner[1:] == owner[:-1])
        keep = ~tf.concat([tf.zeros_like(missing[:1]), again], 0)
    else:
        return tf.where(missing, tf.constant(unknown, tf.int64), ids), owner
    ids = tf.where(missing, tf.constant(-1 if unknown is None else unknown, tf.int64), ids)
    return tf.boolean_mask(ids, keep), tf.boolean_mask(owner, keep)


def _strip_beside(texts: tf.Tensor, tokens: list[dict[str, Any]]) -> tf.Tensor:
    """Takes white space from the texts beside special tokens that ask for it. Rows begin and end with a text."""
    spaces = _code_point_ranges()["S"] if any(token["lstrip"] or token["rstrip"] for token in tokens) else ""
    for side, pattern in (("lstrip", f"[{spaces}]+\\z"), ("rstrip", f"\\A[{spaces}]+")):
        keys = [SPECIAL + token["content"].encode() for token in tokens if token[side]]
        if not keys:
            continue
        asks = tf.reduce_any(texts[:, None] == tf.constant(keys), 1)
        beside = tf.roll(asks, -1 if side == "lstrip" else 1, 0)
        texts = tf.where(beside, tf.strings.regex_replace(texts, pattern, "", replace_global=False), texts)
    return texts


def _unless_special(pieces: tf.Tensor, changed: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.strings.substr(pieces, 0, 1) == SPECIAL, pieces, changed)


def _literal(text: str) -> str:
    """A pattern that matches just this text."""
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):X}}}" for character in text)


def string_table(entries: dict[bytes, int]) -> tf.lookup.StaticHashTable:
    """A table from strings to int64, -1 for those it lacks."""
    keys = tf.constant(list(entries), tf.string, [len(entries)])
    values = tf.constant(list(entries.values()), tf.int64, [len(entries)])
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), default_value=-1)


def _unknown_id(model: dict[str, Any]) -> int | None:
    return model["vocab"].get(model["unk_token"])


def require(condition: bool, what: str) -> None:
    """Raises a ValueError that says what has no twin, unless the condition holds."""
    if not condition:
        raise ValueError(
            f"This tokenizer has no in-graph twin: {what}. There are twins for byte-level BPE with GPT-2's "
            'pre-tokenizer (kind "bpe"), for one token a character (kind "char"), and for WordPiece with BERT\'s '
            'normalizer and pre-tokenizer (kind "wordpiece").'
        )
