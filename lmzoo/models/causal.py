"""Language models that write text from left to right, one token after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.generation.decode import Decoder, StreamedTokens
from lmzoo.generation.sampling import SamplingOptions
from lmzoo.layers import KeyValueCache
from lmzoo.models.base import LanguageModel

Tensor = Any
Prompts = Any

# Prompts are padded to a multiple of this, so that prompts of similar lengths share one compiled function.
_PROMPT_MULTIPLE = 32


class CausalLM(LanguageModel):
    """A language model in which a token sees those before it only, so that it can continue a text.

    Beside what `LanguageModel` asks for, a subclass reads and fills a cache in `features`, and makes one in
    `init_cache`.
    """

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
    def init_cache(self, batch_size: Any, cache_length: Any) -> KeyValueCache:
        """An empty cache for `batch_size` rows of `cache_length` tokens; either may be a scalar tensor."""

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

    def generate(
        self,
        token_ids: Prompts,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: Any = None,
        **options: Any,
    ) -> Tensor:
        """Continues prompts, one token at a time from a cache, in one compiled graph.

        Shapes:
            token_ids: prompts [B, T], a ragged tensor or lists of different lengths, or a dict with `token_ids` and
            `padding_mask` (padding on either side). Returns [B, max_new_tokens] int32: new tokens only, padded after
            the end.

        Args:
            max_new_tokens: the most new tokens a row, >= 1.
            temperature, top_k, top_p: as in `SamplingOptions`; temperature 0 is greedy.
            seed: int for all rows, or one a row; None draws one. A row gives the same tokens alone or in a batch.
            options: the other fields of `SamplingOptions`: min_p, repetition_penalty, stop_sequences and so on.

        Raises:
            ValueError: an id outside the vocabulary, an empty prompt where the model has no end token to start from,
                or a prompt that leaves no room for `max_new_tokens` in the context.
        """
        sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, **options)
        prompts, lengths = self.pad_prompts(token_ids, max_new_tokens)
        _, run = self._kept_decoder(max_new_tokens, sampling)
        seeds = None if seed is None else tf.constant(np.asarray(seed, np.int64))
        return run(tf.constant(prompts), tf.constant(lengths), seeds)

    def stream(
        self,
        token_ids: Prompts,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: Any = None,
        **options: Any,
    ) -> Iterator[StreamedTokens]:
        """Yields the tokens of `generate` with the same arguments, one a row at a time (`StreamedTokens`)."""
        sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, **options)
        prompts, lengths = self.pad_prompts(token_ids, max_new_tokens)
        decoder, _ = self._kept_decoder(max_new_tokens, sampling)
        return decoder.stream(prompts, lengths, seeds=seed)

    def decoder(self, max_new_tokens: int, options: SamplingOptions, **kwargs: Any) -> Decoder:
        """The decoding loop of this model, to be called inside a graph of one's own."""
        eos_token_id, pad_token_id = self.config.eos_token_id, self.config.pad_token_id
        return Decoder(
            self.decode_step,
            self.init_cache,
            max_new_tokens=max_new_tokens,
            options=options,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id if pad_token_id is not None else eos_token_id or 0,
            **kwargs,
        )

    def pad_prompts(self, token_ids: Prompts, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts of any form as rows padded on the right [B, P], and their lengths [B]; checks that they fit."""
        rows = _prompt_rows(token_ids, self.config.vocab_size)
        start = self.config.eos_token_id
        if start is None and any(len(row) == 0 for row in rows):
            raise ValueError("a prompt is empty, and this model has no eos_token_id to start from: give it a token.")
        rows = [row if len(row) else np.array([start], np.int32) for row in rows]
        lengths = np.array([len(row) for row in rows], np.int32)
        longest, context = int(lengths.max(initial=1)), self.config.context_length
        if longest + max_new_tokens > context:
            raise ValueError(
                f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but together they "
                f"may be {context} at most (context_length). Shorten the prompt or ask for fewer tokens."
            )
        width = min(-(-longest // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE, context - max_new_tokens)
        padded = np.zeros((len(rows), width), np.int32)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = row
        return padded, lengths

    def _kept_decoder(self, max_new_tokens: int, options: SamplingOptions) -> tuple[Decoder, Any]:
        """The loop for these settings and its compiled call; the last few are kept, as compiling takes seconds."""
        kept: dict[Any, tuple[Decoder, Any]] = self.__dict__.setdefault("_kept_decoders", {})
        key = (max_new_tokens, options)
        if key not in kept:
            decoder = self.decoder(max_new_tokens, options)

            def run(prompts: Tensor, lengths: Tensor, seed: Tensor | None) -> Tensor:
                return decoder(prompts, lengths, seeds=seed).token_ids

            kept[key] = decoder, tf.function(run, autograph=False, reduce_retracing=True)
            if len(kept) > 8:
                kept.pop(next(iter(kept)))
        return kept[key]


def _prompt_rows(token_ids: Prompts, vocab_size: int) -> list[np.ndarray]:
    """The real tokens of each prompt, which must be ids of the vocabulary."""
    mask = None
    if isinstance(token_ids, Mapping):
        mask = token_ids.get("padding_mask")
        token_ids = token_ids["token_ids"]
    if isinstance(token_ids, tf.RaggedTensor):
        token_ids = token_ids.to_list()
    rows = [np.asarray(row) for row in (token_ids if isinstance(token_ids, (list, tuple)) else np.asarray(token_ids))]
    if any(row.ndim != 1 for row in rows):
        raise ValueError("prompts must be rows of token ids [B, T]; for one prompt, give a list that holds it.")
    if mask is not None:
        rows = [row[np.asarray(keep, bool)] for row, keep in zip(rows, np.asarray(mask), strict=True)]
    for row in rows:
        if row.size and not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"token ids must be integers, but a prompt is of type {row.dtype}.")
        if row.size and not 0 <= row.min() <= row.max() < vocab_size:
            raise ValueError(f"token ids must lie in [0, {vocab_size}), but a prompt has {row.min()} to {row.max()}.")
    return rows
