"""Fills in masked tokens."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import MaskedLM
from lmzoo.pipelines.base import EncoderPipeline, Outputs, Tensor, by_row, padded
from lmzoo.pipelines.token_texts import token_texts


class MaskFiller(EncoderPipeline):
    """Says which tokens may stand where a text has a mask token.

    ```python
    filler = MaskFiller.from_pretrained("my-bert")
    filler("Paris is the [MASK] of France.")[0]
    # {"token": "capital", "score": 0.99, "text": "Paris is the capital of France."}
    ```

    A str gives the most likely tokens, best first, each with its probability and the text that it makes of the given
    one. With several masks it gives such a list for each, and the other masks stay in `text`. A list of str gives a
    list. A tf.string tensor gives the outputs of the graph.

    What is exported has the signatures

    - `serving_default`: text [B] -> count [B] int32, the masks of each text; token, score and text [B, M, K] for each
      mask, "" and -1 where a text has fewer;
    - `tokens`: token_ids and token_type_ids [B, T] int32, padding_mask [B, T] bool -> logits [B, T, V] float32.

    Args:
        model: an encoder with its masked-LM head.
        tokenizer: the one whose ids the model was trained on. It must have a mask token and an in-graph twin.
        top_k: K, the number of tokens for each mask, from 1 to the size of the vocabulary.
        max_length: tokens of a text, special ones included; what is longer loses its end. None is the model's context
            length.

    Raises:
        ValueError: the model has no masked-LM head, the tokenizer does not fit it or has no mask token, or an argument
            is outside its range.
    """

    def __init__(self, model: MaskedLM, tokenizer: Tokenizer, top_k: int = 5, max_length: int | None = None) -> None:
        if not isinstance(model, MaskedLM) or not model.output_head:
            raise ValueError(
                f"this {type(model).__name__} has no masked-LM head: MaskFiller needs an encoder that was trained to "
                "fill in masks."
            )
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "the tokenizer has no mask token: MaskFiller needs the one that the model was trained with."
            )
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= tokenizer.vocab_size:
            raise ValueError(f"top_k is {top_k!r}, but must be an integer from 1 to {tokenizer.vocab_size}.")
        self.top_k = top_k
        self._mask_token_id = tokenizer.mask_token_id
        self._is_wordpiece = tokenizer.kind == "wordpiece"
        texts = token_texts(tokenizer)
        self._alone, self._inside = tf.constant(texts.alone), tf.constant(texts.inside)
        super().__init__(model, tokenizer, max_length)

    def __call__(self, text: Any, *, batch_size: int = 32) -> Any:
        """The tokens for each mask of a text.

        Args:
            text: a str, an iterable of str, or a tf.string tensor [B].
            batch_size: texts of a list that go through the model at a time.

        Raises:
            TypeError: a text is not a str.
            ValueError: a text has no mask token in its first `max_length` tokens.
        """
        return self._call(self._run, {"text": text}, batch_size)

    def _sample_text(self, num_words: int) -> str:
        return f"{self.tokenizer.id_to_token(self._mask_token_id)} {super()._sample_text(num_words)}"

    def _result(self, row: dict[str, Any], texts: tuple[str, ...]) -> Any:
        count = row.pop("count")
        if not count:
            mask = self.tokenizer.id_to_token(self._mask_token_id)
            raise ValueError(f"{texts[0]!r} has no {mask} in its first {self.max_length} tokens.")
        filled = [
            [
                {"token": token.decode(), "score": float(score), "text": text.decode()}
                for token, score, text in zip(*(row[name][place] for name in ("token", "score", "text")), strict=True)
            ]
            for place in range(count)
        ]
        return filled[0] if count == 1 else filled

    def _outputs(self, *texts: Tensor) -> Outputs:
        (text,) = texts
        encodings = self._graph_tokenizer.encode_pairs(text, max_length=self.max_length)
        batch = self._batch(encodings.token_ids, encodings.token_type_ids)
        masks = tf.where((batch["token_ids"] == self._mask_token_id) & batch["padding_mask"])  # [N, 2]
        row, rows = masks[:, 0], tf.size(text, tf.int64)
        places = by_row(tf.cast(masks[:, 1], tf.int32), row, rows)
        width = tf.maximum(places.bounding_shape(axis=1), 1)
        logits = self.model({**batch, "mask_positions": padded(places, 0, width)}, training=False)
        # A model may have more embeddings than there are tokens.
        logits = tf.boolean_mask(
            logits[..., : self.tokenizer.vocab_size], tf.sequence_mask(places.row_lengths(), width)
        )
        scores, token_ids = tf.math.top_k(tf.nn.softmax(logits), self.top_k)  # [N, K]
        with tf.device("CPU:0"):
            spans = tf.gather_nd(encodings.offsets.to_tensor(), masks)
            filled = self._filled(tf.gather(text, row), spans, tf.gather(self._inside, token_ids))
            columns = {"token": (tf.gather(self._alone, token_ids), ""), "score": (scores, -1.0), "text": (filled, "")}
            return {
                "count": tf.cast(places.row_lengths(), tf.int32),
                **{name: padded(by_row(each, row, rows), none, width) for name, (each, none) in columns.items()},
            }

    def _filled(self, text: Tensor, spans: Tensor, tokens: Tensor) -> Tensor:
        """Texts [N] with tokens [N, K] in the place of the characters [start, end) of `spans` [N, 2]."""
        start, end = spans[:, 0], spans[:, 1]
        before = tf.strings.substr(text, tf.zeros_like(start), start, unit="UTF8_CHAR")
        size = tf.strings.length(text, "UTF8_CHAR")
        after = tf.strings.substr(text, end, size - end, unit="UTF8_CHAR")
        spaced = tf.strings.substr(tokens, 0, 1) == " "
        bare = tf.strings.regex_replace(tokens, "^ ", "", replace_global=False)
        if self._is_wordpiece:
            # What continues a word, or is written without a space before it, ends the space before the mask.
            joined = tf.strings.regex_replace(before, r"\s+\z", "", replace_global=False)
            return tf.strings.join([tf.where(spaced, before[:, None], joined[:, None]), bare, _beside(after, tokens)])
        # A mask token that takes the space before it along leaves it to the token.
        needless = tf.strings.regex_full_match(before, r"(?s)(.*\s)?")
        tokens = tf.where(needless[:, None], bare, tokens)
        return tf.strings.join([_beside(before, tokens), tokens, _beside(after, tokens)])


def _beside(column: Tensor, table: Tensor) -> Tensor:
    return tf.broadcast_to(column[:, None], tf.shape(table))
