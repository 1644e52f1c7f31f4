"""Texts, pairs of texts and lists of words, with their labels, as examples to train on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lmzoo.data.labelled import Examples, Ragged
from lmzoo.data.records import Records
from lmzoo.data.tokenizers import Tokenizer

Problem = Literal["single_label", "multi_label", "regression"]

OUTSIDE = "O"
"""Tag of a word that belongs to no entity, in IOB2 and its kin."""


def find_labels(records: Records, field: str, problem: Problem = "single_label") -> tuple[str, ...]:
    """The labels that occur, sorted: numbers by their size, and words by the alphabet."""
    if problem == "regression":
        width = len(_scores(records, field)[0])
        return ("score",) if width == 1 else tuple(f"score_{number}" for number in range(width))
    found = {label for labels in label_names(records, field, problem) for label in labels}
    return tuple(sorted(found, key=_sort_key))


def find_tags(records: Records, field: str) -> tuple[str, ...]:
    """The tags that occur: first the one of what is outside, then the others, sorted."""
    found = {tag for tags in _tags(records, field) for tag in tags}
    return tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, tag)))


def label_names(records: Records, field: str, problem: Problem) -> list[list[str]]:
    """The labels of each record: one, or for a multi-label problem any number."""
    if problem == "multi_label":
        values = records.checked(field, _is_label_list, "a list of labels, or labels with commas between them")
        return [_split(value) for value in values]
    return [[_name(value)] for value in records.checked(field, _is_label, "a string or an integer")]


def encode_texts(
    records: Records,
    tokenizer: Tokenizer,
    *,
    text: str,
    pair: str | None,
    label: str,
    labels: Sequence[str],
    problem: Problem,
    max_length: int,
) -> Examples:
    """Examples for sequence classification and regression.

    Args:
        records: what to encode.
        tokenizer: that of the model.
        text, pair, label: names of the fields; no pair for single texts.
        labels: all that there are, in the order of the model's outputs.
        problem: which kind of label there is.
        max_length: tokens, special ones included; the end of longer texts is cut off.

    Raises:
        ValueError: a field is missing or holds something else, a label is none of `labels`, or a text has no token.
    """
    encodings = tokenizer.encode_pairs(
        records.texts(text), None if pair is None else records.texts(pair), max_length=max_length
    )
    inputs = {"token_ids": _rows(encodings.token_ids, records)}
    if pair is not None:
        inputs["token_type_ids"] = Ragged(encodings.token_type_ids)
    values: np.ndarray
    if problem == "regression":
        values = np.asarray(_scores(records, label), np.float32)
        if values.shape[1] != len(labels):
            raise ValueError(f"{records.places[0]}: {values.shape[1]} scores, but the model gives {len(labels)}")
    else:
        numbers = _numbers(records, label_names(records, label, problem), labels, label)
        values = (
            np.asarray([row[0] for row in numbers], np.int32) if problem == "single_label" else _many(numbers, labels)
        )
    return _examples(inputs, values, np.ones(len(records), np.float32), tokenizer)


def encode_similar(
    records: Records,
    tokenizer: Tokenizer,
    *,
    text: str,
    pair: str,
    score: str | None,
    max_score: float,
    max_length: int,
) -> Examples:
    """Examples for an embedding model: two texts each, with or without a score of how similar they are.

    Args:
        records, tokenizer, max_length: as in `encode_texts`.
        text, pair, score: names of the fields; without scores the labels are zeros, for a contrastive objective.
        max_score: the score that stands for a cosine of 1.

    Raises:
        ValueError: a field is missing or holds something else, or a score is outside [-max_score, max_score].
    """
    first, second = (
        _rows(tokenizer.encode_pairs(records.texts(field), max_length=max_length).token_ids, records)
        for field in (text, pair)
    )
    values: np.ndarray = np.zeros(len(records), np.int32)
    if score is not None:
        values = np.asarray([row[0] for row in _scores(records, score)], np.float32) / np.float32(max_score)
        if (wrong := np.abs(values) > 1.0).any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{records.places[row]}: the score is {records[row][score]}, but must lie in [-{max_score:g}, "
                f"{max_score:g}]; set max_score to the score of two texts that say the same"
            )
    weights = np.ones(len(records), np.float32)
    return _examples({"token_ids": first, "pair_token_ids": second}, values, weights, tokenizer)


@dataclass(frozen=True, eq=False)
class TagExamples(Examples):
    """Encoded lists of words.

    Args:
        words: the number, in its record, of each word whose first piece is in an example.
        word_counts: how many words each record has.
    """

    words: Ragged
    word_counts: tuple[int, ...]

    def tags(self, choices: Sequence[np.ndarray], labels: Sequence[str]) -> list[list[str]]:
        """Tags of all words of each record, from the label chosen for each token of each example.

        A word without a token of its own, such as an invisible character, gets the first label.
        """
        tags = [[labels[0]] * count for count in self.word_counts]
        assert isinstance(self.weights, Ragged)
        for number, record in enumerate(self.records):
            (places,) = np.nonzero(self.weights[number])
            for place, word in zip(places, self.words[number], strict=True):
                tags[record][word] = labels[choices[number][place]]
        return tags


def encode_tags(
    records: Records, tokenizer: Tokenizer, *, tokens: str, tags: str, labels: Sequence[str], max_length: int
) -> TagExamples:
    """Examples for token classification; the tag of a word is that of its first piece.

    The words stand with a space between them, as in a text. A record that is too long is cut between words into
    several examples, so that no word is left out.

    Args:
        records, tokenizer: as in `encode_texts`.
        tokens, tags: names of the fields.
        labels: all tags that there are, in the order of the model's outputs.
        max_length: tokens, special ones included.

    Raises:
        ValueError: a field is missing or holds something else, or a tag is none of `labels`.
    """
    words = records.words(tokens)
    numbers = _numbers(records, _tags(records, tags), labels, tags)
    for place, row, tagged in zip(records.places, words, numbers, strict=True):
        if len(row) != len(tagged) or not row:
            raise ValueError(f"{place}: {len(row)} words and {len(tagged)} tags; there must be a tag for each word")
    _, owners = _owners(words, tokenizer)
    counts = [np.bincount(owner[owner >= 0], minlength=len(row)) for owner, row in zip(owners, words, strict=True)]
    room = max_length - len(tokenizer.encode_pairs([""]).token_ids[0])
    pieces = [(number, *span) for number, count in enumerate(counts) for span in _spans(count, room)]
    token_ids, owners = _owners([words[number][start:end] for number, start, end in pieces], tokenizer, max_length)
    labelled, weights, placed = [], [], []
    for (number, start, _), owner in zip(pieces, owners, strict=True):
        first = (owner >= 0) & (np.diff(owner, prepend=-1) != 0)
        weights.append(first)
        placed.append(owner[first] + start)
        places = np.maximum(owner, 0) + start
        labelled.append(np.where(first, np.asarray(numbers[number], np.int32)[places], 0))
    return TagExamples(
        {"token_ids": Ragged(token_ids)},
        Ragged(labelled),
        Ragged(weights, np.float32),
        tokenizer.pad_token_id or 0,
        np.asarray([number for number, _, _ in pieces]),
        Ragged(placed),
        tuple(map(len, words)),
    )


def _owners(
    words: Sequence[Sequence[str]], tokenizer: Tokenizer, max_length: int | None = None
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Token ids of each list of words, and the number of the word that each token ends in; -1 for special tokens."""
    encodings = tokenizer.encode_pairs([" ".join(row) for row in words], max_length=max_length)
    owners = []
    for row, offsets in zip(words, encodings.offsets, strict=True):
        spans = np.asarray(offsets, np.int64).reshape(-1, 2)
        ends = np.cumsum([len(word) + 1 for word in row])  # Of each word with the space behind it.
        owner = np.searchsorted(ends, spans[:, 1] - 1, side="right")
        owners.append(np.where(spans[:, 1] > spans[:, 0], owner, -1))
    return encodings.token_ids, owners


def _spans(counts: np.ndarray, room: int) -> list[tuple[int, int]]:
    """Cuts words, of so many tokens each, into spans [start, end) that have room for, with a word at least."""
    spans, start, used = [], 0, 0
    for word, count in enumerate(counts.tolist()):
        if word > start and used + count > room:
            spans.append((start, word))
            start, used = word, 0
        used += count
    return [*spans, (start, len(counts))]


def _examples(inputs: dict[str, Ragged], labels: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer) -> Examples:
    return Examples(inputs, labels, weights, tokenizer.pad_token_id or 0, np.arange(len(weights)))


def _rows(token_ids: list[list[int]], records: Records) -> Ragged:
    for row, place in zip(token_ids, records.places, strict=True):
        if not row:
            raise ValueError(f"{place}: the text has no token; remove such records")
    return Ragged(token_ids)


def _many(numbers: list[list[int]], labels: Sequence[str]) -> np.ndarray:
    values = np.zeros((len(numbers), len(labels)), np.float32)
    for row, chosen in enumerate(numbers):
        values[row, chosen] = 1.0
    return values


def _numbers(records: Records, names: list[list[str]], labels: Sequence[str], field: str) -> list[list[int]]:
    table = {label: number for number, label in enumerate(labels)}
    try:
        return [[table[name] for name in row] for row in names]
    except KeyError as error:
        (name,) = error.args
        place = next(place for place, row in zip(records.places, names, strict=True) if name in row)
        raise ValueError(f"{place}: {field!r} has {name!r}, which is none of the labels {list(labels)}") from None


def _tags(records: Records, field: str) -> list[list[str]]:
    values = records.checked(
        field, lambda value: isinstance(value, list) and all(map(_is_label, value)), "a list of tags"
    )
    return [list(map(_name, value)) for value in values]


def _scores(records: Records, field: str) -> list[list[float]]:
    def numbers(value: Any) -> list[float]:
        given = value if isinstance(value, list) else [value]
        try:
            read = [float(each) for each in given if not isinstance(each, bool)]
        except (TypeError, ValueError):
            return []
        return read if len(read) == len(given) and all(map(math.isfinite, read)) else []

    scores = [
        numbers(value)
        for value in records.checked(field, lambda value: bool(numbers(value)), "a finite number, or a list of them")
    ]
    for row, place in zip(scores, records.places, strict=True):
        if len(row) != len(scores[0]):
            raise ValueError(f"{place}: {len(row)} scores, but {records.places[0]} has {len(scores[0])}")
    return scores


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int)


def _is_label_list(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_label, value)))


def _split(value: Any) -> list[str]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(map(_name, value))


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _sort_key(label: str) -> tuple[float, str]:
    try:
        return float(label), label
    except ValueError:
        return math.inf, label
