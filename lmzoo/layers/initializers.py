"""Initial weights that Keras has no name for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

Tensor = Any


@keras.saving.register_keras_serializable("lmzoo")
class SideBySideNormal(keras.initializers.Initializer):
    """Normal numbers for a kernel of several projections side by side, each with a standard deviation of its own.

    Args:
        stddevs: one a projection; the projections share the last axis evenly.
    """

    def __init__(self, stddevs: Sequence[float]) -> None:
        self.stddevs = tuple(stddevs)

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Tensor:
        """The numbers for a kernel of `shape`."""
        part = (*shape[:-1], shape[-1] // len(self.stddevs))
        kernels = [keras.initializers.RandomNormal(stddev=stddev)(part, dtype) for stddev in self.stddevs]
        return ops.concatenate(kernels, axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {"stddevs": self.stddevs}
