"""What a model gives for labelled examples, whatever the strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.data.labelled import Examples, LabelledBatches
from lmzoo.engine.model import ReplicatedModel
from lmzoo.engine.strategy import is_tpu
from lmzoo.training.evaluation import share_out


class Predictor:
    """Runs a model on examples; every worker gets all of what comes out.

    Args:
        model: what to run.
        outputs: (model, inputs of a batch) -> [B, ...].
        batch_size: examples in a global batch, a multiple of the number of replicas.
        widths: width and decoder_width, as in `LabelledBatches`.
    """

    def __init__(self, model: Any, outputs: Callable[[Any, Any], tf.Tensor], *, batch_size: int, **widths: Any) -> None:
        self._strategy = strategy = model.distribute_strategy
        self._batching = {"batch_size": batch_size, **widths}

        def run(inputs: Any) -> tf.Tensor:
            results = strategy.run(lambda part: outputs(model, part), args=(inputs,))
            return results if strategy.num_replicas_in_sync == 1 else strategy.gather(results, axis=0)

        self._run = tf.function(run, autograph=False, reduce_retracing=True)

    def __call__(self, examples: Examples, per_token: bool) -> list[np.ndarray]:
        """What comes out for each example; `per_token` cuts off what is of padding."""
        batches = LabelledBatches(examples, shuffle=False, **self._batching)
        results: list[Any] = [None] * len(examples)
        for step, (inputs, _, _) in enumerate(share_out(batches, self._strategy)):
            rows = batches.rows_at(step)
            for row, result in zip(rows.tolist(), self._run(inputs).numpy(), strict=True):
                if row >= 0:
                    results[row] = result[: examples.lengths[row]] if per_token else result
            if step + 1 == batches.num_batches:
                break
        return results


def mean_loss(model: ReplicatedModel, batches: LabelledBatches) -> float:
    """The objective's mean over one pass of a compiled model."""
    dataset = share_out(batches, model.distribute_strategy)
    logs = model.evaluate(dataset, steps=batches.num_batches, return_dict=True, verbose=0)
    return float(logs["loss"])


def static_width(strategy: tf.distribute.Strategy, max_length: int) -> int | None:
    """Tokens a row where shapes must be static, as on a TPU; None where rows may be as wide as they need to be."""
    return max_length if is_tpu(strategy) else None
