"""Running means of sums that are already global, so that every replica and every worker holds the same value."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("lmzoo")
class GlobalMean(keras.metrics.Mean):
    """Mean of all values since the last reset, from (sum of weighted values, sum of weights) pairs.

    A Keras metric keeps one part of its state on each replica and adds the parts up on every read, which under
    several workers is a collective a variable. The pairs that the engine hands over are summed over all replicas
    already (in the gradients' own all-reduce), so the state here is mirrored, and reading it costs nothing.

    The mean of nothing is NaN, and not the 0 of `keras.metrics.Mean`: no callback may take it for the best loss.
    """

    def add_variable(
        self,
        shape: Any,
        initializer: Any,
        dtype: Any = None,
        aggregation: str = "none",
        name: str | None = None,
    ) -> keras.Variable:
        """Creates a piece of state that each replica keeps, the same on all."""
        return keras.Variable(initializer, shape=shape, dtype=dtype, trainable=False, aggregation="none", name=name)

    def add_sums(self, value_sum: tf.Tensor, weight_sum: tf.Tensor) -> None:
        """Adds the sums of one step.

        Args:
            value_sum: scalar, sum of the weighted values over all replicas.
            weight_sum: scalar, sum of their weights over all replicas.
        """
        self.total.assign_add(tf.cast(value_sum, self.dtype))
        self.count.assign_add(tf.cast(weight_sum, self.dtype))

    def result(self) -> tf.Tensor:
        """Returns the mean: a scalar, NaN if the weights since the last reset add up to 0."""
        return self.total / self.count


@keras.saving.register_keras_serializable("lmzoo")
class Perplexity(GlobalMean):
    """Exponential of the mean loss over all weighted tokens since the last reset (not a mean of perplexities)."""

    def __init__(self, name: str = "perplexity", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def result(self) -> tf.Tensor:
        """Returns exp(mean loss), a scalar."""
        return tf.exp(super().result())
