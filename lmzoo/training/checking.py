"""Whether a pretraining run's step compiles and fits on TPU chips, found out without any."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from lmzoo.data.masking import TokenFacts
from lmzoo.data.objectives import Batch, Objective, Rows
from lmzoo.engine.tpu_check import check_on_tpu, replicas_of
from lmzoo.engine.tpu_report import TPUReport
from lmzoo.models import find_preset
from lmzoo.training.building import given_shape, make_model, with_vocab_size
from lmzoo.training.memory import COMPUTE_BYTES
from lmzoo.training.objectives import choose_objective, make_objective
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
    shape = with_vocab_size(shape.replace(**given_shape(config)), config.vocab_size or shape.vocab_size)
    name = choose_objective(config.objective, model_class, shape)
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
    batch = _empty_batch(
        make_objective(
            name,
            _no_facts(shape.vocab_size),
            mask_rate=config.mask_rate,
            mask_unit=config.mask_unit,
            separate_documents=config.separate_documents,
        ),
        rows,
        length,
    )
    flops = shape.training_flops_per_token(length) * rows * length
    specs = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), batch)
    return check_on_tpu(model, specs, topology, model_flops=flops)


def _no_facts(vocab_size: int) -> TokenFacts:
    """Facts of no tokenizer, with which batches have the shapes that they have with those of any."""
    none = np.zeros(vocab_size, bool)
    return TokenFacts(vocab_size, 0, 0, 0, (), none, none)


def _empty_batch(objective: Objective, rows: int, seq_length: int) -> Batch:
    """What an objective makes of rows without text: the shapes and types are what counts."""
    zeros = np.zeros((rows, seq_length), np.int32)
    empty = Rows(zeros, zeros, zeros.astype(bool), zeros, zeros, np.zeros(rows, np.uint64))
    return objective(empty._replace(other=empty))
