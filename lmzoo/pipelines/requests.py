"""What a call or a request may ask of a pipeline that writes texts: inputs of its graph, with defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.generation import SamplingOptions

Tensor = Any

# What the sampling options of a request are in the graph.
_DTYPES = {
    "temperature": tf.float32,
    "top_k": tf.int32,
    "top_p": tf.float32,
    "min_p": tf.float32,
    "repetition_penalty": tf.float32,
}


class RequestInputs:
    """The optional inputs of a graph that writes texts: a seed, a limit, and the sampling options that are on.

    Args:
        options: those of the pipeline.
        max_new_tokens: the most that a request may ask for.
        seed: of requests that give none; None draws one.

    Attributes:
        defaults: name -> a tensor [1].
        options: as given.
    """

    def __init__(self, options: SamplingOptions, max_new_tokens: int, seed: int | None) -> None:
        self.options = options
        self._max_new_tokens = max_new_tokens
        self.defaults = {
            "seed": tf.constant([-1] if seed is None else checked_seeds(seed), tf.int64),
            "max_new_tokens": tf.constant([max_new_tokens], tf.int32),
        }
        for name, dtype in _DTYPES.items():
            value = getattr(options, name)
            # A greedy graph draws nothing, so there is nothing to temper or to filter.
            if value is not None and (name == "repetition_penalty" or not options.is_greedy):
                self.defaults[name] = tf.constant([value], dtype)

    def tensors(self, rows: int | None, values: dict[str, Any]) -> dict[str, Tensor]:
        """The inputs that a call gives, checked, as tensors [1] or [B]; None is left out.

        Raises:
            TypeError: there is no such option.
            ValueError: it is not on, its value is out of range, or there are neither one nor `rows` values.
        """
        request = {}
        for name, value in values.items():
            if value is None:
                continue
            if name not in self.defaults:
                known = ", ".join(self.defaults)
                if name not in _DTYPES:
                    raise TypeError(f"a call has no option {name!r}. This pipeline takes: {known}.")
                raise ValueError(
                    f"{name} is {value!r}, but this pipeline was made without it: make it with a value for {name} "
                    f"(and a temperature above 0, if it is not a penalty). It takes: {known}."
                )
            dtype = self.defaults[name].dtype
            if tf.is_tensor(value):
                request[name] = tf.reshape(tf.cast(value, dtype), [-1])
            else:
                request[name] = tf.constant(self._checked(name, value), dtype)
            size = request[name].shape[0]
            if None not in (size, rows) and size not in (1, rows):
                raise ValueError(f"{name} has {size} values for {rows} texts: give one, or one a text.")
        return request

    def _checked(self, name: str, value: Any) -> list[Any]:
        if name == "seed":
            return checked_seeds(value)
        values = np.ravel(value).tolist()
        for number in values:
            if name != "max_new_tokens":
                dataclasses.replace(self.options, **{name: number})  # Knows the ranges.
            elif not isinstance(number, int) or not 1 <= number <= self._max_new_tokens:
                raise ValueError(f"max_new_tokens is {number!r}, but this pipeline gives 1 to {self._max_new_tokens}.")
        return values


def drawn(seeds: Tensor) -> Tensor:
    """Seeds [B], with new ones for those below 0."""
    return tf.where(seeds < 0, tf.random.uniform(tf.shape(seeds), maxval=tf.int64.max, dtype=tf.int64), seeds)


def checked_seeds(seeds: Any) -> list[int]:
    """Seeds as a list.

    Raises:
        ValueError: one is no integer from 0 to 2**63 - 1.
    """
    values = np.ravel(seeds).tolist()
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise ValueError(f"seed is {value!r}, but must be an integer from 0 to 2**63 - 1, or None to draw one.")
    return values
