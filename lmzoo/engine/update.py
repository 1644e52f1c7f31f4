"""One optimizer step from gradients that are already summed over all replicas; called inside each replica.

Keras's `optimizer.apply` clips before it reduces, reduces by itself, and enters a cross-replica context on the way,
which no replica may do inside a conditional. The functions here use the part of an optimizer that holds the
algorithm (`build`, `update_step`, its settings and its variables), and put the order right: reduce, check, clip,
apply, all in the replica. Every replica does the same arithmetic on the same gradients, so its copies of the
variables stay equal to the others' without a second message.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf
from keras.optimizers import Optimizer

# A scale below this one cannot save a gradient that overflows, and must not reach 0, where nothing comes back.
SMALLEST_LOSS_SCALE = 2.0**-14


def innermost(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer that updates the weights: the one inside a `LossScaleOptimizer`, or itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def loss_scale(optimizer: Optimizer) -> tf.Tensor | float | None:
    """Returns what to multiply the loss by before float16 gradients are taken; None if nothing."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tf.convert_to_tensor(optimizer.dynamic_scale)
    return optimizer.loss_scale_factor


def update_loss_scale(optimizer: Optimizer, finite: tf.Tensor) -> None:
    """Halves a dynamic loss scale after gradients that are not finite, doubles it after enough finite ones in a row.

    Args:
        optimizer: nothing happens unless it is a `LossScaleOptimizer`.
        finite: bool scalar, over the gradients of all replicas.
    """
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return
    scale, counter = optimizer.dynamic_scale, optimizer.step_counter
    grow = finite & tf.equal(tf.convert_to_tensor(counter), optimizer.dynamic_growth_steps - 1)
    factor = tf.where(finite, tf.where(grow, 2.0, 1.0), 0.5)
    steps = tf.convert_to_tensor(counter)
    scale.assign(tf.maximum(tf.convert_to_tensor(scale) * factor, SMALLEST_LOSS_SCALE))
    counter.assign(tf.where(finite & ~grow, steps + 1, tf.zeros_like(steps)))


def connected(
    variables: Sequence[keras.Variable],
    gradients: Sequence[tf.Tensor | None],
    idle: Sequence[keras.Variable] = (),
) -> tuple[list[keras.Variable], list[tf.Tensor]]:
    """Leaves out the variables that the loss does not depend on, with a warning, as Keras does, unless all are `idle`.

    Raises:
        ValueError: it depends on none of them.
    """
    pairs = [pair for pair in zip(variables, gradients, strict=True) if pair[1] is not None]
    if not pairs:
        raise ValueError("the loss does not depend on any trainable weight, so there is no gradient to apply.")
    if len(pairs) < len(variables):
        expected = {id(variable) for variable in idle}
        without = [
            variable.path
            for variable, gradient in zip(variables, gradients, strict=True)
            if gradient is None and id(variable) not in expected
        ]
        if without:
            warnings.warn(f"the loss does not depend on {', '.join(without)}: left as they are.", stacklevel=2)
    return [variable for variable, _ in pairs], [gradient for _, gradient in pairs]


def apply_if(
    optimizer: Optimizer,
    condition: tf.Tensor,
    make_gradients: Callable[[], Sequence[tf.Tensor]],
    variables: Sequence[keras.Variable],
) -> None:
    """Applies gradients where `condition` holds, and changes no variable where it does not.

    Args:
        optimizer: built; not a `LossScaleOptimizer`.
        condition: bool scalar, the same on every replica.
        make_gradients: returns the gradients to apply, one a variable; called where the condition holds.
        variables: the variables that have a gradient.
    """
    if not _is_composed(optimizer):
        _apply_and_put_back(optimizer, condition, make_gradients(), variables)
        return

    def apply() -> tf.Tensor:
        _apply(optimizer, make_gradients(), variables)
        return tf.constant(True)

    tf.cond(condition, apply, lambda: tf.constant(False))
    count_iteration(optimizer, condition)


def count_iteration(optimizer: Optimizer, condition: tf.Tensor) -> None:
    """Moves the optimizer's own step counter on where `condition` holds."""
    counter = optimizer._iterations
    counter.assign_add(tf.cast(condition, counter.dtype))


class Accumulation:
    """Sums of the steps before this one, for an optimizer with `gradient_accumulation_steps=N`.

    Keras averages the means of N batches. Here the sums and the weights of N batches add up, so that an update is the
    mean over all their examples. The sums are those over all replicas, in the optimizer's own accumulators.

    Args:
        optimizer: built; not a `LossScaleOptimizer`.
        variables: the variables that have a gradient.
        weight: mirrored scalar, sum of the weights so far.
    """

    def __init__(self, optimizer: Optimizer, variables: Sequence[keras.Variable], weight: tf.Variable) -> None:
        self._optimizer, self._weight = optimizer, weight
        self._sums: list[keras.Variable] = []
        self.due = tf.constant(True)
        steps = optimizer.gradient_accumulation_steps
        if steps:
            if not _is_composed(optimizer):
                raise ValueError(
                    f"gradient_accumulation_steps does not work with {type(optimizer).__name__}. "
                    "Use compile(micro_batches=...)."
                )
            self.due = tf.equal((tf.convert_to_tensor(optimizer._iterations) + 1) % steps, 0)
            self._sums = [optimizer._accumulated_gradients[optimizer._get_variable_index(each)] for each in variables]

    def add(self, gradients: Sequence[tf.Tensor], weight: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Returns the sums of gradients and of weights over the steps so far and this one."""
        if not self._sums:
            return list(gradients), weight
        totals = [g + tf.cast(total, g.dtype) for g, total in zip(gradients, self._sums, strict=True)]
        return totals, weight + self._weight

    def keep(self, totals: Sequence[tf.Tensor], weight: tf.Tensor, finite: tf.Tensor, applied: tf.Tensor) -> None:
        """Stores what `add` returned, or zeros after an update; a step that is not finite leaves no trace."""
        if not self._sums:
            return

        def store() -> tf.Tensor:
            for variable, total in zip(self._sums, totals, strict=True):
                variable.assign(tf.where(applied, tf.zeros_like(total), total))
            self._weight.assign(tf.where(applied, 0.0, weight))
            return tf.constant(True)

        tf.cond(finite, store, lambda: tf.constant(False))
        count_iteration(self._optimizer, finite & ~self.due)


def _is_composed(optimizer: Optimizer) -> bool:
    """Whether an optimizer leaves the order of a step to Keras, as all but a few (Nadam, MultiOptimizer) do."""
    steps = ("apply", "_backend_apply_gradients", "_backend_update_step")
    return all(getattr(type(optimizer), step) is getattr(Optimizer, step) for step in steps)


def _apply(optimizer: Optimizer, gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable]) -> None:
    """What `Optimizer.apply` does after it has reduced and clipped."""
    _decay(optimizer, variables)
    learning_rate = optimizer.learning_rate
    for gradient, variable in zip(gradients, variables, strict=True):
        optimizer.update_step(gradient, variable, learning_rate)
    for variable in variables:
        if variable.constraint is not None:
            variable.assign(variable.constraint(variable))
    if optimizer.use_ema:
        _average(optimizer)


def _decay(optimizer: Optimizer, variables: Sequence[keras.Variable]) -> None:
    """Decoupled weight decay, in the replica; an optimizer with a rule of its own (Muon) keeps it."""
    if type(optimizer)._apply_weight_decay is not Optimizer._apply_weight_decay:
        optimizer._apply_weight_decay(variables)
        return
    if optimizer.weight_decay is None:
        return
    for variable in variables:
        if optimizer._use_weight_decay(variable):
            rate = tf.cast(optimizer.learning_rate, variable.dtype) * tf.cast(optimizer.weight_decay, variable.dtype)
            optimizer.assign_sub(variable, tf.convert_to_tensor(variable) * rate)


def _average(optimizer: Optimizer) -> None:
    """Moves the running averages of the weights on, and writes them back every `ema_overwrite_frequency` steps."""
    optimizer._update_model_variables_moving_average(optimizer._trainable_variables)
    if not optimizer.ema_overwrite_frequency:
        return

    def overwrite() -> tf.Tensor:
        for variable, average in zip(
            optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True
        ):
            variable.assign(tf.convert_to_tensor(average))
        return tf.constant(True)

    due = tf.equal((tf.convert_to_tensor(optimizer.iterations) + 1) % optimizer.ema_overwrite_frequency, 0)
    tf.cond(due, overwrite, lambda: tf.constant(False))


def _apply_and_put_back(
    optimizer: Optimizer,
    condition: tf.Tensor,
    gradients: Sequence[tf.Tensor],
    variables: Sequence[keras.Variable],
) -> None:
    """Applies through the optimizer's own `apply`, then undoes it if it should not have been.

    For optimizers that override the order of a step. Theirs enters a cross-replica context, which no conditional of a
    replica may hold, and sums over replicas once more: correct, at the price of a copy of all state and a message.
    """
    state = [*variables, *optimizer.variables]
    before = [tf.identity(tf.convert_to_tensor(variable)) for variable in state]
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    shares = [tf.where(condition, gradient / replicas, tf.zeros_like(gradient)) for gradient in gradients]
    with tf.control_dependencies(before):
        optimizer.apply([tf.identity(share) for share in shares], list(variables))
    for variable, old in zip(state, before, strict=True):
        variable.assign(tf.where(condition, tf.convert_to_tensor(variable), old))
