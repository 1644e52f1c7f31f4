"""SentencePiece's precompiled normalizer in a graph, as the `tokenizers` library applies it.

The library goes by grapheme clusters: one of less than six bytes becomes what the shortest entry says that is a prefix
of it, the rest of the cluster is lost; of other clusters each character is looked up alone. So where clusters end must
be known exactly, and the library is asked for it with a map of a kind that shows it.
"""

from __future__ import annotations

import base64
import functools
import json

import numpy as np
import tensorflow as tf
from tokenizers import normalizers

from lmzoo.data.graph_code_points import CodePoints, begins
from lmzoo.data.graph_normalizers import TOKEN, Characters, Results, transformed, when

_SHORT = 5  # bytes of a cluster that is looked up as a whole
_BITS = 21  # of a code point
_LEAF, _LABEL, _VALUE = 1 << 8, (1 << 31) | 0xFF, (1 << 31) - 1  # of a unit of the double array
# Properties of code points, as bits.
_JOINS, _PREPEND, _CONTROL, _CR, _LF, _EXTEND, _ZWJ, _PICTURE = (1 << bit for bit in range(8))
_CONSONANT, _LINKER, _LINKED, *_AFTER = (1 << bit for bit in range(8, 14))
_HANGUL_SHIFT = 14  # which of `_AFTER` may follow, as a number from 1 on
_EXT, _ZWJ_TEXT, _KA, _VIRAMA = "\u0301", "\u200d", "\u0915", "\u094d"


class Precompiled(tf.Module):
    """The normalizer of a precompiled map.

    Args:
        charsmap: as a `tokenizer.json` has it, in base64.
    """

    def __init__(self, charsmap: str):
        super().__init__()
        entries = read_charsmap(base64.b64decode(charsmap))
        self._results = Results.of(entries)
        numbers = {key: number for number, key in enumerate(entries)}
        self._longer = [
            (length, *_sorted_keys({key: number for key, number in numbers.items() if len(key) == length}))
            for length in (2, 3)
        ]
        self._kinds = CodePoints(_properties())

    def __call__(self, characters: Characters) -> Characters:
        """What becomes of characters."""
        which = self._results.of_characters(characters.code_points)
        kinds = self._kinds(characters.code_points)
        joins = _joins(kinds, characters)
        busy = tf.reduce_any(which >= 0) | tf.reduce_any(joins)
        return when(busy, lambda: self._normalize(characters, which, joins), characters)

    def _normalize(self, characters: Characters, which: tf.Tensor, joins: tf.Tensor) -> Characters:
        code_points = characters.code_points
        size = tf.size(code_points)
        cluster = tf.cumsum(tf.cast(~joins, tf.int32)) - 1
        widths = 1 + tf.reduce_sum(tf.cast(code_points[:, None] >= [0x80, 0x800, 0x10000], tf.int32), 1)
        num_bytes = tf.gather(tf.math.segment_sum(widths, cluster), cluster)
        count = tf.gather(tf.math.segment_sum(tf.ones_like(cluster), cluster), cluster)
        short = ~joins & (count > 1) & (num_bytes <= _SHORT)
        at = tf.where(short)[:, 0]
        found = tf.gather(which, at)
        key = tf.cast(tf.gather(code_points, at), tf.int64)
        for length, keys, numbers in self._longer:
            then = tf.gather(code_points, tf.minimum(tf.cast(at, tf.int32) + length - 1, size - 1))
            key = key * (1 << _BITS) + tf.cast(then, tf.int64)
            row = tf.minimum(tf.searchsorted(keys, key), tf.size(keys) - 1)
            fits = (found < 0) & (tf.gather(count, at) >= length) & (tf.gather(keys, row) == key)
            found = tf.where(fits, tf.gather(numbers, row), found)
        replaced = tf.boolean_mask(at, found >= 0)[:, None]
        which = tf.tensor_scatter_nd_update(which, replaced, tf.boolean_mask(found, found >= 0))
        is_replaced = tf.tensor_scatter_nd_update(tf.zeros_like(joins), replaced, tf.ones_like(replaced[:, 0], tf.bool))
        # What is looked up, each with the number of characters whose place it takes.
        lost = joins & tf.gather(tf.math.segment_max(tf.cast(is_replaced, tf.int32), cluster) > 0, cluster)
        unit = tf.where(~lost)[:, 0]
        old = tf.gather(tf.where(is_replaced, count, 1), unit)
        units = Characters(*(tf.gather(values, unit) for values in characters))
        results, source, number = self._results.expand(units, tf.gather(which, unit))
        new = tf.math.unsorted_segment_sum(tf.ones_like(number), source, tf.size(unit))
        change = tf.cast(number >= tf.gather(old, source), tf.int64)
        # A text that is shorter than what it is for takes the rest along with the last character of its piece so far.
        missing = tf.maximum(old - new, 0)
        taker = tf.cumsum(new) - 1
        piece = tf.gather(units.piece, source)
        valid = (missing > 0) & (taker >= 0)
        taker, fewer, of_piece = (tf.boolean_mask(values, valid) for values in (taker, missing, units.piece))
        same = tf.gather(piece, taker) == of_piece
        taker, fewer = tf.boolean_mask(taker, same), tf.boolean_mask(fewer, same)
        change = tf.tensor_scatter_nd_sub(change, taker[:, None], tf.cast(fewer, tf.int64))
        return transformed(characters, results, piece, change)


def read_charsmap(charsmap: bytes) -> dict[str, str]:
    """The entries of a precompiled map that the library can come to.

    The map is a double array of units of four bytes, behind its size, and then the texts. Entries that are too long for
    a short cluster, or that have a shorter one before them, are passed over.

    Reference: SentencePiece's builder of them; Yata et al. 2007 (Darts-clone).

    Raises:
        ValueError: the map is cut off, or an entry is not UTF-8.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 + size or size % 4 or not size:
        raise ValueError(f"The precompiled map has {len(charsmap)} bytes, and its array alone {size}: it is cut off.")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4)
    texts = charsmap[4 + size :]
    entries: dict[str, str] = {}
    nodes = [(b"", _offset(units[0]))]
    labels = np.arange(1, 256)
    while nodes:
        key, base = nodes.pop()
        children = base ^ labels
        here = children < len(units)
        here[here] = units[children[here]] & _LABEL == labels[here]
        for label in labels[here].tolist():
            unit = int(units[base ^ label])
            child, then = key + bytes([label]), base ^ label ^ _offset(unit)
            if unit & _LEAF:
                first = int(units[then]) & _VALUE
                entries[child.decode()] = texts[first : texts.index(b"\0", first)].decode()
            elif len(child) < _SHORT:
                nodes.append((child, then))
    return entries


def _offset(unit: int) -> int:
    unit = int(unit)
    return (unit >> 10) << ((unit & 512) >> 6)


def _sorted_keys(numbers: dict[str, int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Runs of characters as ascending numbers, one too small for any at least, and what they are keys of."""
    keys = {-1: -1}
    for text, number in numbers.items():
        key = 0
        for character in text:
            key = key << _BITS | ord(character)
        keys[key] = number
    order = sorted(keys)
    return tf.constant(order, tf.int64), tf.constant([keys[key] for key in order], tf.int32)


def _joins(kinds: tf.Tensor, characters: Characters) -> tf.Tensor:
    """Whether each character is in one grapheme cluster with the one before it.

    Pairs of regional indicators, which have eight bytes, count as two clusters.

    Reference: Unicode Standard Annex 29, section 3.1.1.
    """
    first = begins(characters.piece)
    inside = ~first & (characters.code_points != TOKEN)
    before = tf.roll(kinds, 1, 0)

    def has(values: tf.Tensor, bit: int) -> tf.Tensor:
        return values & bit != 0

    joins = (has(kinds, _JOINS) & ~has(before, _CONTROL)) | (has(before, _PREPEND) & ~has(kinds, _CONTROL))
    joins |= has(before, _CR) & has(kinds, _LF)
    follow = tf.bitwise.right_shift(before, _HANGUL_SHIFT)
    for number, bit in enumerate(_AFTER, 1):
        joins |= (follow == number) & has(kinds, bit)
    if_picture = has(kinds, _PICTURE) & has(before, _ZWJ)
    if_consonant = has(kinds, _CONSONANT)

    def far() -> tf.Tensor:
        anchor = _last_without(has(kinds, _EXTEND), first)
        # The character before the joiner, looked at from the joiner, which stands one place before. There is none if
        # the joiner begins a piece.
        picture = has(tf.gather(kinds, tf.roll(_before(anchor), 1, 0)), _PICTURE) & ~_before(first)
        base = _before(_last_without(has(kinds, _LINKED), first))
        linkers = tf.cumsum(tf.cast(has(kinds, _LINKER), tf.int32))
        linked = has(tf.gather(kinds, base), _CONSONANT) & (tf.roll(linkers, 1, 0) > tf.gather(linkers, base))
        same = tf.gather(characters.piece, base) == characters.piece
        return (if_picture & picture) | (if_consonant & linked & same)

    joins |= tf.cond(tf.reduce_any(if_picture | if_consonant), far, lambda: tf.zeros_like(joins))
    return joins & inside


def _last_without(has: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
    """For each character the place of the last one, itself included, without a property, or that begins a piece."""
    without = ~has | first
    return tf.gather(tf.where(without)[:, 0], tf.cumsum(tf.cast(without, tf.int32)) - 1)


def _before(places: tf.Tensor) -> tf.Tensor:
    """What holds for the character before."""
    return tf.roll(places, 1, 0)


@functools.cache
def _properties() -> np.ndarray:
    """The properties of all code points, asked of the library by how many clusters it sees."""
    every = np.r_[0x20:0xD800, 0xE000:0x20000, 0xE0000:0xE1000]  # the others are ideographs, private or not assigned
    kinds = np.zeros(TOKEN, np.int64)
    kinds[:0x20] = _CONTROL
    kinds[0x0D] |= _CR
    kinds[0x0A] |= _LF

    def mark(bit: int, among: np.ndarray, before: str, behind: str, count: int, differs: bool = False) -> np.ndarray:
        counts = _num_clusters([before + chr(code_point) + behind for code_point in among])
        found = among[(counts == count) != differs]
        kinds[found] |= bit
        return found

    joining = mark(_JOINS, every, "A", "", 1)
    mark(_CONTROL, every, "", _EXT * 2, 2)
    mark(_PREPEND, every, "", "A" + _EXT, 2, differs=True)
    others = np.setdiff1d(every, np.flatnonzero(kinds))
    mark(_EXTEND, joining, "\xa9", _ZWJ_TEXT + "\xae" + _EXT, 5)
    kinds[ord(_ZWJ_TEXT)] |= _ZWJ
    mark(_PICTURE, others, "\xa9" + _ZWJ_TEXT, _EXT, 4)
    consonants = others[(others >= 0x900) & (others < 0x12000)]
    mark(_CONSONANT, consonants, "", _VIRAMA + _KA + _EXT, 4)
    mark(_LINKER, joining, _KA, _KA + _EXT, 4)
    mark(_LINKED, joining, _KA, _VIRAMA + _KA + _EXT, 5)
    jamo = others[((others >= 0x1100) & (others < 0x1200)) | ((others >= 0xA960) & (others < 0xD800))]
    for number, (bit, left) in enumerate(zip(_AFTER, "\u1100\u1161\u11a8", strict=True), 1):
        mark(bit, jamo, left, _EXT, 3)
        right = "\u1100\u1161\u11a8"[number - 1]
        rest = jamo[kinds[jamo] >> _HANGUL_SHIFT == 0]
        mark(number << _HANGUL_SHIFT, rest, "", right + _EXT, 3)
    return kinds


def _num_clusters(texts: list[str]) -> np.ndarray:
    """The clusters of each text [N], of which those of more than five bytes count by their characters."""
    text = _revealing().normalize_str("\n".join(texts))
    return np.array(list(map(len, text.split("\n"))))


@functools.cache
def _revealing() -> normalizers.Normalizer:
    """A normalizer that makes an "A" of each cluster of less than six bytes and of each character of the others."""
    units = np.zeros(1024, np.uint32)
    units[0] = 256 << 10
    for label in (*range(0x20, 0x80), *range(0xC2, 0xF5)):  # bytes that begin a character
        units[256 ^ label] = label | _LEAF | (512 << 10)
    blob = units.nbytes.to_bytes(4, "little") + units.tobytes() + b"A\0"
    state = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}
    normalizer = normalizers.Sequence([])
    normalizer.__setstate__(json.dumps({"type": "Sequence", "normalizers": [state]}).encode())
    return normalizer
