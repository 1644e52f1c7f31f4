"""Optimizers for language models: Keras's own where Keras has the algorithm right, with masks by variable."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops


class Masked(keras.optimizers.Optimizer):
    """Adds to a Keras optimizer which variables decay, and by how much each one's learning rate is multiplied.

    Decay applies to tensors of rank 2 and more (kernels, embeddings) that are not named a bias, as in GPT-2; never to
    biases and norms.

    Args:
        no_decay: regular expressions; a variable whose path one of them finds does not decay either.
        learning_rate_factors: regular expression -> factor; the first that finds a variable's path counts, for its
            update and its decay.
        start_decay: regular expression -> factor; a variable whose path is found, whatever its rank, decays by the
            first factor towards the value that it had when the optimizer was built, and not by `weight_decay` to 0.
            These values are part of the optimizer's state.

    Reference: Li et al. 2018, "Explicit Inductive Bias for Transfer Learning" (L2-SP); here the decay is decoupled.
    """

    def __init__(
        self,
        *args: Any,
        no_decay: Sequence[str] = (),
        learning_rate_factors: Mapping[str, float] | None = None,
        start_decay: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.no_decay = tuple(no_decay)
        self.learning_rate_factors = tuple((learning_rate_factors or {}).items())
        self.start_decay = tuple((start_decay or {}).items())

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the optimizer's variables, and looks up each variable's factors."""
        if self.built:
            return
        self._factors = tuple(_first(self.learning_rate_factors, each.path, 1.0) for each in variables)
        self._start_factors = tuple(_first(self.start_decay, each.path, 0.0) for each in variables)
        super().build(variables)
        self._starts = [
            self.add_variable_from_reference(variable, name="start") if factor else None
            for variable, factor in zip(variables, self._start_factors, strict=True)
        ]
        for start, variable in zip(self._starts, variables, strict=True):
            if start is not None:
                start.assign(ops.convert_to_numpy(variable))

    def decays(self, variable: keras.Variable) -> bool:
        """Whether weight decay applies to a variable."""
        if len(variable.shape) < 2 or variable.name.endswith("bias"):
            return False
        return not any(re.search(pattern, variable.path) for pattern in self.no_decay)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable, at its own learning rate."""
        super().update_step(gradient, variable, self._rate(variable, learning_rate))

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {
            **super().get_config(),
            "no_decay": list(self.no_decay),
            "learning_rate_factors": dict(self.learning_rate_factors),
            "start_decay": dict(self.start_decay),
        }

    def _rate(self, variable: Any, learning_rate: Any) -> Any:
        factor = self._factors[self._get_variable_index(variable)]
        return learning_rate if factor == 1.0 else learning_rate * factor

    def _decay_of(self, variable: keras.Variable) -> Any:
        """What a variable loses at a learning rate of 1; None for one that does not decay."""
        index = self._get_variable_index(variable)
        if self._starts[index] is not None:
            return ops.multiply(ops.subtract(variable, self._starts[index]), self._start_factors[index])
        if self.weight_decay and self.decays(self._trainable_variables[index]):
            return ops.multiply(variable, self.weight_decay)
        return None

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        """Decoupled decay by learning rate times weight decay."""
        for variable in variables:
            decay = self._decay_of(variable)
            if decay is not None:
                self.assign_sub(variable, decay * ops.cast(self._rate(variable, self.learning_rate), variable.dtype))


@keras.saving.register_keras_serializable("lmzoo")
class AdamW(Masked, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW` with masks.

    Reference: Loshchilov and Hutter, "Decoupled Weight Decay Regularization"; decay is multiplied by the learning rate.
    """


@keras.saving.register_keras_serializable("lmzoo")
class Lion(Masked, keras.optimizers.Lion):
    """`keras.optimizers.Lion` with masks.

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", algorithm 2.
    """


@keras.saving.register_keras_serializable("lmzoo")
class Muon(Masked, keras.optimizers.Muon):
    """`keras.optimizers.Muon` with masks: orthogonalised momentum for kernels, AdamW for embeddings and vectors.

    One `weight_decay` serves both, and one learning rate, since the update of a kernel is scaled to Adam's size.

    Args:
        orthogonal_dtype: of the products that make momentum orthogonal; "bfloat16" is faster where a device has units
            for it.

    Reference: Liu et al., "Muon is Scalable for LLM Training", section 2.2.
    """

    def __init__(self, *args: Any, orthogonal_dtype: str = "float32", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.orthogonal_dtype = orthogonal_dtype

    def zeropower_via_newtonschulz5(self, x: Any, steps: int) -> Any:
        """Makes a matrix orthogonal, nearly."""
        return ops.cast(super().zeropower_via_newtonschulz5(ops.cast(x, self.orthogonal_dtype), steps), x.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        own = {"adam_weight_decay": self.weight_decay, "orthogonal_dtype": self.orthogonal_dtype}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("lmzoo")
class Lamb(Masked, keras.optimizers.Lamb):
    """LAMB: Adam with decay inside the step, each kernel's step scaled by the norm of its weights.

    Keras decays beside the step, which leaves the decay out of the trust ratio; the paper has it inside. What does
    not decay is not scaled either, as in the authors' code.

    Reference: You et al., "Large Batch Optimization for Deep Learning", algorithm 2.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable."""
        index = self._get_variable_index(variable)
        rate = ops.cast(self._rate(variable, learning_rate), variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        step = ops.cast(self.iterations + 1, variable.dtype)
        m, v = self._momentums[index], self._velocities[index]
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - self.beta_2))
        update = m / (1 - ops.power(self.beta_1, step))
        update = update / (ops.sqrt(v / (1 - ops.power(self.beta_2, step))) + self.epsilon)
        decay = self._decay_of(variable)
        if decay is not None:
            update = update + decay
        if self.decays(self._trainable_variables[index]):
            weight_norm, update_norm = ops.norm(variable), ops.norm(update)
            known = ops.logical_and(weight_norm > 0, update_norm > 0)
            rate = rate * ops.where(known, weight_norm / ops.where(known, update_norm, 1.0), 1.0)
        self.assign_sub(variable, rate * update)

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        """Nothing: decay is part of the step."""


class _AdafactorBase(keras.optimizers.Optimizer):
    """See `Adafactor`."""

    def __init__(
        self,
        learning_rate: Any = 0.01,
        beta_2_decay: float = 0.8,
        epsilon_1: float = 1e-30,
        epsilon_2: float = 1e-3,
        clip_threshold: float = 1.0,
        relative_step: bool = True,
        smallest_factored: int = 128,
        name: str = "adafactor",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.beta_2_decay = beta_2_decay
        self.epsilon_1, self.epsilon_2 = epsilon_1, epsilon_2
        self.clip_threshold = clip_threshold
        self.relative_step = relative_step
        self.smallest_factored = smallest_factored

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates a row and a column of second moments for each large matrix, all of them for the rest."""
        if self.built:
            return
        super().build(variables)
        self._moments = []
        for variable in variables:
            axes = self._factored_axes(variable.shape)
            if axes is None:
                moments = [self.add_variable_from_reference(variable, name="moment")]
            else:
                moments = [
                    self.add_variable(
                        [size for axis, size in enumerate(variable.shape) if axis != dropped],
                        dtype=variable.dtype,
                        name=f"{variable.path.replace('/', '_')}_{kind}",
                    )
                    for kind, dropped in zip(("row", "column"), reversed(axes), strict=True)
                ]
            self._moments.append(moments)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable."""
        dtype = variable.dtype
        gradient = ops.cast(gradient, dtype)
        step = ops.cast(self.iterations + 1, dtype)
        moments = self._moments[self._get_variable_index(variable)]
        beta = 1.0 - ops.power(step, -self.beta_2_decay)
        square = ops.square(gradient) + self.epsilon_1

        axes = self._factored_axes(variable.shape)
        if axes is None:
            (moment,) = moments
            self.assign(moment, beta * moment + (1.0 - beta) * square)
            update = gradient / ops.sqrt(ops.convert_to_tensor(moment))
        else:
            row_axis, column_axis = axes
            row, column = moments
            self.assign(row, beta * row + (1.0 - beta) * ops.mean(square, axis=column_axis))
            self.assign(column, beta * column + (1.0 - beta) * ops.mean(square, axis=row_axis))
            rows = ops.expand_dims(ops.convert_to_tensor(row), column_axis)
            columns = ops.expand_dims(ops.convert_to_tensor(column), row_axis)
            update = gradient / ops.sqrt(rows / ops.mean(rows, axis=row_axis, keepdims=True) * columns)

        update = update / ops.maximum(1.0, _rms(update) / self.clip_threshold)
        rate = ops.cast(learning_rate, dtype)
        if self.relative_step:
            rate = rate * ops.maximum(self.epsilon_2, _rms(variable))
        self.assign_sub(variable, rate * update)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        names = ("beta_2_decay", "epsilon_1", "epsilon_2", "clip_threshold", "relative_step", "smallest_factored")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def _factored_axes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """The two largest axes, in order, if both are large enough to be worth it."""
        if len(shape) < 2:
            return None
        second, first = sorted(range(len(shape)), key=lambda axis: shape[axis])[-2:]
        return (min(first, second), max(first, second)) if shape[second] >= self.smallest_factored else None


@keras.saving.register_keras_serializable("lmzoo")
class Adafactor(Masked, _AdafactorBase):
    """Adafactor without momentum: second moments of a matrix kept as one row and one column.

    Keras's own stores the full second moment beside the factors, which is the memory that factoring is for.

    Reference: Shazeer and Stern, "Adafactor", algorithm 4. T5 pretrains with
    Adafactor(InverseSquareRoot(0.01, 10_000, flat=True)).

    Args:
        learning_rate: rate, or schedule; with `relative_step` a share of each variable's size.
        beta_2_decay: c in the decay 1 - step^-c of the second moments.
        epsilon_1: added to the squared gradient.
        epsilon_2: smallest size of a variable that counts.
        clip_threshold: largest root mean square of an update.
        relative_step: whether to multiply the rate by max(epsilon_2, root mean square of the variable).
        smallest_factored: smallest second-largest axis of a tensor that is factored.
        name: name of the optimizer.
        no_decay, learning_rate_factors, start_decay: as in `Masked`.
        kwargs: as in `keras.optimizers.Optimizer`.
    """


def _first(factors: Sequence[tuple[str, float]], path: str, otherwise: float) -> float:
    return next((factor for pattern, factor in factors if re.search(pattern, path)), otherwise)


def _rms(tensor: Any) -> Any:
    return ops.sqrt(ops.mean(ops.square(tensor)))


OPTIMIZERS: dict[str, type[keras.optimizers.Optimizer]] = {
    "adamw": AdamW,
    "adafactor": Adafactor,
    "lamb": Lamb,
    "lion": Lion,
    "muon": Muon,
}


def make_optimizer(
    name: str,
    learning_rate: Any,
    *,
    weight_decay: float = 0.1,
    global_clipnorm: float | None = 1.0,
    ema_momentum: float | None = None,
    no_decay: Sequence[str] = (),
    learning_rate_factors: Mapping[str, float] | None = None,
    start_decay: Mapping[str, float] | None = None,
    **settings: Any,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer by name, with the settings usual for language models.

    Args:
        name: a key of `OPTIMIZERS`: adamw, adafactor, lamb, lion or muon.
        learning_rate: rate above 0, or a schedule.
        weight_decay: decay of kernels and embeddings, multiplied by the learning rate; 0 or more.
        global_clipnorm: largest global gradient norm; None does not clip.
        ema_momentum: keeps a running average of the weights with this momentum, below 1; None keeps none.
        no_decay, learning_rate_factors, start_decay: as in `Masked`.
        settings: other arguments of the optimizer's class.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, but is {name!r}.")
    if name in ("adamw", "lamb"):
        settings = {"beta_2": 0.95, "epsilon": 1e-8, **settings}
    if name == "muon":
        settings = {"adam_beta_2": 0.95, "epsilon": 1e-8, "adam_weight_decay": weight_decay, **settings}
    if ema_momentum is not None:
        settings = {"use_ema": True, "ema_momentum": ema_momentum, **settings}
    return OPTIMIZERS[name](
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        global_clipnorm=global_clipnorm,
        no_decay=no_decay,
        learning_rate_factors=learning_rate_factors,
        start_decay=start_decay,
        **settings,
    )
