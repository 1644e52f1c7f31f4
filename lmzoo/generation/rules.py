"""What may come next and what ends a text, whatever is likely: the rules of `SamplingOptions`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from lmzoo.generation.sampling import SamplingOptions, column, is_on, vocab_size_of

Tensor = Any


def constrain(
    logits: Tensor,
    options: SamplingOptions,
    *,
    index: Tensor,
    eos_token_ids: Iterable[int] = (),
    history: Tensor | None = None,
    history_lengths: Tensor | None = None,
) -> Tensor:
    """Applies the rules that come before the temperature: what was said, what must not be, and what must not be yet.

    Shapes:
        logits [B, V] float32, index int32 scalar, history [B, S] int32, history_lengths [B] int32 -> [B, V] float32.

    Args:
        logits: the model's scores of the next token.
        options: the rules; those that are off add no operation.
        index: number of new tokens that the rows have already.
        eos_token_ids: the tokens that end a row, for `min_new_tokens`.
        history: prompt and new tokens of each row, from the left; needed where `options.needs_history`.
        history_lengths: how many entries of each row of `history` are tokens.
    """
    vocab_size = vocab_size_of(logits)
    if is_on(options.repetition_penalty, 1):
        penalty = column(options.repetition_penalty)
        if tf.is_tensor(options.repetition_penalty):
            penalty = tf.where(penalty > 0, penalty, 1.0)
        seen = _mark(history, _before(history, history_lengths), vocab_size)
        penalized = tf.where(logits < 0, logits * penalty, logits / penalty)
        logits = tf.where(seen, penalized, logits)

    forbidden = []
    if options.no_repeat_ngram_size is not None:
        forbidden.append(_ngram_ends(history, history_lengths, options.no_repeat_ngram_size, vocab_size))
    for length in sorted({len(word) for word in options.bad_words_ids}):
        words = [word for word in options.bad_words_ids if len(word) == length]
        forbidden.append(_word_ends(history, history_lengths, words, vocab_size))
    if options.suppressed_token_ids:
        forbidden.append(_is_any(vocab_size, options.suppressed_token_ids))
    eos_token_ids = tuple(eos_token_ids)
    if options.min_new_tokens > 0 and eos_token_ids:
        forbidden.append(_is_any(vocab_size, eos_token_ids) & (index < options.min_new_tokens))
    if forbidden:
        allowed = ~forbidden[0]
        for mask in forbidden[1:]:
            allowed &= ~mask
        allowed |= ~tf.reduce_any(allowed, axis=-1, keepdims=True)
        logits = tf.where(allowed, logits, float("-inf"))
    if options.forced_bos_token_id is not None:
        forced = tf.where(_is_any(vocab_size, (options.forced_bos_token_id,)), 0.0, float("-inf"))
        logits = tf.where(index == 0, forced, logits)
    return logits


def end_lengths(
    token_ids: Tensor, num_tokens: Tensor, options: SamplingOptions, eos_token_ids: Iterable[int] = ()
) -> Tensor:
    """How many of the last tokens of each row say that it ends here: [R] int32, 0 where it goes on.

    Shapes:
        token_ids [R, S] new tokens, num_tokens int32 scalar >= 1, how many of them there are.
    """
    token = tf.gather(token_ids, num_tokens - 1, axis=1)  # [R]
    lengths = tf.zeros_like(token)
    for eos_token_id in eos_token_ids:
        lengths = tf.where(token == eos_token_id, 1, lengths)
    may_stop = num_tokens > options.min_new_tokens
    for stop in options.stop_sequences:
        places = num_tokens - len(stop) + tf.range(len(stop))
        tail = tf.gather(token_ids, tf.maximum(places, 0), axis=1)  # [R, len(stop)]
        matches = tf.reduce_all(tail == tf.constant(stop, tf.int32), axis=-1)
        matches &= may_stop & (num_tokens >= len(stop))
        lengths = tf.where(matches, tf.maximum(lengths, len(stop)), lengths)
    return lengths


def _before(history: Tensor, lengths: Tensor) -> Tensor:
    """[B, S] bool, True for the first `lengths` entries of each row."""
    return tf.range(tf.shape(history)[1]) < tf.expand_dims(lengths, -1)


def _is_any(vocab_size: Any, token_ids: tuple[int, ...]) -> Tensor:
    """[1, V] bool, True for the tokens named."""
    named = tf.expand_dims(tf.range(vocab_size), -1) == tf.constant(token_ids, tf.int32)  # [V, tokens]
    return tf.expand_dims(tf.reduce_any(named, axis=-1), 0)


def _mark(token_ids: Tensor, mask: Tensor, vocab_size: Any) -> Tensor:
    """[B, V] bool, True for the tokens of each row of `token_ids` [B, S] where `mask` [B, S] is True."""
    mask &= (token_ids >= 0) & (token_ids < vocab_size)
    shape = tf.shape(token_ids)
    rows = tf.broadcast_to(tf.expand_dims(tf.range(shape[0]), -1), shape)  # [B, S]
    places = tf.stack([rows, tf.where(mask, token_ids, 0)], axis=-1)  # [B, S, 2]
    counts = tf.scatter_nd(places, tf.cast(mask, tf.int32), tf.stack([shape[0], vocab_size]))
    return counts > 0


def _ngram_ends(history: Tensor, lengths: Tensor, size: int, vocab_size: Any) -> Tensor:
    """[B, V] bool, True for the tokens that would give an n-gram of `size` tokens a second time."""
    num_starts = tf.maximum(tf.shape(history)[1] - (size - 1), 0)
    # An n-gram may start where its last token is one that the row has: the row's tail does not match itself.
    starts = tf.range(num_starts)  # [S - n + 1]
    matches = starts + (size - 1) < tf.expand_dims(lengths, -1)  # [B, S - n + 1]
    for offset in range(size - 1):
        place = tf.maximum(lengths - (size - 1) + offset, 0)
        tail = tf.gather(history, place, axis=1, batch_dims=1)  # [B]
        matches &= tf.gather(history, starts + offset, axis=1) == tf.expand_dims(tail, -1)
    return _mark(tf.gather(history, starts + (size - 1), axis=1), matches, vocab_size)


def _word_ends(history: Tensor, lengths: Tensor, words: Sequence[tuple[int, ...]], vocab_size: int) -> Tensor:
    """[B, V] bool, True for the tokens that would end one of `words`, which are equally long."""
    ends = tuple(word[-1] for word in words)
    size = len(words[0]) - 1
    if not size:
        return _is_any(vocab_size, ends)
    places = tf.maximum(tf.expand_dims(lengths - size, -1) + tf.range(size), 0)  # [B, size]
    tail = tf.expand_dims(tf.gather(history, places, axis=1, batch_dims=1), 1)  # [B, 1, size]
    begun = tf.reduce_all(tail == tf.constant([word[:-1] for word in words], tf.int32), axis=-1)  # [B, words]
    begun &= tf.expand_dims(lengths >= size, -1)
    return _mark(tf.broadcast_to(tf.constant([ends], tf.int32), tf.shape(begun)), begun, vocab_size)
