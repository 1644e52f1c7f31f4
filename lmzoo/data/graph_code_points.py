"""What BERT's normalizer and pre-tokenizer make of each code point, as tables for a graph.

The tables are asked of the `tokenizers` library, whose Unicode version is not that of Python or of TensorFlow.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tokenizers import normalizers, pre_tokenizers

LETTER, ISOLATED, SPACE, DROPPED = range(4)
ORDERS = 64  # more than there are combining classes

_SIZE = 0x110000
_PAGE_BITS = 8
_PAGE = 1 << _PAGE_BITS
_TEXT = np.r_[0:0xD800, 0xE000:_SIZE]  # surrogates are in no text
_STRANGER = 0x10000  # a letter that no normalizer makes of another or changes


class Expanded(NamedTuple):
    """What a normalizer makes of characters, before marks are put into canonical order and the dropped ones go.

    Shapes:
        source: [M] int64, the character that each result comes from, ascending.
        is_first: [M] bool, whether it is the first result of its character.
        code_points: [M] int32.
        kinds: [M] int32, one of `LETTER`, `ISOLATED` (a word of its own), `SPACE` and `DROPPED`.
        order: [M] int32, the rank of its combining class; 0 is a character that nothing is moved across.
    """

    source: tf.Tensor
    is_first: tf.Tensor
    code_points: tf.Tensor
    kinds: tf.Tensor
    order: tf.Tensor


class CodePoints(tf.Module):
    """A number for each code point, in pages of 256, of which equal ones are held once.

    Args:
        values: [0x110000], 0 for most.
    """

    def __init__(self, values: np.ndarray):
        super().__init__()
        values = np.concatenate([values, np.zeros(_PAGE, values.dtype)])  # for what is no code point
        self._values, page_of = _in_pages(values)
        self._page_of = page_of * _PAGE

    def __call__(self, code_points: tf.Tensor) -> tf.Tensor:
        """The numbers, int32 [N], of code points, int32 [N]; 0 for 0x110000."""
        page = tf.gather(self._page_of, tf.bitwise.right_shift(code_points, _PAGE_BITS))
        return tf.gather(self._values, page + tf.bitwise.bitwise_and(code_points, _PAGE - 1))

    @staticmethod
    @functools.cache
    def changeable() -> list[str]:
        """The code points that a normalizer may change; the others are ideographs, private, or not assigned."""
        return list(map(chr, np.r_[0:0xD800, 0xE000:0x20000, 0x2F800:0x2FA20, 0xE0000:0xE1000]))


class CodePointTable(tf.Module):
    """Maps each code point to what `BertNormalizer` and `BertPreTokenizer` make of it.

    The results of a code point, one to four, or none if it is taken out, are held in pages of 256 code points, and
    equal pages are held once, which is why results are stored as differences.

    Args:
        clean_text, handle_chinese_chars, strip_accents, lowercase: those of `BertNormalizer`.
    """

    def __init__(self, clean_text: bool, handle_chinese_chars: bool, strip_accents: bool, lowercase: bool):
        super().__init__()
        counts, results, kinds, order = _results(clean_text, handle_chinese_chars, strip_accents, lowercase)
        self.reorders = bool(order.any())
        self._most = results.shape[1]
        columns = np.concatenate(
            [counts[:, None], results - np.arange(_SIZE)[:, None] * (results > 0), kinds * ORDERS + order], axis=1
        )
        self._width = columns.shape[1]
        self._columns, self._page_of = _in_pages(columns)

    def expand(self, code_points: tf.Tensor, special: tf.Tensor) -> Expanded:
        """Gives the results of code points [N]; one, isolated, for those that stand for a special token."""
        page = tf.gather(self._page_of, code_points // _PAGE)
        entry = (page * _PAGE + code_points % _PAGE) * self._width
        counts = tf.where(special, 1, tf.gather(self._columns, entry))
        number = tf.ragged.range(counts)  # [N, results]
        source = row_ids(number)
        column = tf.gather(entry, source) + 1 + number.values
        facts = tf.gather(self._columns, column + self._most)
        special = tf.gather(special, source)
        return Expanded(
            source,
            number.values == 0,
            tf.gather(code_points, source) + tf.gather(self._columns, column),
            tf.where(special, ISOLATED, facts // ORDERS),
            tf.where(special, 0, facts % ORDERS),
        )


def _in_pages(values: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    """Values of code points, with equal pages of 256 held once, int32 [N], and which is the page of each 256, int32."""
    pages: dict[bytes, int] = {}
    rows = values.astype(np.int32).reshape(len(values) // _PAGE, -1)
    page_of = [pages.setdefault(row.tobytes(), len(pages)) for row in rows]
    return tf.constant(np.frombuffer(b"".join(pages), np.int32)), tf.constant(page_of, tf.int32)


def row_ids(ragged: tf.RaggedTensor) -> tf.Tensor:
    """The row of each value: what `value_rowids` gives, which takes memory for (rows x longest row) values."""
    ends = tf.cast(ragged.row_splits[1:], tf.int64)
    size = tf.shape(ragged.values, tf.int64)[0]
    return tf.cumsum(tf.math.unsorted_segment_sum(tf.ones_like(ends), ends, size + 1))[:-1]


def begins(owner: tf.Tensor) -> tf.Tensor:
    """Whether each item is the first of its owner; owners [N] are ascending."""
    return tf.concat([tf.ones_like(owner[:1], tf.bool), owner[1:] != owner[:-1]], 0)


@functools.cache
def _results(
    clean_text: bool, handle_chinese_chars: bool, strip_accents: bool, lowercase: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each code point the number of results [_SIZE], and the results, their kinds and orders [_SIZE, most]."""
    before = list(map(chr, _TEXT))
    own_words = np.zeros(len(before), bool)
    if clean_text:
        before = ask(_bert_normalizer(clean_text=True), before)
    if handle_chinese_chars:
        own_words = np.array([len(text) > 1 for text in ask(_bert_normalizer(handle_chinese_chars=True), before)])
    if strip_accents:
        before = _changed(normalizers.NFD(), before)
    after = _changed(normalizers.Lowercase(), before) if lowercase else before
    counts = np.fromiter(map(len, after), np.int64, len(after))
    owner = np.repeat(np.arange(len(after)), counts)
    column = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    code_points = code_points_of(after)
    kinds = np.where(own_words[owner], ISOLATED, _kinds()[code_points])
    order = np.zeros(len(owner), np.int64)
    if strip_accents:  # then lower case changes no character into two, and marks not at all
        marks = code_points_of(before)
        kinds[np.isin(marks, _accents())] = DROPPED
        order = combining_order()[marks]
    table = np.zeros((3, _SIZE, int(counts.max())), np.int64)
    table[:, _TEXT[owner], column] = code_points, kinds, order
    all_counts = np.zeros(_SIZE, np.int64)
    all_counts[_TEXT] = counts
    return all_counts, table[0], table[1], table[2]


def _bert_normalizer(**options: bool) -> normalizers.Normalizer:
    off = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
    return normalizers.BertNormalizer(**(off | options))


def ask(normalizer: normalizers.Normalizer, texts: list[str]) -> list[str]:
    """Normalizes short texts, none of which reaches across the stranger between them, all at once."""
    stranger = chr(_STRANGER)
    answer = normalizer.normalize_str(stranger.join("" if stranger in text else text for text in texts))
    return [text if stranger in text else changed for text, changed in zip(texts, answer.split(stranger), strict=True)]


def _changed(normalizer: normalizers.Normalizer, texts: list[str]) -> list[str]:
    """What a normalizer that leaves most alone makes of what has been made of each code point of `_TEXT`."""
    places = np.flatnonzero(np.isin(_TEXT, code_points_of(CodePoints.changeable()))).tolist()
    changed = texts.copy()
    for place, text in zip(places, ask(normalizer, [texts[place] for place in places]), strict=True):
        changed[place] = text
    return changed


def code_points_of(texts: list[str]) -> np.ndarray:
    """The code points of texts, one text behind the other."""
    return np.frombuffer("".join(texts).encode("utf-32-le"), np.int32)


@functools.cache
def _kinds() -> np.ndarray:
    """Of each code point whether it is a letter to the pre-tokenizer, a word of its own, or space [_SIZE]."""
    kinds = np.full(_SIZE, SPACE)
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    for start in range(0, len(_TEXT), 4096):
        part = _TEXT[start : start + 4096]
        # Each twice, so that a word of one character is one that never joins another.
        for word, (first, last) in split("".join(chr(code_point) * 2 for code_point in part)):
            kinds[part[first // 2 : -(-last // 2)]] = ISOLATED if len(word) == 1 else LETTER
    return kinds


@functools.cache
def _accents() -> np.ndarray:
    """The code points that strip_accents takes out."""
    characters = CodePoints.changeable()
    left = ask(_bert_normalizer(strip_accents=True), characters)
    return code_points_of([c for c, text in zip(characters, left, strict=True) if not text])


@functools.cache
def combining_order() -> np.ndarray:
    """A rank of the canonical combining class of each code point, 0 for class 0 [_SIZE]."""

    def swapped(pairs: list[str]) -> list[bool]:
        return [pair != text == pair[::-1] for text, pair in zip(ask(normalizers.NFD(), pairs), pairs, strict=True)]

    # A character of a class moves behind a tilde overlay (class 1), or in front of an acute accent (class 230).
    characters = CodePoints.changeable()
    behind, before = swapped([c + "\u0334" for c in characters]), swapped(["\u0301" + c for c in characters])
    marks = [c for c, *moves in zip(characters, behind, before, strict=True) if any(moves)]
    ranks = np.zeros(len(marks), np.int64)
    rest = np.ones(len(marks), bool)
    while rest.any():  # a class at a time
        probe = marks[int(np.argmax(rest))]
        higher = np.array(swapped([mark + probe for mark in marks]))
        lower = np.array(swapped([probe + mark for mark in marks]))
        ranks += higher
        rest &= higher | lower
    order = np.zeros(_SIZE, np.int64)
    order[code_points_of(marks)] = ranks + 1
    return order
