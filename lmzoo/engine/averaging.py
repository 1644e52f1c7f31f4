"""Running averages of the weights, as a Keras optimizer with `use_ema=True` keeps them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from lmzoo.engine.update import innermost


def swap_averages(optimizer: keras.optimizers.Optimizer) -> None:
    """Exchanges the weights and their averages; nothing happens if none are kept, or no step has been made."""
    optimizer = innermost(optimizer)
    if not optimizer.use_ema or int(keras.ops.convert_to_numpy(optimizer.iterations)) == 0:
        return
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(optimizer._trainable_variables, averages, strict=True):
        weight = keras.ops.convert_to_numpy(variable)
        variable.assign(keras.ops.convert_to_numpy(average))
        average.assign(weight)


@contextlib.contextmanager
def averaged_weights(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Inside, the weights are their averages (if there are any), and the averages hold the weights."""
    swap_averages(optimizer)
    try:
        yield
    finally:
        swap_averages(optimizer)
