"""Whether a pretraining run's step compiles and fits on TPU chips, found out without any."""

from __future__ import annotations

import tensorflow as tf

from lmzoo.data.objectives import lengths_of
from lmzoo.engine.tpu_check import check_on_tpu, replicas_of
from lmzoo.engine.tpu_report import TPUReport
from lmzoo.models import find_preset
from lmzoo.training.building import given_shape, make_model, with_vocab_size
from lmzoo.training.memory import COMPUTE_BYTES
from lmzoo.training.objectives import empty_batch, objective_before_text
from lmzoo.training.phases import make_phases
from lmzoo.training.settings import PretrainConfig


def check_pretraining(config: PretrainConfig, topology: str = "v5e:2x2") -> TPUReport:
    """Compiles the training step of a run, for each of the replicas that a TPU has; no text is read.

    Of two phases it is the step of the one that keeps more in memory.

    Args:
        config: the run's settings; `batch_size` is shared by all chips. Without `vocab_size`, that of the preset.
        topology: generation and chips, such as "v5e:2x2".

    Raises:
        ValueError: a setting is out of range, the topology is unknown, or its replicas cannot share the batch.
    """
    model_class, shape = find_preset(config.preset)
    objective = objective_before_text(config, model_class, shape)
    shape = with_vocab_size(shape.replace(**given_shape(config)), config.vocab_size or shape.vocab_size)
    model = make_model(config, model_class, shape)
    replicas, size = replicas_of(topology), COMPUTE_BYTES[config.dtype]
    parts = replicas * config.micro_batches
    phases = make_phases(config, shape.context_length, parts)
    fullest = max(phases, key=lambda phase: shape.activation_bytes(phase.batch_size, phase.seq_length, size).block)
    rows, length = fullest.batch_size, fullest.seq_length
    if rows % parts:
        raise ValueError(
            f"batch_size is {rows}, but must be a multiple of {replicas} replicas x {config.micro_batches} "
            f"micro-batches on {topology}."
        )
    batch = empty_batch(objective, rows, length)
    lengths = lengths_of(batch)
    flops = shape.training_flops_per_token(*lengths) * rows * sum(lengths)
    specs = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), batch)
    return check_on_tpu(model, specs, topology, model_flops=flops)
