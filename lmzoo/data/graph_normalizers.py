"""The normalizers of a `tokenizer.json` in a graph, on one long vector of the characters of many texts.

Each character keeps the place that it has in its text, or that the library gives it there. What becomes of a code
point is asked of the `tokenizers` library, whose Unicode version is not that of Python or of TensorFlow.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf
from tokenizers import normalizers

from lmzoo.data.graph_code_points import CodePoints, ask, begins, code_points_of, combining_order, row_ids

TOKEN = 0x110000  # stands for a special token; no normalizer changes it
_SPACE = ord(" ")
_BITS = 21  # of a code point


class Characters(NamedTuple):
    """The characters of pieces of texts, one piece after the other.

    Shapes: N characters.
        code_points: [N] int32.
        piece: [N] int64, ascending: the piece that each is of.
        starts, ends: [N] int32, the characters [start, end) of the original text that each stands for.
    """

    code_points: tf.Tensor
    piece: tf.Tensor
    starts: tf.Tensor
    ends: tf.Tensor


class Normalizer(Protocol):
    """Characters to characters."""

    def __call__(self, characters: Characters) -> Characters:
        """What becomes of characters."""


def make_normalizers(spec: dict[str, Any] | None, unsupported: Any) -> list[Normalizer]:
    """The steps of a normalizer of a `tokenizer.json`.

    Args:
        spec: the normalizer; None changes nothing.
        unsupported: raises an error for a part, named in words, that has no twin.
    """
    if spec is None:
        return []
    kind = spec["type"]
    if kind == "Sequence":
        return [step for part in spec["normalizers"] for step in make_normalizers(part, unsupported)]
    if kind in ("Nmt", "Lowercase", "StripAccents"):
        return [EachCharacter(getattr(normalizers, kind)())]
    if kind in ("NFD", "NFKD", "NFC", "NFKC"):
        return [UnicodeForm(kind)]
    if kind == "Strip":
        return [Strip(spec["strip_left"], spec["strip_right"])]
    if kind == "Prepend":
        return [Prepend(spec["prepend"])]
    if kind == "Precompiled":
        from lmzoo.data.graph_precompiled import Precompiled  # which builds on this module

        return [Precompiled(spec["precompiled_charsmap"])]
    if kind == "Replace":
        pattern = spec["pattern"]
        if pattern == {"Regex": " {2,}"}:
            return [ReplaceSpaces(spec["content"])]
        if 1 <= len(pattern.get("String", "")) <= 2:
            return [Replace(pattern["String"], spec["content"])]
        unsupported(f"its normalizer replaces {pattern}")
    unsupported(f"its normalizer is {kind}")
    return []


class EachCharacter(tf.Module):
    """A normalizer that makes of each code point what it makes of it alone."""

    def __init__(self, normalizer: normalizers.Normalizer):
        super().__init__()
        before = CodePoints.changeable()
        after = ask(normalizer, before)
        self._results = Results.of({b: a for b, a in zip(before, after, strict=True) if a != b})

    def __call__(self, characters: Characters) -> Characters:
        """What becomes of characters."""
        which = self._results.of_characters(characters.code_points)
        return when(tf.reduce_any(which >= 0), lambda: self._results.put(characters, which), characters)


class UnicodeForm(tf.Module):
    """NFD, NFKD, NFC or NFKC: full decomposition, marks in canonical order, and composition for the last two.

    Reference: Unicode Standard Annex 15.
    """

    def __init__(self, form: str):
        super().__init__()
        before = CodePoints.changeable()
        after = ask(normalizers.NFKD() if "K" in form else normalizers.NFD(), before)
        self._decompositions = Results.of({b: a for b, a in zip(before, after, strict=True) if a != b})
        self._order = CodePoints(combining_order())
        self._pairs = _compositions() if form.endswith("C") else None
        if self._pairs is not None:
            seconds = np.zeros(TOKEN, np.int64)
            seconds[self._pairs[:, 1]] = 1
            self._is_second = CodePoints(seconds)
            keys = self._pairs[:, 0] << _BITS | self._pairs[:, 1]
            order = np.argsort(keys)
            self._keys = tf.constant(keys[order], tf.int64)
            self._composites = tf.constant(self._pairs[order, 2], tf.int32)

    def __call__(self, characters: Characters) -> Characters:
        """What becomes of characters."""
        which = self._decompositions.of_characters(characters.code_points)
        busy = tf.reduce_any(which >= 0) | tf.reduce_any(self._order(characters.code_points) > 0)
        if self._pairs is not None:
            busy |= tf.reduce_any(self._is_second(characters.code_points) > 0)
        return when(busy, lambda: self._normalize(characters, which), characters)

    def _normalize(self, characters: Characters, which: tf.Tensor) -> Characters:
        code_points, source, number = self._decompositions.expand(characters, which)
        piece = tf.gather(characters.piece, source)
        change = tf.cast(number > 0, tf.int64)
        order = tf.cast(self._order(code_points), tf.int64)
        # Marks are sorted between the characters that nothing moves across.
        stays = begins(piece) | (order == 0)
        run = tf.cumsum(tf.cast(stays, tf.int64))
        by_order = tf.argsort(run * 64 + order, stable=True)
        code_points, order, change = (tf.gather(values, by_order) for values in (code_points, order, change))
        if self._pairs is not None:
            code_points, piece, change = self._compose(code_points, piece, change, order)
        return transformed(characters, code_points, piece, change)

    def _compose(
        self, code_points: tf.Tensor, piece: tf.Tensor, change: tf.Tensor, order: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Joins what composes, in all places at once: each step the next character that each starter takes up."""

        def pairs(code_points: tf.Tensor, piece: tf.Tensor, order: tf.Tensor, last: tf.Tensor) -> tuple[tf.Tensor, ...]:
            at = tf.range(tf.size(piece, tf.int64))
            is_starter = order == 0
            number = tf.cumsum(tf.cast(is_starter, tf.int64))
            starters = tf.concat([tf.zeros([1], tf.int64), tf.where(is_starter)[:, 0]], 0)
            starter = tf.gather(starters, number - tf.cast(is_starter, tf.int64))  # the last one before each
            has_one = (number - tf.cast(is_starter, tf.int64) > 0) & (tf.gather(piece, starter) == piece)
            before = tf.maximum(at - 1, 0)
            before_order = tf.gather(order, before)
            open_ = (starter == before) | ((before_order > 0) & (before_order < order))
            key = tf.cast(tf.gather(code_points, starter), tf.int64) * (1 << _BITS) + tf.cast(code_points, tf.int64)
            row = tf.minimum(tf.searchsorted(self._keys, key), tf.size(self._keys) - 1)
            fits = has_one & open_ & (tf.gather(self._keys, row) == key) & (at > tf.gather(last, starter))
            which = tf.where(fits)[:, 0]
            first = tf.math.unsorted_segment_min(which, tf.gather(starter, which), tf.size(piece, tf.int64))
            which = tf.boolean_mask(which, tf.gather(first, tf.gather(starter, which)) == which)
            return which, tf.gather(starter, which), tf.gather(self._composites, tf.gather(row, which))

        def step(
            code_points: tf.Tensor, piece: tf.Tensor, change: tf.Tensor, order: tf.Tensor, last: tf.Tensor, _: tf.Tensor
        ) -> tuple[tf.Tensor, ...]:
            taken, starter, composite = pairs(code_points, piece, order, last)
            rows = starter[:, None]
            code_points = tf.tensor_scatter_nd_update(code_points, rows, composite)
            change = tf.tensor_scatter_nd_add(change, rows, tf.gather(change, taken) - 1)
            last = tf.tensor_scatter_nd_update(last, rows, taken)
            kept = tf.tensor_scatter_nd_update(
                tf.ones_like(piece, tf.bool), taken[:, None], tf.zeros_like(taken, tf.bool)
            )
            last -= tf.gather(tf.cumsum(tf.cast(~kept, tf.int64)), tf.maximum(last, 0))
            left = tf.where(kept)[:, 0]
            return *(tf.gather(values, left) for values in (code_points, piece, change, order, last)), tf.size(
                taken
            ) > 0

        vector = tf.TensorShape([None])
        code_points, piece, change, *_ = tf.while_loop(
            lambda *state: state[-1],
            step,
            (code_points, piece, change, order, tf.fill(tf.shape(piece), tf.constant(-1, tf.int64)), True),
            shape_invariants=(vector,) * 5 + (tf.TensorShape([]),),
        )
        return code_points, piece, change


class Strip:
    """Takes white space from both ends of each piece, or from one."""

    def __init__(self, left: bool, right: bool):
        self._left, self._right = left, right

    def __call__(self, characters: Characters) -> Characters:
        """What becomes of characters."""
        at = tf.where(~is_space(characters.code_points))[:, 0]
        piece = tf.gather(characters.piece, at)
        size = 1 + tf.reduce_max(tf.concat([[-1], characters.piece], 0))
        place = tf.range(tf.size(characters.piece, tf.int64))
        kept = tf.gather(tf.math.unsorted_segment_sum(tf.ones_like(at), piece, size), characters.piece) > 0
        if self._left:
            kept &= place >= tf.gather(tf.math.unsorted_segment_min(at, piece, size), characters.piece)
        if self._right:
            kept &= place <= tf.gather(tf.math.unsorted_segment_max(at, piece, size), characters.piece)
        return select(characters, kept)


class Prepend:
    """Puts a text in front of each piece that has any characters."""

    def __init__(self, text: str):
        self._text = [ord(character) for character in text]

    def __call__(self, characters: Characters) -> Characters:
        """What becomes of characters."""
        first = begins(characters.piece) & (characters.code_points != TOKEN)
        for code_point in reversed(self._text):
            characters, first, _ = put_before(characters, first, code_point)
        return characters


class Replace:
    """Replaces a text of one or two characters, from left to right."""

    def __init__(self, pattern: str, content: str):
        self._pattern = [ord(character) for character in pattern]
        self._content = content

    def __call__(self, characters: Characters) -> Characters:
        """What becomes of characters."""
        last = tf.equal(characters.code_points, self._pattern[-1])
        if len(self._pattern) == 1:
            return _put_for(characters, last, last, self._content)
        same_piece = ~begins(characters.piece)
        before = tf.equal(tf.roll(characters.code_points, 1, 0), self._pattern[0])
        last &= before & same_piece
        if self._pattern[0] == self._pattern[1]:  # of a run of matches that overlap, every other one
            at = tf.where(last)[:, 0]
            starts = tf.concat([tf.ones_like(at[:1], tf.bool), at[1:] != at[:-1] + 1], 0)
            run = tf.cumsum(tf.cast(starts, tf.int64)) - 1
            at = tf.boolean_mask(at, (at - tf.gather(tf.boolean_mask(at, starts), run)) % 2 == 0)
            last = tf.tensor_scatter_nd_update(tf.zeros_like(last), at[:, None], tf.ones_like(at, tf.bool))
        return _put_for(characters, last | tf.roll(last, -1, 0), last, self._content)


class ReplaceSpaces:
    """Replaces each run of two spaces or more."""

    def __init__(self, content: str):
        self._content = content

    def __call__(self, characters: Characters) -> Characters:
        """What becomes of characters."""
        space = tf.equal(characters.code_points, _SPACE)
        joined = space & tf.roll(space, 1, 0) & ~begins(characters.piece)
        goes_on = tf.roll(joined, -1, 0)
        return _put_for(characters, joined | goes_on, joined & ~goes_on, self._content)


class Results(NamedTuple):
    """What becomes of characters, or of short runs of them, as texts in a row.

    Args:
        number: of the text for each code point that has one alone.
        firsts, lengths: where each text begins in `code_points`, and how long it is.
        code_points: the texts, one behind the other.
    """

    number: CodePoints
    firsts: tf.Tensor
    lengths: tf.Tensor
    code_points: tf.Tensor

    @classmethod
    def of(cls, texts: dict[str, str]) -> Results:
        """Of a dict from keys to texts, numbered in its order; keys of one character are looked up by `number`."""
        values: Sequence[str] = list(texts.values())
        lengths = np.fromiter(map(len, values), np.int32, len(values))
        number = np.full(TOKEN, 0)
        for index, key in enumerate(texts):
            if len(key) == 1:
                number[ord(key)] = index + 1
        return cls(
            CodePoints(number),
            tf.constant([*(np.cumsum(lengths) - lengths), 0], tf.int32),
            tf.constant([*lengths, 1], tf.int32),
            tf.constant([*code_points_of(list(values)), 0], tf.int32),
        )

    def of_characters(self, code_points: tf.Tensor) -> tf.Tensor:
        """The number of the text for each code point [N], -1 where there is none."""
        return self.number(code_points) - 1

    def expand(self, characters: Characters, which: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Puts texts in the place of characters.

        Args:
            characters: N of them.
            which: int32 [N], the number of a text, or -1 for the character itself.

        Returns:
            The code points that result, the character that each comes from, and its number among those of it.
        """
        row = tf.where(which < 0, tf.size(self.lengths) - 1, which)
        number = tf.ragged.range(tf.gather(self.lengths, row))
        source = row_ids(number)
        code_points = tf.gather(self.code_points, tf.gather(tf.gather(self.firsts, row), source) + number.values)
        itself = tf.gather(which < 0, source)
        return tf.where(itself, tf.gather(characters.code_points, source), code_points), source, number.values

    def put(self, characters: Characters, which: tf.Tensor) -> Characters:
        """As `expand`, where each result stands for what the character stood for."""
        code_points, source, _ = self.expand(characters, which)
        return Characters(code_points, *(tf.gather(values, source) for values in characters[1:]))


def transformed(characters: Characters, code_points: tf.Tensor, piece: tf.Tensor, change: tf.Tensor) -> Characters:
    """New characters, with the places that the library gives them.

    It goes through the new and the old characters side by side: a change of 0 takes the next old character, -n takes n
    more along, and one of 1 takes none, but stands for what the last one taken stands for.

    Args:
        characters: the old ones, N.
        code_points, piece: [M], the new ones.
        change: [M] int64.
    """
    taken = tf.where(change > 0, tf.zeros_like(change), 1 - change)
    before = tf.cumsum(taken, exclusive=True)
    first = tf.searchsorted(piece, piece, out_type=tf.int64)
    before -= tf.gather(before, first)
    at = tf.searchsorted(characters.piece, piece, out_type=tf.int64) + before
    at = tf.where(change > 0, at - 1, at)
    at = tf.clip_by_value(at, 0, tf.maximum(tf.size(characters.piece, tf.int64) - 1, 0))
    return Characters(code_points, piece, tf.gather(characters.starts, at), tf.gather(characters.ends, at))


def select(characters: Characters, kept: tf.Tensor) -> Characters:
    """Those characters that are kept [N]."""
    at = tf.where(kept)[:, 0]
    return Characters(*(tf.gather(values, at) for values in characters))


def put_before(characters: Characters, where: tf.Tensor, code_point: int) -> tuple[Characters, tf.Tensor, tf.Tensor]:
    """Puts a character in front of some [N], to stand for the same.

    Returns:
        The characters; for each, whether it is new, and the old one that it is, or that it stands in front of.
    """
    source = row_ids(tf.ragged.range(1 + tf.cast(where, tf.int64)))
    is_new = tf.gather(where, source) & begins(source)
    code_points, *rest = (tf.gather(values, source) for values in characters)
    return Characters(tf.where(is_new, code_point, code_points), *rest), is_new, source


def is_space(code_points: tf.Tensor) -> tf.Tensor:
    """Whether code points are white space by Unicode's property."""
    return tf.gather(_space_table(), tf.minimum(code_points, 0x3001))


def when(condition: tf.Tensor, change: Any, characters: Characters) -> Characters:
    """The characters as changed, if it comes to that."""
    return Characters(*tf.cond(condition, lambda: tuple(change()), lambda: tuple(characters)))


def _put_for(characters: Characters, matched: tf.Tensor, last: tf.Tensor, content: str) -> Characters:
    """Puts a text for each match, where its last character is; the others of it go."""
    results, which = Results.of({"": "", "content": content}), tf.where(last, 1, tf.where(matched, 0, -1))
    return when(tf.reduce_any(matched), lambda: results.put(characters, which), characters)


@functools.cache
def _space_values() -> list[bool]:
    spaces = {*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
    return [code_point in spaces for code_point in range(0x3002)]


def _space_table() -> tf.Tensor:
    return tf.constant(_space_values())


@functools.cache
def _compositions() -> np.ndarray:
    """First, second and composite of each canonical composition [pairs, 3]."""
    composites = [
        c
        for c, d in zip(CodePoints.changeable(), ask(normalizers.NFD(), CodePoints.changeable()), strict=True)
        if len(d) > 1
    ]
    parts = ask(normalizers.NFD(), composites)
    firsts = ask(normalizers.NFC(), [text[:-1] for text in parts])
    whole = ask(normalizers.NFC(), composites)
    rows = [
        (ord(first), ord(text[-1]), ord(composite))
        for composite, text, first, same in zip(composites, parts, firsts, whole, strict=True)
        if len(first) == 1 and same == composite
    ]
    return np.array(rows, np.int64)
