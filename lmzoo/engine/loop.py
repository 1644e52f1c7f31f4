"""From what one replica does with its part of a batch to the function that Keras's `fit` calls with an iterator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from lmzoo.engine.strategy import spread

Logs = dict[str, tf.Tensor]


def make_function(
    model: keras.Model, replica_step: Callable[[Any], Logs], names: Sequence[str] = ()
) -> Callable[[Any], Logs]:
    """Returns a function that runs up to `steps_per_execution` steps and returns the logs after the last.

    Args:
        model: its strategy, `steps_per_execution`, `run_eagerly` and metrics are used.
        replica_step: what each replica does with its part of a batch.
        names: the scalars that `replica_step` returns, which are added to the logs.
    """
    strategy, steps = model.distribute_strategy, model.steps_per_execution

    def run_one(data: Any) -> Logs:
        data = keras.tree.map_structure(_optional_to_none, data)
        results = strategy.run(replica_step, args=(data,))
        return {name: strategy.experimental_local_results(results[name])[0] for name in names}

    def run_batch(data: Any) -> Logs:
        last = run_one(data)
        return model.get_metrics_result() | last

    def run_next(iterator: Any) -> Logs:
        return run_batch(next(iterator))

    def run_several(iterator: Any) -> tuple[tf.Tensor, Logs]:
        def body(done: tf.Tensor, more: tf.Tensor, last: Logs) -> tuple[tf.Tensor, tf.Tensor, Logs]:
            batch = iterator.get_next_as_optional()
            more = batch.has_value()
            last = tf.cond(more, lambda: run_one(batch.get_value()), lambda: last)
            return done + tf.cast(more, tf.int32), more, last

        done, _, last = tf.while_loop(
            lambda done, more, _: more & (done < steps),
            body,
            [tf.constant(0), tf.constant(True), {name: tf.constant(0.0) for name in names}],
            parallel_iterations=1,
        )
        return done, model.get_metrics_result() | last

    if not model.run_eagerly:
        run_batch, run_next, run_several = (
            tf.function(each, autograph=False, reduce_retracing=True) for each in (run_batch, run_next, run_several)
        )

    def function(iterator: Any) -> Logs:
        if not isinstance(iterator, (tf.data.Iterator, tf.distribute.DistributedIterator)):
            logs: Logs = {}
            for _, data in zip(range(steps), iterator, strict=False):
                logs = run_batch(spread(data, strategy))
            return logs
        if steps == 1:
            return run_next(iterator)
        done, logs = run_several(iterator)
        if int(done) == 0:
            raise StopIteration
        return logs

    return function


def _optional_to_none(leaf: Any) -> Any:
    """Keras stands an empty tf Optional where a dataset element is None."""
    return None if isinstance(leaf, tf.experimental.Optional) else leaf
