"""Questions about a text, as examples to train on, and from a model's scores back to answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lmzoo.data.labelled import Examples, Ragged
from lmzoo.data.records import Records
from lmzoo.data.tokenizers import Tokenizer


class Answer(NamedTuple):
    """A piece of a context: its characters [start, end), and its score; an empty text is no answer."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class AnswerExamples(Examples):
    """Windows of contexts, each with its question.

    Args:
        starts, ends: characters of the context that each token stands for; -1 for all other tokens.
        contexts: of each record.
        gold: the texts of the answers that count as right, of each record; none if there is no answer.
    """

    starts: Ragged
    ends: Ragged
    contexts: tuple[str, ...]
    gold: tuple[tuple[str, ...], ...]

    def answers(
        self, logits: Sequence[np.ndarray], *, max_answer_length: int, n_best: int, no_answer_threshold: float | None
    ) -> list[list[Answer]]:
        """The best answers to each record's question, over all windows of its context, best first.

        The score of an answer is the sum of the scores of its first and last token. That of no answer is the sum of
        both scores of the first token of a window, in the window where it is lowest.

        Args:
            logits: [T, 2] of each example, start and end; T may be more than the example's own tokens.
            max_answer_length: tokens, >= 1.
            n_best: how many for each record, >= 1; fewer if there are no more.
            no_answer_threshold: no answer comes first if its score exceeds the best answer's by more than this; None
                never lets it.

        Reference: Devlin et al. 2019, "BERT", section 4.3, where the threshold is -tau.
        """
        found: list[dict[tuple[int, int], float]] = [{} for _ in self.contexts]
        nothing = [np.inf] * len(self.contexts)
        for number, record in enumerate(self.records):
            scores = logits[number]
            nothing[record] = min(nothing[record], float(scores[0, 0] + scores[0, 1]))
            for span, score in self._spans(number, scores, max_answer_length, n_best):
                found[record][span] = max(score, found[record].get(span, -np.inf))
        results = []
        for spans, context, null in zip(found, self.contexts, nothing, strict=True):
            best = sorted(spans.items(), key=lambda item: -item[1])[:n_best]
            answers = [Answer(context[start:end], score, start, end) for (start, end), score in best]
            refused = not answers or (no_answer_threshold is not None and null - answers[0].score > no_answer_threshold)
            if refused:
                answers = [Answer("", null, 0, 0), *answers][:n_best]
            results.append(answers)
        return results

    def _spans(
        self, number: int, scores: np.ndarray, max_answer_length: int, n_best: int
    ) -> list[tuple[tuple[int, int], float]]:
        """The best spans of a window, as characters, with their scores."""
        starts, ends = self.starts[number], self.ends[number]
        (places,) = np.nonzero(starts >= 0)
        if not len(places):
            return []
        distance = places - places[:, None]
        sums = scores[places, 0][:, None] + scores[places, 1]
        sums = np.where((distance >= 0) & (distance < max_answer_length), sums, -np.inf).ravel()
        top = np.argsort(-sums, kind="stable")[:n_best]
        first, last = np.divmod(top[np.isfinite(sums[top])], len(places))
        return [
            ((int(starts[places[one]]), int(ends[places[two]])), float(sums[one * len(places) + two]))
            for one, two in zip(first, last, strict=True)
        ]


def encode_answers(
    records: Records, tokenizer: Tokenizer, *, question: str, context: str, answers: str, max_length: int, stride: int
) -> AnswerExamples:
    """Examples for extractive question answering: a long context gives several, one a window.

    Labels are the places of the first and the last token of the first answer; both are 0, the place of the first
    token, where the answer is not wholly in the window or there is none.

    Args:
        records: what to encode.
        tokenizer: that of the model.
        question, context, answers: names of the fields. Answers are objects with `text` and `answer_start`, the first
            character, or an object with a list for each, as SQuAD has them.
        max_length: tokens of a window, the question and special tokens included.
        stride: tokens that two windows of a context have in common.

    Raises:
        ValueError: a field is missing or holds something else, or an answer does not stand where it should.
    """
    questions, contexts = records.texts(question), records.texts(context)
    gold = [
        _gold(value, text, place)
        for value, text, place in zip(records.column(answers), contexts, records.places, strict=True)
    ]
    windows = tokenizer.encode_windows(questions, contexts, max_length=max_length, stride=stride)
    spans = [np.asarray(offsets, np.int64) for offsets in windows.offsets]
    labels = np.zeros((len(spans), 2), np.int32)
    for number, (row, offsets) in enumerate(zip(windows.rows, spans, strict=True)):
        if gold[row]:
            text, start = gold[row][0]
            labels[number] = _places(offsets, start, start + len(text))
    return AnswerExamples(
        {"token_ids": Ragged(windows.token_ids), "token_type_ids": Ragged(windows.token_type_ids)},
        labels,
        np.ones(len(spans), np.float32),
        tokenizer.pad_token_id or 0,
        np.asarray(windows.rows),
        Ragged([offsets[:, 0] for offsets in spans]),
        Ragged([offsets[:, 1] for offsets in spans]),
        tuple(contexts),
        tuple(tuple(text for text, _ in each) for each in gold),
    )


def _places(offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """Places of the tokens that hold the first and the last of the characters [start, end); (0, 0) if not both do."""
    real = offsets[:, 0] >= 0
    (first,) = np.nonzero(real & (offsets[:, 0] <= start) & (start < offsets[:, 1]))
    (last,) = np.nonzero(real & (offsets[:, 0] < end) & (end <= offsets[:, 1]))
    return (int(first[0]), int(last[-1])) if len(first) and len(last) else (0, 0)


def _gold(value: Any, context: str, place: str) -> list[tuple[str, int]]:
    """The answers as (text, first character)."""
    try:
        items = [value] if isinstance(value, dict) and isinstance(value["text"], str) else value
        if isinstance(items, dict):
            items = [
                {"text": text, "answer_start": start}
                for text, start in zip(items["text"], items["answer_start"], strict=True)
            ]
        found = [(str(item["text"]), int(item["answer_start"])) for item in items or []]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{place}: the answers must be objects with 'text' and 'answer_start', or an object with a list for each"
        ) from None
    for text, start in found:
        if not text or context[start : start + len(text)] != text:
            raise ValueError(
                f"{place}: the answer {text!r} does not begin at character {start} of the context, where there is "
                f"{context[start : start + len(text)]!r}"
            )
    return found
