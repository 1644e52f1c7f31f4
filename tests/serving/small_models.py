"""SavedModels with a few operations, exported in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf

from lmzoo.export import write_saved_model


class Small(tf.Module):
    """Adds a number, and shows each type that a tensor of a request may have."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = tf.Variable(number)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def add(self, x: Any) -> dict[str, Any]:
        return {"y": x + self.number}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, "text"),
            tf.TensorSpec([None, 2], tf.int32, "pair"),
            tf.TensorSpec([], tf.int64, "big"),
            tf.TensorSpec([None], tf.bool, "truth"),
            tf.TensorSpec(None, tf.float64, "any_shape"),
        ]
    )
    def mixed(self, text: Any, pair: Any, big: Any, truth: Any, any_shape: Any) -> dict[str, Any]:
        return {"raw_bytes": text, "pair": pair, "big": big, "truth": truth, "any_shape": any_shape}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int32)])
    def repeat(self, text: Any, times: Any = tf.constant([2])) -> dict[str, Any]:  # noqa: B008
        return {"text": tf.strings.reduce_join(tf.repeat(text[:, None], times[0], axis=1), axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "steps")])
    def slow(self, steps: Any) -> dict[str, Any]:
        count = tf.while_loop(lambda n: n < steps[0], lambda n: [n + 1], [tf.constant(0)])
        return {"count": tf.reshape(count, [1])}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "index")])
    def pick(self, index: Any) -> dict[str, Any]:
        return {"picked": tf.gather([1.5, float("nan"), float("inf")], index)}


def export_small(directory: Path, number: float = 1.0, version: int | None = None) -> Path:
    module = Small(number)
    names = ("mixed", "repeat", "slow", "pick")
    signatures = {"serving_default": module.add, **{name: getattr(module, name) for name in names}}
    return write_saved_model(directory, module, signatures, version=version)
