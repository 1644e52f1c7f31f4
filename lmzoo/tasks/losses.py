"""Losses over few classes, unreduced and in float32."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Tensor = Any


def cross_entropy(labels: Tensor, logits: Tensor, weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy of each label.

    Where the weight is 0 the label is not looked at, so that it may be any number, such as -100.

    Shapes:
        labels [...] int, logits [..., C], weights [...]; returns [...] float32.
    """
    logits = tf.cast(logits, tf.float32)
    labels = tf.where(tf.equal(weights, 0.0), 0, tf.cast(labels, tf.int32))
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    if not label_smoothing:
        return losses
    evenly = tf.reduce_logsumexp(logits, axis=-1) - tf.reduce_mean(logits, axis=-1)
    return (1.0 - label_smoothing) * losses + label_smoothing * evenly


def correct(labels: Tensor, logits: Tensor) -> Tensor:
    """1 where the label has the highest score, else 0: [...] float32."""
    return tf.cast(tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), tf.cast(labels, tf.int32)), tf.float32)


def row_weights(weights: Tensor | None, rows: Tensor) -> Tensor:
    """Weights [B] float32; 1 for None, in the number of `rows` [B, ...]."""
    if weights is None:
        return tf.ones([tf.shape(rows)[0]])
    return tf.reshape(tf.cast(weights, tf.float32), [-1])
