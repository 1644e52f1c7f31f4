"""Rematerialisation: a layer whose activations are forgotten after the forward pass, and made again going backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

Tensor = Any


def check_remat(remat: str | None) -> None:
    """Refuses what `compile(remat=...)` does not take."""
    if remat not in (None, "block"):
        raise ValueError(f'remat is {remat!r}, but must be "block" or None.')


def recomputed(layer: keras.layers.Layer, /, *tensors: Tensor | None, **arguments: Any) -> Any:
    """Returns `layer(*tensors, **arguments)`, of which nothing but `tensors` is kept for the backward pass.

    The backward pass calls the layer a second time, from the values that all its variables had the first time. So it
    drops the same units, and what the layer changes (the state of a seed, a moving average) is changed once.

    Args:
        layer: built; it may not call `add_loss`.
        tensors: tensors and None, of which the floating ones get gradients.
        arguments: what has no gradient.

    Returns:
        The layer's outputs: a tensor, or a structure of tensors and None.

    Raises:
        ValueError: the layer called `add_loss`.

    Reference:
        Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 3. `tf.recompute_grad` does not do:
        it draws new random numbers, and merges what depends on them and on weights alone with the forward pass.
    """
    weights, states = layer.trainable_variables, layer.non_trainable_variables
    given = [None if tensor is None else tf.convert_to_tensor(tensor) for tensor in tensors]
    calls: list[tuple[Any, keras.StatelessScope]] = []

    def run(inputs: Iterable[Tensor], weight_values: Sequence[Tensor], state_values: Sequence[Tensor]) -> list[Tensor]:
        mapping = zip([*weights, *states], [*weight_values, *state_values], strict=True)
        inputs = iter(inputs)
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            outputs = layer(*(None if tensor is None else next(inputs) for tensor in given), **arguments)
        if scope.losses:
            raise ValueError(f"layer {layer.name!r} calls add_loss(), which is lost where it is recomputed.")
        calls.append((outputs, scope))
        return [output for output in keras.tree.flatten(outputs) if output is not None]

    @tf.custom_gradient
    def call(*values: Tensor) -> tuple[list[Tensor], Any]:
        num_inputs = len(values) - len(weights) - len(states)
        inputs, weight_values, state_values = _split(values, num_inputs, len(weights))

        def gradient(*upstream: Tensor) -> list[Tensor | None]:
            again = _after(upstream[0], inputs)
            sources = [value for value in (*again, *weight_values) if value.dtype.is_floating]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                outputs = run(again, weight_values, _after(upstream[0], state_values))
            found = tape.gradient(outputs, sources, list(upstream), unconnected_gradients="zero")
            # The layer before starts when all is done here; else activations of several would be alive at a time.
            with tf.control_dependencies(found):
                found = [tf.identity(each) for each in found]
            gradients = iter(found)
            return [next(gradients) if value.dtype.is_floating else None for value in (*inputs, *weight_values)] + [
                None for _ in states
            ]

        return run(inputs, weight_values, state_values), gradient

    present = [tensor for tensor in given if tensor is not None]
    before = [tf.convert_to_tensor(variable) for variable in (*weights, *states)]
    results = iter(call(*present, *before))
    outputs, scope = calls[0]
    for variable, value in zip(states, before[len(weights) :], strict=True):
        after = scope.get_current_value(variable)
        if after is not value:  # Frozen weights are among the states.
            variable.assign(after)
    return keras.tree.map_structure(lambda output: None if output is None else next(results), outputs)


def _split(values: Sequence[Tensor], *lengths: int) -> list[list[Tensor]]:
    """Parts of the given lengths, and the rest."""
    parts = []
    for length in lengths:
        parts.append(list(values[:length]))
        values = values[length:]
    return [*parts, list(values)]


def _after(upstream: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values, which no compiler can compute before `upstream`, nor take for what it has computed before.

    To each number is added min(|u|, 0), where u is one of `upstream`: 0, also if u is infinite.
    """
    one = tf.reduce_max(tf.reshape(upstream, [-1])[:1])  # Minus infinity where there is none.
    zero = tf.minimum(tf.abs(one), 0)
    return [tensor if tensor.dtype == tf.bool else tensor + tf.cast(zero, tensor.dtype) for tensor in tensors]
