"""The in-graph twins of tokenizers: strings to ids and back with core TensorFlow operations only.

A twin gives the ids that the `tokenizers` library gives, on every input, and can be exported: a process that has
TensorFlow and neither lmzoo nor `tokenizers` runs it. There are twins for byte-level BPE with GPT-2's pre-tokenizer,
and for one token a character (`graph_byte_level`), for BERT's WordPiece (`graph_wordpiece`), and for Unigram
(`graph_unigram`).

Text that is not UTF-8 counts as `bytes.decode("utf-8", errors="replace")` would read it. That leaves the bytes 0xFF
and 0xFE, which no UTF-8 text holds, to mark boundaries and special tokens inside strings.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tokenizers
from tokenizers import pre_tokenizers

from lmzoo.data.graph_code_points import begins, row_ids
from lmzoo.data.graph_pairs import PairTemplate
from lmzoo.data.tokenizer_pairs import Encodings

BOUNDARY = b"\xff"
SPECIAL = b"\xfe"


def make_graph_tokenizer(backend: tokenizers.Tokenizer) -> GraphTokenizer:
    """The twin of a tokenizer of the `tokenizers` library.

    Raises:
        ValueError: no twin can be made; the message names the part that has none.
    """
    spec = json.loads(backend.to_str())
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"]
    for token in spec["added_tokens"]:
        require(not token["single_word"], f"its token {token['content']!r} has single_word=True")
    if model["type"] == "Unigram":
        from lmzoo.data.graph_unigram import UnigramGraphTokenizer

        with tf.init_scope(), tf.device("CPU:0"):
            return UnigramGraphTokenizer(backend, spec)
    if model["type"] == "WordPiece":
        from lmzoo.data.graph_wordpiece import WordPieceGraphTokenizer

        with tf.init_scope(), tf.device("CPU:0"):
            return WordPieceGraphTokenizer(backend, spec)
    from lmzoo.data.graph_byte_level import ByteLevelGraphTokenizer, CharGraphTokenizer, whole_words

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
        return ByteLevelGraphTokenizer(spec, whole_words(backend))


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
        self._post_processor = json.dumps(spec["post_processor"])
        vocabulary = spec["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = {index: token for token, index in vocabulary.items()}
        else:  # tokens in the order of their ids, with their scores
            tokens = dict(enumerate(token for token, _ in vocabulary))
        tokens.update((token["id"], token["content"]) for token in self._added)
        skipped = {token["content"] for token in self._added if token["special"]}
        # As the library writes them, those that are not in the vocabulary included.
        self._tokens = [tokens.get(index, "") for index in range(max(tokens, default=-1) + 1)]
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
            return tf.cast(self._encode_pieces(self._split_special(texts).strings), tf.int32)

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

    def encode_with_offsets(self, texts: tf.Tensor) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Token ids, ragged int32 [B, None], and their characters [start, end), ragged int32 [B, None, 2]."""
        raise NotImplementedError

    def encode_pairs(
        self, first: tf.Tensor, second: tf.Tensor | None = None, *, max_length: int | tf.Tensor | None = None
    ) -> Encodings:
        """What an encoder reads of texts or of pairs of texts, tf.string [B]; see `Tokenizer.encode_pairs`.

        Returns:
            Ragged int32 tensors: ids [B, None], token types [B, None] and offsets [B, None, 2].
        """
        with tf.device("CPU:0"):
            one = self.encode_with_offsets(first)
            two = None if second is None else self.encode_with_offsets(second)
            return PairTemplate(json.loads(self._post_processor)).join(one, two, max_length)

    def _encode_pieces(self, pieces: tf.RaggedTensor) -> tf.RaggedTensor:
        """Ids [B, None] of texts cut at their special tokens [B, None], each of which starts with `SPECIAL`."""
        raise NotImplementedError

    def _trace(self) -> None:
        """Traces `decode` for both kinds of input, since only what has been traced is saved."""
        self.decode.get_concrete_function(tf.TensorSpec([None, None], tf.int32))
        self.decode.get_concrete_function(tf.RaggedTensorSpec([None, None], tf.int32))

    def _special_keys(self) -> dict[bytes, int]:
        return {SPECIAL + token["content"].encode(): token["id"] for token in self._added}

    def _split_special(self, texts: tf.Tensor) -> Pieces:
        """Cuts texts [B] at their special tokens, each of which is marked by a leading `SPECIAL`.

        The leftmost token wins, and the longest of those that start there. Tokens to be found in normalized text come
        second, in what the others leave. A token with `lstrip` or `rstrip` takes the white space beside it along.
        """
        strings = tf.RaggedTensor.from_row_lengths(texts, tf.ones_like(texts, tf.int64), validate=False)
        none = tf.zeros_like(texts, tf.int32)
        pieces = Pieces(strings, none, num_characters(texts), none)
        for normalized in (False, True):
            tokens = [token for token in self._added if token["normalized"] is normalized]
            if not tokens:
                continue
            contents = sorted((token["content"] for token in tokens), key=len, reverse=True)
            pattern = "|".join(_literal(content) for content in contents)
            strings = pieces.strings
            marked = tf.strings.regex_replace(strings.values, pattern, BOUNDARY + SPECIAL + rb"\0" + BOUNDARY)
            cut = tf.strings.split(unless_special(strings.values, marked), BOUNDARY)
            widths = num_characters(cut.values)
            ends = tf.cumsum(widths)
            before = tf.gather(tf.concat([[0], ends], 0), cut.row_starts())  # characters of earlier pieces
            piece = row_ids(cut)
            ends += tf.gather(pieces.starts - before, piece)
            # A token of the first pass may have more characters than its own.
            whole = tf.gather(is_special(strings.values), piece)
            starts = tf.where(whole, tf.gather(pieces.starts, piece), ends - widths)
            ends = tf.where(whole, tf.gather(pieces.ends, piece), ends)
            leads = tf.where(whole, tf.gather(pieces.leads, piece), 0)
            strings = tf.RaggedTensor.from_row_splits(
                cut.values, tf.gather(cut.row_splits, strings.row_splits), validate=False
            )
            pieces = _strip_beside(Pieces(strings, starts, ends, leads), tokens)
        return pieces


class PieceGraphTokenizer(GraphTokenizer):
    """A tokenizer whose tokens are written otherwise at the beginning of a text than behind others.

    Args:
        spec: the `tokenizer.json`.
        to_bytes: what a token is written as, at the beginning of a text or not.
    """

    def __init__(self, spec: dict[str, Any], to_bytes: Callable[[str, bool], bytes]):
        super().__init__(spec, lambda token: to_bytes(token, True))
        skipped = {token["content"] for token in self._added if token["special"]}
        self._later_bytes = tf.constant([to_bytes(token, False) for token in self._tokens])
        self._kept = tf.constant([token != "" and token not in skipped for token in self._tokens])

    @tf.function(autograph=False)
    def decode(self, ids: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
        """Texts, tf.string [B], of the token ids, int32 [B, T] or ragged [B, None]."""
        with tf.device("CPU:0"):
            values, row, num_rows = self._kept_ids(ids)
            pieces = tf.where(begins(row), tf.gather(self._token_bytes, values), tf.gather(self._later_bytes, values))
            return tf.strings.unsorted_segment_join(pieces, row, num_rows)

    def _kept_ids(self, ids: tf.Tensor | tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The ids that are decoded, the row of each, and the number of rows."""
        if not isinstance(ids, tf.RaggedTensor):
            ids = tf.RaggedTensor.from_tensor(ids)
        inside = (ids.values >= 0) & (ids.values < tf.size(self._kept, ids.dtype))
        kept = inside & tf.gather(self._kept, tf.where(inside, ids.values, 0))
        return tf.boolean_mask(ids.values, kept), tf.boolean_mask(row_ids(ids), kept), ids.nrows()


def decoded(backend: tokenizers.Tokenizer, token: str, first: bool) -> bytes:
    """What the library writes for a token, at the beginning of a text or behind another one."""
    return backend.decoder.decode([token] if first else ["x", token])[0 if first else 1 :].encode()


class Pieces(NamedTuple):
    """Texts cut at their special tokens.

    Shapes: B texts, P pieces of all of them.
        strings: tf.string [B, None], each special token marked by a leading `SPECIAL`.
        starts, ends: [P] int32, the characters [start, end) of its text that a piece is.
        leads: [P] int32, how many of them are white space that a special token took from before itself.
    """

    strings: tf.RaggedTensor
    starts: tf.Tensor
    ends: tf.Tensor
    leads: tf.Tensor


def num_characters(texts: tf.Tensor) -> tf.Tensor:
    """The characters of each text; the mark of a special token does not count."""
    return tf.strings.length(texts, "UTF8_CHAR") - tf.cast(is_special(texts), tf.int32)


def _strip_beside(pieces: Pieces, tokens: list[dict[str, Any]]) -> Pieces:
    """Takes white space from the texts beside special tokens that ask for it. Rows begin and end with a text."""
    texts, starts, ends, leads = pieces.strings.values, *pieces[1:]
    spaces = code_point_ranges()["S"] if any(token["lstrip"] or token["rstrip"] for token in tokens) else ""
    for side, pattern in (("rstrip", f"\\A[{spaces}]+"), ("lstrip", f"[{spaces}]+\\z")):
        keys = [SPECIAL + token["content"].encode() for token in tokens if token[side]]
        if not keys:
            continue
        asks = tf.reduce_any(texts[:, None] == tf.constant(keys), 1)
        step = -1 if side == "lstrip" else 1
        beside = tf.roll(asks, step, 0)
        stripped = tf.where(beside, tf.strings.regex_replace(texts, pattern, "", replace_global=False), texts)
        lost = num_characters(texts) - num_characters(stripped)
        gained = tf.roll(lost, -step, 0) * tf.cast(asks, tf.int32)
        if side == "lstrip":
            starts, ends, leads = starts - gained, ends - lost, leads + gained
        else:
            starts, ends = starts + lost, ends + gained
        texts = stripped
    return Pieces(pieces.strings.with_values(texts), starts, ends, leads)


def is_special(pieces: tf.Tensor) -> tf.Tensor:
    """Whether a piece of text is a special token."""
    return tf.strings.substr(pieces, 0, 1) == SPECIAL


def unless_special(pieces: tf.Tensor, changed: tf.Tensor) -> tf.Tensor:
    """What became of pieces of text, but for the special tokens among them, which stay."""
    return tf.where(is_special(pieces), pieces, changed)


@functools.cache
def code_point_ranges() -> dict[str, str]:
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


def _literal(text: str) -> str:
    """A pattern that matches just this text."""
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):X}}}" for character in text)


def string_table(entries: dict[bytes, int]) -> tf.lookup.StaticHashTable:
    """A table from strings to int64, -1 for those it lacks."""
    keys = tf.constant(list(entries), tf.string, [len(entries)])
    values = tf.constant(list(entries.values()), tf.int64, [len(entries)])
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, values), default_value=-1)


def unknown_id(model: dict[str, Any]) -> int | None:
    """The id of the token for what is unknown, None if there is none."""
    return model["vocab"].get(model["unk_token"])


def require(condition: bool, what: str) -> None:
    """Raises a ValueError that says what has no twin, unless the condition holds."""
    if not condition:
        raise ValueError(
            f"This tokenizer has no in-graph twin: {what}. There are twins for byte-level BPE with GPT-2's "
            'pre-tokenizer (kind "bpe"), for one token a character (kind "char"), for WordPiece with BERT\'s '
            'normalizer and pre-tokenizer (kind "wordpiece"), and for Unigram behind Metaspace (kind "unigram").'
        )
