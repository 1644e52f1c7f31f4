"""Finds the answer to a question in a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.pipelines.base import EncoderPipeline, Outputs, Tensor, check_task
from lmzoo.tasks import QuestionAnsweringModel

_IMPOSSIBLE = -1e30


class QuestionAnswerer(EncoderPipeline):
    """Finds the span of a context that answers a question.

    ```python
    answerer = QuestionAnswerer.from_pretrained("my-reader")
    answerer("Who wrote Emma?", "Emma is a novel by Jane Austen.")
    # {"answer": "Jane Austen", "score": 0.97, "start": 19, "end": 30}
    ```

    A long context is read in windows that overlap. An answer is as good as the sum of the logits of its start and its
    end, in the window where that is highest; its score is the product of both probabilities among all tokens of the
    context and the first tokens of all windows. `start` and `end` count characters of the context, so that
    `context[start:end]` is the answer. A question takes half of a window at most.

    Two str give a dict, two lists a list of them, and two tf.string tensors the outputs of the graph. With `n_best`
    above 1 there is a list of dicts, best first, in the place of a dict. No answer is the answer "", at -1.

    What is exported has the signatures

    - `serving_default`: question [B] and context [B] -> answer, score, start and end [B], or [B, n_best], "" and -1
      where there are fewer answers;
    - `tokens`: token_ids and token_type_ids [B, T] int32, padding_mask [B, T] bool -> logits [B, T, 2] float32.

    Args:
        model: a model of extractive question answering.
        tokenizer: the one whose ids the model was trained on. It must have an in-graph twin.
        max_length: tokens of a window, the question and special tokens included. None is the smaller of 384 and the
            model's context length.
        stride: tokens of the context that two windows in a row have in common. None is 128, or a third of a window if
            that is less.
        max_answer_length: the most tokens of an answer.
        n_best: number of answers to a question.
        no_answer_threshold: a text has no answer if the sum of the logits of the first token, in the window where it is
            lowest, exceeds that of the best answer by more than this. None: there always is one.
        window_batch_size: windows that go through the model at a time.

    Raises:
        ValueError: the model is of another task, the tokenizer does not fit it, or an argument is outside its range.

    Reference:
        Devlin et al. 2019, "BERT", sections 4.2 and 4.3 and the released code, but with one softmax over all windows.
    """

    _inputs = ("question", "context")

    def __init__(
        self,
        model: QuestionAnsweringModel,
        tokenizer: Tokenizer,
        max_length: int | None = None,
        stride: int | None = None,
        max_answer_length: int = 30,
        n_best: int = 1,
        no_answer_threshold: float | None = None,
        window_batch_size: int = 32,
    ) -> None:
        check_task(self, model, QuestionAnsweringModel)
        for name, value in (
            ("max_answer_length", max_answer_length),
            ("n_best", n_best),
            ("window_batch_size", window_batch_size),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be an integer of 1 or more.")
        max_length = min(384, model.config.context_length) if max_length is None else max_length
        self._frame = _Frame.of(tokenizer)
        room = max_length - sum(self._frame) if isinstance(max_length, int) else 0
        stride = min(128, room // 3) if stride is None else stride
        if not 0 <= stride < room // 2:
            raise ValueError(
                f"stride is {stride!r}, but must lie in [0, {room // 2}): windows have max_length={max_length} tokens, "
                f"{sum(self._frame)} of them special, and half of the rest may be the question."
            )
        self.stride, self.max_answer_length, self.n_best = stride, max_answer_length, n_best
        self.no_answer_threshold, self.window_batch_size = no_answer_threshold, window_batch_size
        super().__init__(model, tokenizer, max_length)

    @classmethod
    def _load_model(cls, directory: Path, dtype: Any) -> Any:
        return QuestionAnsweringModel.from_pretrained(directory, dtype=dtype)

    def __call__(self, question: Any, context: Any, *, batch_size: int = 8) -> Any:
        """The answer to each question.

        Args:
            question: a str, an iterable of str, or a tf.string tensor [B].
            context: the text that holds the answer to each question, likewise.
            batch_size: questions of a list that are answered at a time.

        Raises:
            TypeError: a text is not a str.
            ValueError: there are more questions than contexts, or fewer.
        """
        return self._call(self._run, {"question": question, "context": context}, batch_size)

    def _result(self, row: dict[str, Any], texts: tuple[str, ...]) -> Any:
        columns = {name: [values] if self.n_best == 1 else values for name, values in row.items()}
        answers = [
            {"answer": answer.decode(), "score": float(score), "start": int(start), "end": int(end)}
            for answer, score, start, end in zip(
                *(columns[name] for name in ("answer", "score", "start", "end")), strict=True
            )
        ]
        return answers[0] if self.n_best == 1 else [answer for answer in answers if answer["score"] >= 0.0]

    # ---- the graph

    def _outputs(self, *texts: Tensor) -> Outputs:
        question, context = texts
        windows = self._windows(question, context)
        logits = self._logits(windows)  # [W, T, 2]
        with tf.device("CPU:0"):
            return self._best(context, windows, logits[..., 0], logits[..., 1])

    def _windows(self, question: Tensor, context: Tensor) -> _Windows:
        with tf.device("CPU:0"):
            whole = self._graph_tokenizer.encode_pairs(question, context)
            before, between, after = self._frame
            lengths = self._graph_tokenizer.encode(question).row_lengths()
            all_lengths = whole.token_ids.row_lengths()
            context_lengths = all_lengths - lengths - sum(self._frame)
            room = self.max_length - sum(self._frame)
            kept = tf.minimum(lengths, room // 2)
            size = room - kept  # of the context in a window, [B]
            step = size - self.stride
            counts = 1 + (tf.maximum(context_lengths - size, 0) + step - 1) // step
            row = tf.repeat(tf.range(tf.size(counts, tf.int64)), counts)  # [W]
            number = tf.range(tf.size(row, tf.int64)) - tf.gather(tf.cumsum(counts, exclusive=True), row)
            begin = number * tf.gather(step, row)
            taken = tf.minimum(tf.gather(size, row), tf.gather(context_lengths, row) - begin)
            # Each slot of a window is a place in the whole pair: both texts lose tokens before it.
            first = before + tf.gather(kept, row) + between  # [W], the slot where the context begins
            last = first + taken
            slots = tf.range(tf.maximum(tf.reduce_max(tf.concat([last + after, [1]], 0)), 1))[None, :]
            nothing = tf.zeros([1, 1], tf.int64)
            cut = tf.where(slots < (first - between)[:, None], nothing, tf.gather(lengths - kept, row)[:, None])
            skipped = tf.where(slots < first[:, None], nothing, begin[:, None])
            rest = (tf.gather(all_lengths, row) - last - after)[:, None]
            source = slots + tf.where(slots < last[:, None], cut + skipped, rest)
            mask = slots < (last + after)[:, None]
            source = tf.where(mask, source + tf.gather(whole.token_ids.row_starts(), row)[:, None], nothing)
            # One more value, so that a place can be looked up where there are no texts at all.
            ids, types = (tf.concat([each.values, [0]], 0) for each in (whole.token_ids, whole.token_type_ids))
            offsets = tf.concat([whole.offsets.values, [[0, 0]]], 0)
            return _Windows(
                batch={
                    "token_ids": tf.where(mask, tf.gather(ids, source), self._pad_token_id),
                    "padding_mask": mask,
                    "token_type_ids": tf.where(mask, tf.gather(types, source), 0),
                },
                offsets=tf.gather(offsets, source),
                row=row,
                is_context=(slots >= first[:, None]) & (slots < last[:, None]),
                place=slots - first[:, None] + begin[:, None],
                context_lengths=context_lengths,
            )

    def _logits(self, windows: _Windows) -> Tensor:
        """Logits [W, T, 2] of all windows, a few windows at a time."""
        total, size = tf.size(windows.row), self.window_batch_size
        steps = tf.maximum((total + size - 1) // size, 1)

        def read(step: Tensor, results: Any) -> tuple[Tensor, Any]:
            batch = {name: values[step * size : (step + 1) * size] for name, values in windows.batch.items()}
            return step + 1, results.write(step, self.model(batch, training=False))

        results = tf.TensorArray(tf.float32, steps, infer_shape=False, element_shape=[None, None, 2])
        _, results = tf.while_loop(lambda step, _: step < steps, read, (0, results), parallel_iterations=1)
        return results.concat()

    def _best(self, context: Tensor, windows: _Windows, start: Tensor, end: Tensor) -> Outputs:
        """The outputs, from logits [W, T] of start and end."""
        rows, row = tf.size(context, tf.int64), windows.row
        # A token that stands for no character of its own is no end of an answer.
        candidate = windows.is_context & (windows.offsets[..., 1] > windows.offsets[..., 0])
        first = tf.equal(tf.range(tf.shape(start)[1]), 0)[None, :]
        counted = windows.is_context | first
        log_totals = sum(_log_sum_by_row(tf.where(counted, each, _IMPOSSIBLE), row, rows) for each in (start, end))
        # Spans by the place of their first token in the context and by their length, each at its best window.
        longest = tf.minimum(tf.cast(self.max_answer_length, tf.int64), tf.shape(end, tf.int64)[1])
        ends = tf.where(candidate, end, _IMPOSSIBLE)
        ends = tf.pad(ends, [[0, 0], [0, longest - 1]], constant_values=_IMPOSSIBLE)
        slots = tf.range(tf.shape(start, tf.int64)[1])[:, None] + tf.range(longest)[None, :]  # [T, A]
        spans = tf.where(candidate, start, _IMPOSSIBLE)[:, :, None] + tf.gather(ends, slots, axis=1)  # [W, T, A]
        width = tf.reduce_max(tf.concat([windows.context_lengths, [1]], 0))
        at = tf.where(candidate)
        key = tf.gather(row, at[:, 0]) * width + tf.gather_nd(windows.place, at)
        table = tf.math.unsorted_segment_max(tf.gather_nd(spans, at), key, rows * width)  # [B x width, A]
        table = tf.reshape(tf.maximum(table, _IMPOSSIBLE), [rows, width * longest])
        offsets = tf.math.unsorted_segment_max(tf.gather_nd(windows.offsets, at), key, rows * width)
        null = tf.math.unsorted_segment_min(start[:, 0] + end[:, 0], row, rows)
        if self.no_answer_threshold is not None:
            table = tf.concat([table, (null - self.no_answer_threshold)[:, None]], 1)
        table = tf.pad(table, [[0, 0], [0, self.n_best - 1]], constant_values=_IMPOSSIBLE)
        logits, best = tf.math.top_k(table, self.n_best, index_type=tf.int64)  # [B, n]
        found = (logits > _IMPOSSIBLE / 2) & (best < width * longest)
        # No answer is one, where it comes out best or there is nothing to be found.
        is_null = ~found & ((logits > _IMPOSSIBLE / 2) | (tf.range(self.n_best) == 0))
        place, more = best // longest, best % longest
        begins = tf.range(rows)[:, None] * width
        inside = tf.where(found, begins + place, 0)
        offsets = tf.concat([offsets, [[0, 0]]], 0)  # Where there are no texts there is something to look up, too.
        starts = tf.gather(offsets[:, 0], inside)
        stops = tf.gather(offsets[:, 1], tf.where(found, inside + more, 0))
        starts, stops = tf.where(found, starts, 0), tf.where(found, stops, 0)
        texts = tf.broadcast_to(context[:, None], tf.shape(starts))
        logits = tf.where(is_null, null[:, None], logits)
        outputs = {
            "answer": tf.strings.substr(texts, starts, stops - starts, unit="UTF8_CHAR"),
            "score": tf.where(found | is_null, tf.exp(logits - log_totals[:, None]), -1.0),
            "start": tf.where(found, starts, -1),
            "end": tf.where(found, stops, -1),
        }
        return {name: values[:, 0] if self.n_best == 1 else values for name, values in outputs.items()}


class _Frame(NamedTuple):
    """How many special tokens stand before a pair's first text, between the two, and after the second."""

    before: int
    between: int
    after: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Frame:
        word = next(text for text in ("a", "0", "?") if tokenizer.encode(text))
        (word_ids,) = tokenizer.encode([word])
        empty = tokenizer.encode_pairs([""], [""]).token_ids[0]
        one, two = (
            tokenizer.encode_pairs([first], [second]).token_ids[0] for first, second in ((word, ""), ("", word))
        )
        before, until = (
            next(place for place in range(len(ids)) if ids[place : place + len(word_ids)] == word_ids)
            for ids in (one, two)
        )
        return cls(before, until - before, len(empty) - until)


class _Windows(NamedTuple):
    """Windows of contexts, each with its question, as the model reads them.

    Shapes: B questions, W windows of all of them, T tokens.
        batch: token_ids, padding_mask and token_type_ids, [W, T].
        offsets: [W, T, 2], the characters [start, end) of each token in its text.
        row: [W] int64, the question of each window.
        is_context: [W, T] bool.
        place: [W, T] int64, the number of each token among those of the context.
        context_lengths: [B] int64, tokens of each context.
    """

    batch: dict[str, Tensor]
    offsets: Tensor
    row: Tensor
    is_context: Tensor
    place: Tensor
    context_lengths: Tensor


def _log_sum_by_row(logits: Tensor, row: Tensor, num_rows: Tensor) -> Tensor:
    """log(sum(exp(logits))) over all that belongs to a row: [W, T] -> [B]."""
    each = tf.reduce_logsumexp(logits, 1)
    highest = tf.math.unsorted_segment_max(each, row, num_rows)
    return highest + tf.math.log(tf.math.unsorted_segment_sum(tf.exp(each - tf.gather(highest, row)), row, num_rows))
