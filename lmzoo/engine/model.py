"""A keras.Model whose fit, evaluate and predict are right under every tf.distribute strategy."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from lmzoo.engine import reduction, update
from lmzoo.engine.loop import make_function
from lmzoo.engine.metrics import GlobalMean
from lmzoo.engine.randomness import own_randomness
from lmzoo.engine.strategy import has_only_gpus, is_tpu, spec_of_one_replica, spread

Sums = reduction.Sums
Logs = dict[str, tf.Tensor]


@dataclasses.dataclass
class _State:
    """What training keeps beside weights and optimizer. A plain object, so that Keras does not take it for weights."""

    metrics: dict[str, list[GlobalMean]]
    skipped_steps: tf.Variable
    skipped_in_a_row: tf.Variable
    recent_loss: tf.Variable  # [2]: sum of weighted losses and of weights, since they were last taken
    accumulated_weight: tf.Variable
    stop_wish: tf.Variable  # Of this worker alone, though it is stored like a mirrored one.
    stop_wishes: tf.Variable


class ReplicatedModel(keras.Model):
    """A model trained on the mean over all replicas and micro-batches, whatever the strategy.

    The gradient of a step is that of (sum of weighted losses over all replicas and micro-batches) / (sum of weights
    over all of them). It is reduced in one all-reduce, then checked, then clipped, then applied on every replica. A
    step whose loss or reduced gradients are not finite, on whichever replica that began, changes no variable but the
    loss scale, and is counted in `skipped_steps`; a step with no weight at all changes nothing. Each replica draws
    random numbers of its own (dropout), while the states of the seed generators are the same on all.

    A subclass implements `compute_sums`, and builds its weights in `__init__` (or before `fit`), under
    `strategy.scope()` if there is a strategy. Create the optimizer under the same scope.

    Differences from Keras: with sample weights, the loss of `compile(loss=...)` is divided by the sum of the weights,
    not by the number of values; the means that fit reports leave out a step whose sums are not finite; the mean of
    nothing is NaN; the batch given to `train_on_batch` is the global one, and is shared out among the replicas.
    """

    train_function: Any
    test_function: Any

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> Sums:
        """Returns what the objective and the other reported means are made of, for the examples given.

        Args:
            inputs, labels, weights: a batch, or this replica's part of a micro-batch; possibly of no rows.
            training: whether the sums are for a training step.

        Returns:
            name -> (sum of weighted values, sum of weights), float32 scalars, for each name of `sum_metrics`. "loss"
            is the objective.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no compute_sums(), so it has no objective of its own: implement it, or pass a "
            "loss to compile()."
        )

    def sum_metrics(self) -> dict[str, GlobalMean | Sequence[GlobalMean]]:
        """Returns new metrics for each name that `compute_sums` returns; a name may feed several."""
        return {"loss": GlobalMean(name="loss")}

    def idle_variables(self) -> Sequence[keras.Variable]:
        """Returns the weights that some batches do not train, because they lack the labels: no reason for a warning."""
        return ()

    def compile(self, optimizer: Any = "adamw", loss: Any = None, *, micro_batches: int = 1, **kwargs: Any) -> None:
        """Configures training; as `keras.Model.compile`, with these differences.

        Args:
            optimizer: any Keras optimizer. Clipping, EMA, loss scaling and `gradient_accumulation_steps` act on
                gradients reduced over all replicas.
            loss: None uses `compute_sums`. Otherwise one loss for one output; its unreduced values and the sample
                weights make the sums.
            micro_batches: into how many parts each replica splits its batch, one after the other, so that memory is
                that of one part. The step and the result are those of the whole batch.
            kwargs: the other arguments of `keras.Model.compile`. `metrics` without `loss` cost a second forward pass.

        Raises:
            ValueError: a loss for several outputs or with reduction "sum"; `micro_batches` below 1; an optimizer made
                under another strategy.
        """
        if not isinstance(micro_batches, int) or micro_batches < 1:
            raise ValueError(f"micro_batches must be an integer of 1 or more, but is {micro_batches!r}.")
        if keras.tree.is_nested(loss) or kwargs.get("loss_weights") is not None:
            raise ValueError(f"loss must be one loss for one output, but is {loss!r}. Implement compute_sums for more.")
        if getattr(loss, "reduction", None) == "sum":
            raise ValueError("loss has reduction='sum', which depends on the batch size. Use the default reduction.")
        strategy = self.distribute_strategy
        if isinstance(
            strategy, (tf.distribute.ParameterServerStrategy, tf.distribute.experimental.CentralStorageStrategy)
        ):
            raise ValueError(
                f"{type(strategy).__name__} keeps no copy of the weights on each replica; use a mirrored one."
            )
        with strategy.scope():
            super().compile(optimizer=optimizer, loss=loss, **kwargs)
            self._check_optimizer(strategy)
            declared = {"loss": GlobalMean(name="loss")} if loss is not None else self.sum_metrics()
            self._state = _State(
                metrics={
                    name: [each] if isinstance(each, GlobalMean) else list(each) for name, each in declared.items()
                },
                skipped_steps=tf.Variable(0, dtype=tf.int64, trainable=False, name="skipped_steps"),
                skipped_in_a_row=tf.Variable(0, dtype=tf.int64, trainable=False, name="skipped_in_a_row"),
                recent_loss=tf.Variable([0.0, 0.0], trainable=False, name="recent_loss"),
                accumulated_weight=tf.Variable(0.0, trainable=False, name="accumulated_weight"),
                stop_wish=tf.Variable(0.0, trainable=False, name="stop_wish"),
                stop_wishes=tf.Variable(0.0, trainable=False, name="stop_wishes"),
            )
        if "loss" not in self._state.metrics:
            raise ValueError(f'sum_metrics() must name "loss", but names {sorted(declared)}.')
        # The state above holds the loss's mean; Keras's own tracker would report a second one.
        self._loss_tracker = None
        self._micro_batches = micro_batches
        self._loss_function = None if loss is None else reduction.unreduced(loss)

    def get_compile_config(self) -> dict[str, Any]:
        """Returns what `compile_from_config` needs, serialised."""
        config = super().get_compile_config()
        return {**config, "micro_batches": self._micro_batches} if config else config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as `get_compile_config` says, and creates the optimizer's variables, so that they can be loaded."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self._build_optimizer()

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """All metrics: the means of the sums first, then what Keras lists."""
        state = getattr(self, "_state", None)
        own = [metric for group in state.metrics.values() for metric in group] if state else []
        return own + super().metrics

    @property
    def skipped_steps(self) -> int:
        """How many training steps since `compile` changed nothing because the loss or a gradient was not finite."""
        return int(self._state.skipped_steps.numpy())

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the newest training steps, without a break, changed nothing for that reason."""
        return int(self._state.skipped_in_a_row.numpy())

    def take_recent_loss(self) -> float:
        """Returns the mean training loss since this was last called, NaN if no step counted; and begins anew.

        It is part of `training_state`, so that it does not depend on where training was stopped in between.
        """
        total, weight = self._state.recent_loss.numpy().tolist()
        self._state.recent_loss.assign([0.0, 0.0])
        return total / weight if weight else math.nan

    def ask_to_stop(self) -> None:
        """Asks all workers to stop: `is_asked_to_stop` turns true on every one of them with the next training step."""
        self._state.stop_wish.assign(1.0)

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether any worker had asked to stop when the newest training step began; all see the same."""
        return bool(self._state.stop_wishes.numpy())

    @property
    def training_state(self) -> dict[str, tf.Variable]:
        """What a checkpoint has to hold beside weights and optimizer, for training to go on as if never stopped."""
        names = ("skipped_steps", "skipped_in_a_row", "recent_loss", "accumulated_weight")
        return {name: getattr(self._state, name) for name in names}

    def make_train_function(self, force: bool = False) -> None:
        """Makes `train_function(iterator) -> logs`, which `fit` and `train_on_batch` call."""
        if self.train_function is None or force:
            self._build_optimizer()
            self.train_function = make_function(self, self._compiled(self._train_replica), names=["gradient_norm"])

    def make_test_function(self, force: bool = False) -> None:
        """Makes `test_function(iterator) -> logs`, which `evaluate` and `test_on_batch` call."""
        if self.test_function is None or force:
            self.test_function = make_function(self, self._compiled(self._test_replica))

    def predict_on_batch(self, x: Any) -> Any:
        """Returns the predictions for one batch, each row predicted once, whatever the number of replicas."""
        return super().predict_on_batch(spread(x, self.distribute_strategy))

    def _check_optimizer(self, strategy: tf.distribute.Strategy) -> None:
        """Refuses an optimizer whose variables would live elsewhere than the model's."""
        made_under = getattr(update.innermost(self.optimizer), "_distribution_strategy", strategy)
        if made_under is not strategy:
            raise ValueError(
                f"optimizer {self.optimizer.name!r} was created under {type(made_under).__name__}, but the model under "
                f"{type(strategy).__name__}. Create both inside the same `with strategy.scope():`."
            )

    def _build_optimizer(self) -> None:
        """Creates the optimizer's variables, which no traced function may do."""
        if not self.trainable_variables:
            raise ValueError(
                f"{type(self).__name__} has no trainable weights. Build it (call it once) before training."
            )
        with self.distribute_strategy.scope():
            if not self.optimizer.built:
                self.optimizer.build(self.trainable_variables)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Creates the state of compiled metrics from the shapes of a batch.

        Keras pulls a batch out of the iterator for that, which fails on the values of several workers.
        """
        if self._compile_metrics is None or self._compile_metrics.built:
            return
        if data_batch is None:
            data_batch = keras.tree.map_structure(spec_of_one_replica, iterator._distributed_dataset.element_spec)
        with self.distribute_strategy.scope():
            self._symbolic_build(data_batch=data_batch)
        if self.distribute_strategy.num_replicas_in_sync == 1:
            return
        for metric in self._compile_metrics.metrics:
            if not all(isinstance(variable.value, tf.distribute.DistributedValues) for variable in metric.variables):
                raise ValueError(
                    f"metric {metric.name!r} was created outside the model's strategy, so it would count one replica "
                    "or one worker only. Create it inside the same `with strategy.scope():`, or pass its name."
                )

    def _compiled(self, replica_step: Callable[[Any], Logs]) -> Callable[[Any], Logs]:
        """Compiles a replica's step with XLA if asked to; a TPU strategy does that by itself."""
        if not self.jit_compile or self.run_eagerly or is_tpu(self.distribute_strategy):
            return replica_step
        if self.distribute_strategy.num_replicas_in_sync > 1 and not has_only_gpus(self.distribute_strategy):
            warnings.warn(
                "jit_compile=True is left out: XLA has no way to sum over several replicas on CPUs.", stacklevel=2
            )
            return replica_step
        return tf.function(replica_step, jit_compile=True, autograph=False)

    def _train_replica(self, data: Any) -> Logs:
        """One training step, as each replica runs it on its part of the batch."""
        optimizer = update.innermost(self.optimizer)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        scale = update.loss_scale(self.optimizer)
        # Alone, a replica's mean is the mean: no sum to divide.
        alone = replicas == 1 and self._micro_batches == 1 and not optimizer.gradient_accumulation_steps
        batch = keras.utils.unpack_x_y_sample_weight(data)
        with own_randomness(self):
            gradients, packed = self._local_gradients(batch, scale, as_mean=alone)
        variables, gradients = update.connected(self.trainable_variables, gradients, self.idle_variables())
        *gradients, packed, wishes = reduction.all_reduce_sum([*gradients, packed, self._state.stop_wish.read_value()])
        value, weight = reduction.unpack(packed, list(self._state.metrics))["loss"]
        accumulation = update.Accumulation(optimizer, variables, self._state.accumulated_weight)
        gradients, weight = accumulation.add(gradients, weight)
        factor = tf.math.divide_no_nan(1.0, weight)
        if alone:
            factor = 1.0 if scale is None else 1.0 / scale

        norm = reduction.global_norm(gradients) * factor
        finite = tf.math.is_finite(norm) & tf.math.is_finite(value)
        ready = finite & tf.not_equal(weight, 0.0) & accumulation.due
        clipping = {name: getattr(optimizer, name) for name in ("global_clipnorm", "clipnorm", "clipvalue")}
        update.apply_if(optimizer, ready, lambda: reduction.clip(gradients, norm, factor, **clipping), variables)
        accumulation.keep(gradients, weight, finite, ready)
        update.update_loss_scale(self.optimizer, finite)
        self._state.skipped_steps.assign_add(tf.cast(~finite, tf.int64))
        in_a_row = self._state.skipped_in_a_row.read_value()
        self._state.skipped_in_a_row.assign(tf.where(finite, tf.zeros_like(in_a_row), in_a_row + 1))
        self._state.stop_wishes.assign(wishes)
        loss = self._report(packed, skip_not_finite=True)["loss"]
        self._state.recent_loss.assign_add(tf.stack(loss))
        return {"gradient_norm": norm}

    def _test_replica(self, data: Any) -> Logs:
        """One evaluation step, as each replica runs it on its part of the batch."""
        sums = self._sums(keras.utils.unpack_x_y_sample_weight(data), training=False)
        (packed,) = reduction.all_reduce_sum([reduction.pack(sums, list(self._state.metrics))])
        self._report(packed)
        return {}

    def _local_gradients(
        self, batch: tuple[Any, Any, Any], scale: Any, as_mean: bool
    ) -> tuple[list[tf.Tensor | None], tf.Tensor]:
        """Returns this replica's gradients, a variable each, and its packed sums.

        Args:
            batch: inputs, labels and weights of this replica.
            scale: loss scale, or None for 1.
            as_mean: whether to return the gradient of the scaled mean loss, or that of the unscaled sum.
        """
        if as_mean:
            gradients, packed, _ = self._micro_gradients(batch, scale)
            return gradients, packed
        if self._micro_batches == 1:
            gradients, packed, factor = self._micro_gradients(batch, scale)
            return [None if each is None else each * tf.cast(factor, each.dtype) for each in gradients], packed

        variables = self.trainable_variables
        has_gradient = [False] * len(variables)
        static = self.jit_compile or is_tpu(self.distribute_strategy)

        # The loop variables are flat: in eager mode tf.while_loop mistakes nested lists for tuples.
        def body(index: tf.Tensor, packed: tf.Tensor, *totals: tf.Tensor) -> list[tf.Tensor]:
            part = reduction.micro_batch(batch, index, self._micro_batches, static=static)
            gradients, part_packed, factor = self._micro_gradients(part, scale)
            sums = list(totals)
            for position, gradient in enumerate(gradients):
                if gradient is not None:
                    has_gradient[position] = True
                    sums[position] += gradient * tf.cast(factor, gradient.dtype)
            return [index + 1, packed + part_packed, *sums]

        zeros = [tf.zeros(v.shape, tf.float64 if v.dtype == "float64" else tf.float32) for v in variables]
        _, packed, *totals = tf.while_loop(
            lambda index, *_: index < self._micro_batches,
            body,
            [tf.constant(0), tf.zeros([2 * len(self._state.metrics)]), *zeros],
            parallel_iterations=1,
            maximum_iterations=self._micro_batches,
        )
        return [total if has else None for total, has in zip(totals, has_gradient, strict=True)], packed

    def _micro_gradients(
        self, batch: tuple[Any, Any, Any], scale: Any
    ) -> tuple[list[tf.Tensor | None], tf.Tensor, tf.Tensor]:
        """Returns the gradients of the scaled mean loss of a batch, its packed sums, and what undoes mean and scale.

        The mean is taken before going backward, because in float16 the gradient of a sum over many tokens overflows.
        """
        scale = 1.0 if scale is None else scale
        with tf.GradientTape() as tape:
            sums = self._sums(batch, training=True)
            value, weight = (tf.cast(part, tf.float32) for part in sums["loss"])
            weight = tf.stop_gradient(tf.where(tf.equal(weight, 0.0), 1.0, weight))
            objective = value * (scale / weight)
        gradients = tape.gradient(objective, [variable.value for variable in self.trainable_variables])
        packed = reduction.pack(sums, list(self._state.metrics))
        return [reduction.dense(gradient) for gradient in gradients], packed, weight / scale

    def _sums(self, batch: tuple[Any, Any, Any], training: bool) -> Sums:
        """Returns the sums of a batch, from `compute_sums` or from the compiled loss; updates the compiled metrics."""
        inputs, labels, weights = batch
        outputs = None
        if self._loss_function is None:
            sums = dict(self.compute_sums(inputs, labels, weights, training=training))
        else:
            outputs = self(inputs, training=training)
            mask = getattr(outputs, "_keras_mask", None)
            sums = {"loss": reduction.weighted_sums(self._loss_function(labels, outputs), weights, mask)}
        if set(sums) != set(self._state.metrics):
            raise ValueError(
                f"compute_sums() returned {sorted(sums)}, but sum_metrics() declares {sorted(self._state.metrics)}. "
                "Both must name the same."
            )
        if self.losses:
            value, weight = sums["loss"]
            extra = tf.add_n([tf.cast(tf.reduce_sum(each), tf.float32) for each in self.losses])
            sums["loss"] = (value + weight * extra, weight)
        if self._compile_metrics is not None:
            outputs = self(inputs, training=training) if outputs is None else outputs
            self._compile_metrics.update_state(labels, outputs, weights)
        return sums

    def _report(self, packed: tf.Tensor, skip_not_finite: bool = False) -> Sums:
        """Adds the sums of a step, over all replicas, to the metrics, and returns what was added."""
        if skip_not_finite:
            kept = tf.cast(tf.reduce_all(tf.math.is_finite(packed)), packed.dtype)
            packed = tf.math.multiply_no_nan(packed, kept)
        added = reduction.unpack(packed, list(self._state.metrics))
        for name, sums in added.items():
            for metric in self._state.metrics[name]:
                metric.add_sums(*sums)
        return added
