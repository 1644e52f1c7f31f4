"""Whether a pretraining run's step compiles and fits on TPU chips, found out without any."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from lmzoo.data.objectives import Batch, Causal, Rows
from lmzoo.engine.tpu_check import check_on_tpu, replicas_of
from lmzoo.engine.tpu_report import TPUReport
from lmzoo.training.pretraining import find_causal_preset, given_shape, make_model
from lmzoo.training.settings import PretrainConfig


def check_pretraining(config: PretrainConfig, topology: str = "v5e:2x2") -> TPUReport:
    """Compiles the training step of a run, for each of the replicas that a TPU has; no text is read.

    Args:
        config: the run's settings; `batch_size` is shared by all chips. Without `vocab_size`, that of the preset.
        topology: generation and chips, such as "v5e:2x2".

    Raises:
        ValueError: a setting is out of range, the topology is unknown, or its replicas cannot share the batch.
    """
    model_class, shape = find_causal_preset(config.preset)
    shape = shape.replace(**given_shape(config), vocab_size=config.vocab_size or shape.vocab_size)
    model = make_model(config, model_class, shape)
    rows, replicas = config.batch_size, replicas_of(topology)
    if rows % (replicas * config.micro_batches):
        raise ValueError(
            f"batch_size is {rows}, but must be a multiple of {replicas} replicas x {config.micro_batches} "
            f"micro-batches on {topology}."
        )
    batch = _empty_batch(Causal(separate_documents=config.separate_documents), rows, shape.context_length)
    flops = shape.training_flops_per_token(shape.context_length) * rows * shape.context_length
    specs = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), batch)
    return check_on_tpu(model, specs, topology, model_flops=flops)


def _empty_batch(objective: Causal, rows: int, seq_length: int) -> Batch:
    """What an objective makes of rows without text: the shapes and types are what counts."""
    zeros = np.zeros((rows, seq_length), np.int32)
    return objective(Rows(zeros, zeros, zeros.astype(bool), zeros, zeros, np.zeros(rows, np.uint64)))
