"""Strings that end a text: as tokens that end the loop, in the graph, and in a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer

Tensor = Any


class StopStrings:
    """Strings that end a text and are not in it.

    Args:
        strings: one or several.
        tokenizer: of the texts.

    Attributes:
        sequences: runs of token ids that hold one of the strings. It may come in other tokens too, so a text is cut.

    Raises:
        ValueError: a string is empty, no str, or mixes text and special tokens.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Tokenizer) -> None:
        self._strings = (strings,) if isinstance(strings, str) else tuple(strings)
        self._tokenizer = tokenizer
        self.sequences = tuple(sequence for stop in self._strings for sequence in self._sequences(stop))
        self._pattern = "|".join(_pattern(stop) for stop in self._strings)

    def cut(self, texts: Tensor) -> Tensor:
        """Texts, tf.string [B], up to the first of the strings."""
        if not self._strings:
            return texts
        return tf.strings.regex_replace(texts, f"(?s)(?:{self._pattern}).*", "", replace_global=False)

    def before(self, text: str) -> str:
        """A text up to the first of the strings."""
        starts = [text.index(stop) for stop in self._strings if stop in text]
        return text[: min(starts, default=len(text))]

    def held_back(self, text: str) -> int:
        """How many of the last characters of a text may be the beginning of one of the strings."""
        beginnings = (stop[:size] for stop in self._strings for size in range(1, len(stop)))
        return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)

    def _sequences(self, stop: Any) -> list[tuple[int, ...]]:
        """Runs of token ids that hold a string."""
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop_strings has {stop!r}, but each must be a str of one character or more.")
        token_ids = self._tokenizer.encode(stop)
        special = [token for token in token_ids if self._is_special(token, stop)]
        if special and special != token_ids:
            raise ValueError(f"the stop string {stop!r} mixes text and special tokens: give them one by one.")
        if special:
            return [tuple(special)]
        # Behind a space it is often another token. Tokens that do not hold the string end nothing.
        both = (token_ids, self._tokenizer.encode(" " + stop))
        return [tuple(held_by) for held_by in both if stop in self._tokenizer.decode(held_by)]

    def _is_special(self, token: int, stop: str) -> bool:
        """Whether a token of a stop string is written out in it, but has no text, unlike one for unknown text."""
        return self._tokenizer.decode([token]) == "" and (self._tokenizer.id_to_token(token) or "") in stop


def _pattern(text: str) -> str:
    """A regular expression for just this text, whatever it holds."""
    return "".join(f"\\x{{{ord(character):X}}}" for character in text)
