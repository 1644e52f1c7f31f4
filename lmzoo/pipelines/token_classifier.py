"""Finds entities in texts: names, places, and whatever else tokens are labelled as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.pipelines.base import EncoderPipeline, Outputs, Tensor, by_row, check_task, padded
from lmzoo.pipelines.token_texts import token_texts
from lmzoo.tasks import TokenClassificationModel

_OUTSIDE = "O"


class TokenClassifier(EncoderPipeline):
    """Finds the entities of a text, and where they are.

    ```python
    tagger = TokenClassifier.from_pretrained("my-tagger")
    tagger("Ada Lovelace was born in London.")
    # [{"label": "PER", "score": 0.99, "text": "Ada Lovelace", "start": 0, "end": 12}, ...]
    ```

    A word has the label of its first token. Words in a row make one entity if they are of one kind, up to a word whose
    label begins with "B-"; labels without "B-" or "I-" count as "I-". The score of an entity is the mean of its words'
    probabilities. `start` and `end` count characters of the str, so that `text[start:end]` is the entity.

    A str gives a list of dicts, a list of str a list of such lists, and a tf.string tensor the outputs of the graph.

    What is exported has the signatures

    - `serving_default`: text [B] -> count [B] int32, the entities of each text; label, score, text, start and end
      [B, E] of each of them, "" and -1 where a text has fewer;
    - `tokens`: token_ids and token_type_ids [B, T] int32, padding_mask [B, T] bool -> logits [B, T, C] float32.

    Args:
        model: a classifier of tokens, for which "O" is the label of what is no entity.
        tokenizer: the one whose ids the model was trained on. It must have an in-graph twin.
        max_length: tokens of a text, special ones included; what is longer loses its end. None is the model's context
            length.

    Raises:
        ValueError: the model is no classifier of tokens, the tokenizer does not fit it, or `max_length` is outside its
            range.
    """

    def __init__(self, model: TokenClassificationModel, tokenizer: Tokenizer, max_length: int | None = None) -> None:
        check_task(self, model, TokenClassificationModel)
        kinds = [label[2:] if label[:2] in ("B-", "I-") else label for label in model.labels]
        names = list(dict.fromkeys(kind for kind in kinds if kind != _OUTSIDE))
        self._kinds = tf.constant([*names, ""])
        self._kind_of = tf.constant([-1 if kind == _OUTSIDE else names.index(kind) for kind in kinds])
        self._begins = tf.constant([label.startswith("B-") for label in model.labels])
        self._continues = None
        if tokenizer.kind == "wordpiece":
            self._continues = tf.constant(token_texts(tokenizer).continues)
        super().__init__(model, tokenizer, max_length)

    @classmethod
    def _load_model(cls, directory: Path, dtype: Any) -> Any:
        return TokenClassificationModel.from_pretrained(directory, dtype=dtype)

    def __call__(self, text: Any, *, batch_size: int = 32) -> Any:
        """The entities of each text.

        Args:
            text: a str, an iterable of str, or a tf.string tensor [B].
            batch_size: texts of a list that go through the model at a time.

        Raises:
            TypeError: a text is not a str.
        """
        return self._call(self._run, {"text": text}, batch_size)

    def _result(self, row: dict[str, Any], texts: tuple[str, ...]) -> list[dict[str, Any]]:
        return [
            {
                "label": row["label"][number].decode(),
                "score": float(row["score"][number]),
                "text": row["text"][number].decode(),
                "start": int(row["start"][number]),
                "end": int(row["end"][number]),
            }
            for number in range(row["count"])
        ]

    def _outputs(self, *texts: Tensor) -> Outputs:
        (text,) = texts
        encodings = self._graph_tokenizer.encode_pairs(text, max_length=self.max_length)
        probabilities = tf.nn.softmax(
            self.model(self._batch(encodings.token_ids, encodings.token_type_ids), training=False)
        )
        with tf.device("CPU:0"):
            # All that stands for characters: no special tokens around the text, no padding.
            kept = tf.where(encodings.offsets.values[:, 1] > encodings.offsets.values[:, 0])[:, 0]
            places = tf.gather(tf.where(tf.sequence_mask(encodings.token_ids.row_lengths())), kept)  # [N, 2]
            row, offsets = places[:, 0], tf.gather(encodings.offsets.values, kept)
            follows = tf.concat([tf.zeros_like(row[:1], tf.bool), row[1:] == row[:-1]], 0)
            joined = follows & self._joins(text, tf.gather(encodings.token_ids.values, kept), offsets, row)
            first = tf.where(~joined)[:, 0]  # [W], the first token of each word
            word = tf.cumsum(tf.cast(~joined, tf.int32)) - 1
            scores = tf.gather_nd(probabilities, tf.gather(places, first))  # [W, C]
            return self._entities(
                text,
                tf.gather(row, first),
                tf.stack([tf.gather(offsets[:, 0], first), tf.math.segment_max(offsets[:, 1], word)], 1),
                tf.argmax(scores, 1),
                tf.reduce_max(scores, 1),
            )

    def _joins(self, text: Tensor, token_ids: Tensor, offsets: Tensor, row: Tensor) -> Tensor:
        """Whether each token, [N], goes on with the word of the one before it, if that is of the same text."""
        start, last_end = offsets[:, 0], tf.roll(offsets[:, 1], 1, 0)
        if self._continues is not None:
            return tf.gather(self._continues, token_ids) & (start == last_end)
        # No vocabulary says it, so it is the same word if letters or numbers touch, or are the same one.
        seam = tf.strings.substr(
            tf.gather(text, row), tf.maximum(start - 1, 0), tf.fill(tf.shape(start), 2), "UTF8_CHAR"
        )
        return (start < last_end) | ((start == last_end) & tf.strings.regex_full_match(seam, r"[\pL\pN\pM]{2}"))

    def _entities(self, text: Tensor, row: Tensor, spans: Tensor, label: Tensor, score: Tensor) -> Outputs:
        """The outputs, from rows [W], characters [start, end), labels and scores of all words."""
        kind = tf.gather(self._kind_of, label)
        same = tf.concat([tf.zeros_like(row[:1], tf.bool), (row[1:] == row[:-1]) & (kind[1:] == kind[:-1])], 0)
        new = (kind >= 0) & (tf.gather(self._begins, label) | ~same)
        inside = tf.where(kind >= 0)[:, 0]
        entity = tf.gather(tf.cumsum(tf.cast(new, tf.int32)) - 1, inside)
        first = tf.where(new)[:, 0]  # [N], the first word of each entity
        row, start = tf.gather(row, first), tf.gather(spans[:, 0], first)
        end = tf.math.segment_max(tf.gather(spans[:, 1], inside), entity)
        columns = {
            "label": (tf.gather(self._kinds, tf.gather(kind, first)), ""),
            "score": (tf.math.segment_mean(tf.gather(score, inside), entity), -1.0),
            "text": (tf.strings.substr(tf.gather(text, row), start, end - start, unit="UTF8_CHAR"), ""),
            "start": (start, -1),
            "end": (end, -1),
        }
        rows = tf.size(text, tf.int64)
        count = tf.math.unsorted_segment_sum(tf.ones_like(start), row, rows)
        width = tf.reduce_max(tf.concat([count, [0]], 0))
        return {
            "count": count,
            **{name: padded(by_row(each, row, rows), none, width) for name, (each, none) in columns.items()},
        }
