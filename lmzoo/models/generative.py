"""Language models that write texts, one token after the other: what continues one, and what answers one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.generation import BeamOptions, BeamResult, BeamSearch, Decoder, SamplingOptions, StreamedTokens
from lmzoo.models.base import LanguageModel

Tensor = Any
Prompts = Any
Kept = tuple[Any, Callable[..., Any]]

# Texts are padded to a multiple of this, so that those of similar lengths share one compiled function.
TEXT_MULTIPLE = 32


class GenerativeLM(LanguageModel):
    """A language model whose output head scores the next token of a text, with a cache for what it has read.

    Beside what `LanguageModel` asks for, a subclass says how it reads prompts, in `_request`, `init_cache`,
    `decode_step` and `reorder_cache`.
    """

    @abstractmethod
    def init_cache(self, rows: Any, cache_length: Any) -> Any:
        """A cache for `cache_length` tokens; `rows` is the number of them, or the source that they answer."""

    @abstractmethod
    def decode_step(self, token_ids: Tensor, cache: Any, padding_mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Reads T more tokens a row and scores the next one: prefill with T of a prompt, decode with T = 1.

        Shapes:
            token_ids [B, T]; padding_mask [B, T] bool; returns logits [B, V] float32, and the cache.
        """

    @abstractmethod
    def reorder_cache(self, cache: Any, rows: Tensor) -> Any:
        """The cache with its row `rows[i]` in row i: for beams, which leave one another, but never their own prompt."""

    @abstractmethod
    def _request(self, token_ids: Prompts, max_new_tokens: int) -> tuple[Tensor, Tensor, Any]:
        """What is decoded from, checked: prompts padded on the right [B, P], their lengths [B], and the source."""

    def generate(
        self,
        token_ids: Prompts,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: Any = None,
        *,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        num_return_sequences: int = 1,
        **options: Any,
    ) -> Tensor:
        """Writes after each prompt, or an answer to each source, one token at a time in one compiled graph.

        Shapes:
            token_ids: texts [B, T], a ragged tensor or lists of different lengths, or a dict with `token_ids` and
            `padding_mask` (padding on either side). Returns [B * num_return_sequences, max_new_tokens] int32: new
            tokens only, padded after the end; several for one text follow one another, best first.

        Args:
            max_new_tokens: the most new tokens a row, >= 1.
            temperature, top_k, top_p: as in `SamplingOptions`; temperature 0 is greedy.
            seed: int for all rows, or one a row; None draws one. A row gives the same tokens alone or in a batch.
            num_beams: above 1, a beam search, which draws nothing; `beam_search` also gives the scores.
            length_penalty, early_stopping, num_return_sequences: as in `BeamOptions`.
            options: the other fields of `SamplingOptions`: min_p, repetition_penalty, stop_sequences and so on; for a
                beam search those of `BeamOptions` too.

        Raises:
            ValueError: an id outside the vocabulary, a text that is empty where the model has no end token to stand
                for it, one that leaves no room for `max_new_tokens` in the context, or an option out of its range.
        """
        if num_beams > 1:
            result = self.beam_search(
                token_ids,
                max_new_tokens,
                num_beams=num_beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                num_return_sequences=num_return_sequences,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                **options,
            )
            return tf.reshape(result.token_ids, [-1, max_new_tokens])
        BeamOptions(num_beams=num_beams, num_return_sequences=num_return_sequences)  # Knows the ranges.
        sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, **options)
        request = self._request(token_ids, max_new_tokens)
        _, run = self._kept_decoder(max_new_tokens, sampling)
        seeds = None if seed is None else tf.constant(np.asarray(seed, np.int64))
        return run(*request, seeds).token_ids

    def beam_search(
        self, token_ids: Prompts, max_new_tokens: int = 64, *, num_beams: int = 4, **options: Any
    ) -> BeamResult:
        """The most likely texts that a beam search finds, with their scores, in one compiled graph.

        Args:
            token_ids, max_new_tokens: as in `generate`.
            num_beams: how many texts are followed at a time.
            options: the other fields of `BeamOptions`, and the rules of `SamplingOptions`.

        Raises:
            ValueError: as `generate`.
        """
        names = BeamOptions.__dataclass_fields__
        beams = BeamOptions(num_beams=num_beams, **{name: options.pop(name) for name in list(options) if name in names})
        request = self._request(token_ids, max_new_tokens)
        _, run = self._kept_decoder(max_new_tokens, SamplingOptions(**options), beams)
        return run(*request)

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
        prompts, lengths, source = self._request(token_ids, max_new_tokens)
        decoder, _ = self._kept_decoder(max_new_tokens, sampling)
        return decoder.stream(prompts, lengths, seeds=seed, source=source)

    def decoder(self, max_new_tokens: int, options: SamplingOptions, **kwargs: Any) -> Decoder:
        """The decoding loop of this model, to be called inside a graph of one's own."""
        return Decoder(
            self.decode_step,
            self.init_cache,
            max_new_tokens=max_new_tokens,
            options=options,
            **self._end_and_padding(),
            **kwargs,
        )

    def beam_decoder(
        self, max_new_tokens: int, beams: BeamOptions, options: SamplingOptions | None = None
    ) -> BeamSearch:
        """The beam search of this model, to be called inside a graph of one's own."""
        return BeamSearch(
            self.decode_step,
            self.init_cache,
            self.reorder_cache,
            max_new_tokens=max_new_tokens,
            beams=beams,
            options=options,
            **self._end_and_padding(),
        )

    def _end_and_padding(self) -> dict[str, Any]:
        end, padding = self.config.eos_token_id, self.config.pad_token_id
        return {"eos_token_id": end, "pad_token_id": padding if padding is not None else end or 0}

    def _kept_decoder(self, max_new_tokens: int, options: SamplingOptions, beams: BeamOptions | None = None) -> Kept:
        """The loop for these settings and its compiled call; the last few are kept, as compiling takes seconds."""
        kept: dict[Any, Kept] = self.__dict__.setdefault("_kept_decoders", {})
        key = (max_new_tokens, options, beams)
        if key not in kept:
            if beams is None:
                decoder: Any = self.decoder(max_new_tokens, options)
            else:
                decoder = self.beam_decoder(max_new_tokens, beams, options)

            def run(prompts: Tensor, lengths: Tensor, source: Any, seeds: Tensor | None = None) -> Any:
                drawn = {} if beams else {"seeds": seeds}
                return decoder(prompts, lengths, source=source, **drawn)

            kept[key] = decoder, tf.function(run, autograph=False, reduce_retracing=True)
            if len(kept) > 8:
                kept.pop(next(iter(kept)))
        return kept[key]

    def _text_rows(self, token_ids: Prompts) -> list[np.ndarray]:
        """The real tokens of each text, which must be ids of the vocabulary; the end token stands for an empty one."""
        rows = _real_tokens(token_ids, self.config.vocab_size)
        start = self.config.eos_token_id
        if start is None and any(len(row) == 0 for row in rows):
            raise ValueError("a prompt is empty, and this model has no eos_token_id to start from: give it a token.")
        return [row if len(row) else np.array([start], np.int32) for row in rows]


def pad_rows(rows: list[np.ndarray], width: int) -> np.ndarray:
    """Rows of token ids as one array [B, width], with 0 on the right."""
    padded = np.zeros((len(rows), width), np.int32)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def _real_tokens(token_ids: Prompts, vocab_size: int) -> list[np.ndarray]:
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
