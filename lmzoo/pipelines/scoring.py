"""How likely a model finds a given text."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from lmzoo.models import GenerativeLM

Tensor = Any


class Continuations(NamedTuple):
    """What is scored.

    Attributes:
        inputs: of the model, U places in each row.
        labels: [B, U] int32, the token that follows each of them.
        counted: [B, U] bool, which of these are scored.
    """

    inputs: Any
    labels: Tensor
    counted: Tensor


def score(model: GenerativeLM, continuations: Continuations) -> dict[str, Tensor]:
    """Log-likelihood [B] float32, number of tokens [B] int32, and whether each is the most likely one, [B] bool."""
    inputs, labels, counted = continuations
    places = tf.where(counted)  # [N, 2]
    rows, row = tf.shape(labels)[0], places[:, 0]
    # Of the vocabulary, only where it counts: a text may be long and its continuation a word.
    logits = model.logits(tf.gather_nd(model.features(inputs, training=False), places))  # [N, V]
    tokens = tf.gather_nd(labels, places)
    log_probs = tf.gather(logits, tokens, axis=1, batch_dims=1) - tf.reduce_logsumexp(logits, axis=1)
    missed = tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) != tokens, tf.int32)
    return {
        "log_likelihood": tf.math.unsorted_segment_sum(log_probs, row, rows),
        "num_tokens": tf.reduce_sum(tf.cast(counted, tf.int32), axis=1),
        "is_greedy": tf.math.unsorted_segment_sum(missed, row, rows) == 0,
    }


def shifted(token_ids: Any, lengths: Tensor, first: Tensor, context_length: int, start_token_id: int) -> Continuations:
    """Rows of tokens as inputs and labels, of which those count that come after the first few.

    A row that counts from its first token on gets the start token before it. What does not fit the context loses its
    beginning.

    Args:
        token_ids: [B, T] int32, padded on the right.
        lengths: [B] int32, real tokens of each row.
        first: [B] int32, the tokens before the first that counts.
        context_length: the most inputs.
        start_token_id: what stands before a row that has nothing else there.
    """
    start = tf.fill([tf.shape(token_ids)[0], 1], start_token_id)
    token_ids = tf.concat([start, token_ids], axis=1)  # [B, 1 + T]
    begin = tf.maximum(tf.cast(first > 0, tf.int32), lengths - context_length)  # [B]
    width = tf.maximum(tf.reduce_max(tf.concat([lengths - begin, [1]], 0)), 1)
    places = tf.expand_dims(begin, 1) + tf.range(width + 1)  # [B, U + 1]
    row = tf.gather(token_ids, tf.minimum(places, tf.shape(token_ids)[1] - 1), axis=1, batch_dims=1)
    last, ends = places[:, 1:], tf.expand_dims(lengths, 1)
    # A token's place is one more than its number, because of the start.
    counted = (last > tf.expand_dims(first, 1)) & (last <= ends)
    return Continuations({"token_ids": row[:, :-1], "padding_mask": places[:, :-1] <= ends}, row[:, 1:], counted)
