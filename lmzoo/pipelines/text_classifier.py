"""Labels texts, or pairs of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.pipelines.base import EncoderPipeline, Outputs, Tensor, check_task
from lmzoo.tasks import SequenceClassificationModel


class TextClassifier(EncoderPipeline):
    """Says which label a text has, or a pair of texts.

    ```python
    classifier = TextClassifier.from_pretrained("my-classifier")
    classifier("What a film!")  # {"label": "positive", "score": 0.98, "scores": {"negative": 0.02, "positive": 0.98}}
    classifier(["A man sleeps.", "A dog runs."], ["Somebody sleeps.", "Nothing moves."])  # pairs
    ```

    A str gives a dict, a list of str a list of them: `label`, its `score`, and the `scores` of all labels. If a text
    may have several labels, `labels` are those whose score is at least the threshold. In regression, `scores` are the
    values, and `score` is the value if there is only one. A tf.string tensor gives the outputs of the graph.

    What is exported has the signatures

    - `serving_default`: text [B] -> scores [B, C], the names of their `labels` [B, C], and, if each text has one of
      them, its label [B] and score [B]; if it may have several, chosen [B, C] bool;
    - `pairs`: the same for text [B] and pair [B];
    - `tokens`: token_ids and token_type_ids [B, T] int32, padding_mask [B, T] bool -> logits [B, C] float32.

    Args:
        model: a classifier of texts.
        tokenizer: the one whose ids the model was trained on. It must have an in-graph twin.
        max_length: tokens of a text or a pair, special ones included; what is longer loses its end, the longer text of
            a pair first. None is the model's context length.
        threshold: the least score, from 0 to 1, of a label among several.

    Raises:
        ValueError: the model is no classifier, the tokenizer does not fit it, or an argument is outside its range.
    """

    def __init__(
        self,
        model: SequenceClassificationModel,
        tokenizer: Tokenizer,
        max_length: int | None = None,
        threshold: float = 0.5,
    ) -> None:
        check_task(self, model, SequenceClassificationModel)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold is {threshold!r}, but must be a score from 0 to 1.")
        self.threshold = threshold
        super().__init__(model, tokenizer, max_length)
        self._run_pairs = self._function("text", "pair")

    @classmethod
    def _load_model(cls, directory: Path, dtype: Any) -> Any:
        return SequenceClassificationModel.from_pretrained(directory, dtype=dtype)

    def __call__(self, text: Any, pair: Any = None, *, batch_size: int = 32) -> Any:
        """The label of each text, or of each pair of texts.

        Args:
            text: a str, an iterable of str, or a tf.string tensor [B].
            pair: the text that belongs to each of them; None for single texts.
            batch_size: texts of a list that go through the model at a time.

        Raises:
            TypeError: a text is not a str.
            ValueError: `text` and `pair` differ in number.
        """
        if pair is None:
            return self._call(self._run, {"text": text}, batch_size)
        return self._call(self._run_pairs, {"text": text, "pair": pair}, batch_size)

    def _result(self, row: dict[str, Any], texts: tuple[str, ...]) -> dict[str, Any]:
        labels = self.model.labels
        scores = dict(zip(labels, map(float, row["scores"]), strict=True))
        if self.model.problem == "single_label":
            return {"label": row["label"].decode(), "score": float(row["score"]), "scores": scores}
        if self.model.problem == "multi_label":
            chosen = [label for label, is_chosen in zip(labels, row["chosen"], strict=True) if is_chosen]
            return {"labels": chosen, "scores": scores}
        return {"score": scores[labels[0]], "scores": scores} if len(labels) == 1 else {"scores": scores}

    def _outputs(self, *texts: Tensor) -> Outputs:
        pair = texts[1] if len(texts) > 1 else None
        encodings = self._graph_tokenizer.encode_pairs(texts[0], pair, max_length=self.max_length)
        logits = self.model(self._batch(encodings.token_ids, encodings.token_type_ids), training=False)
        labels = tf.constant(self.model.labels)
        outputs = {"labels": tf.broadcast_to(labels, tf.shape(logits))}
        if self.model.problem == "single_label":
            scores = tf.nn.softmax(logits)
            outputs["label"] = tf.gather(labels, tf.argmax(scores, 1))
            outputs["score"] = tf.reduce_max(scores, 1)
        elif self.model.problem == "multi_label":
            scores = tf.sigmoid(logits)
            outputs["chosen"] = scores >= self.threshold
        else:
            scores = logits
        return {"scores": scores, **outputs}

    def _signatures(self) -> dict[str, Any]:
        return {**super()._signatures(), "pairs": self._run_pairs}
