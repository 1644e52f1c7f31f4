"""Language models that write text from left to right, one token after the other."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.layers import KeyValueCache
from lmzoo.models.generative import TEXT_MULTIPLE, GenerativeLM, Prompts, pad_rows

Tensor = Any


class CausalLM(GenerativeLM):
    """A language model in which a token sees those before it only, so that it can continue a text.

    Beside what `LanguageModel` asks for, a subclass reads and fills a cache in `features`, and makes one in
    `init_cache`.
    """

    @classmethod
    def pretraining_objectives(cls, config: Any) -> tuple[str, ...]:
        """To predict the next token."""
        return ("causal",)

    @abstractmethod
    def features(
        self, inputs: Any, training: bool | None = None, cache: KeyValueCache | None = None
    ) -> Tensor | tuple[Tensor, KeyValueCache]:
        """Final hidden states, before the output head.

        Shapes:
            inputs: token ids [B, T] or a dict of the batch contract; returns [B, T, D] in the compute dtype, and with
            a `cache` the updated cache too.
        """

    @abstractmethod
    def init_cache(self, rows: Any, cache_length: Any) -> KeyValueCache:
        """An empty cache for `rows` rows of `cache_length` tokens; either may be a scalar tensor."""

    def decode_step(
        self, token_ids: Tensor, cache: KeyValueCache, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """Reads T more tokens a row and scores the next one: prefill with T of a prompt, decode with T = 1.

        Shapes:
            token_ids [B, T]; padding_mask [B, T] bool, True on the left part of each row; returns logits [B, V]
            float32 at the last real token of each row, and the cache.
        """
        inputs = {"token_ids": token_ids}
        if padding_mask is not None:
            inputs["padding_mask"] = padding_mask
        hidden, cache = self.features(inputs, training=False, cache=cache)
        if token_ids.shape[1] == 1 or padding_mask is None:
            last = hidden[:, -1]  # [B, D]
        else:
            lengths = tf.reduce_sum(tf.cast(padding_mask, tf.int32), axis=1)
            last = tf.gather(hidden, tf.maximum(lengths - 1, 0), axis=1, batch_dims=1)  # [B, D]
        return self.logits(last), cache

    def reorder_cache(self, cache: KeyValueCache, rows: Tensor) -> KeyValueCache:
        """The cache with its row `rows[i]` in row i."""
        return cache.take(rows)

    def pad_prompts(self, token_ids: Prompts, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts of any form as rows padded on the right [B, P], and their lengths [B]; checks that they fit."""
        rows = self._text_rows(token_ids)
        lengths = np.array([len(row) for row in rows], np.int32)
        longest, context = int(lengths.max(initial=1)), self.config.context_length
        if longest + max_new_tokens > context:
            raise ValueError(
                f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but together they "
                f"may be {context} at most (context_length). Shorten the prompt or ask for fewer tokens."
            )
        width = min(-(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE, context - max_new_tokens)
        return pad_rows(rows, width), lengths

    def _request(self, token_ids: Prompts, max_new_tokens: int) -> tuple[Tensor, Tensor, Any]:
        prompts, lengths = self.pad_prompts(token_ids, max_new_tokens)
        return tf.constant(prompts), tf.constant(lengths), None
