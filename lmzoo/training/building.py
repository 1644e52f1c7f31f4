"""The model of a pretraining run, ready to be trained."""

from __future__ import annotations

from typing import Any

import keras

from lmzoo.config import ModelConfig
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.engine.optimizers import make_optimizer
from lmzoo.engine.schedules import make_schedule
from lmzoo.models import LanguageModel
from lmzoo.training.settings import PretrainConfig

SHAPE_SETTINGS = ("num_layers", "num_decoder_layers", "num_heads", "head_dim", "model_dim", "feedforward_dim")
"""Fields of a model's config that a run and a plan may replace."""

TABLES = "token_embedding|head_table"
"""Regular expression of the paths of tables with a row for each token."""


def given_shape(config: PretrainConfig) -> dict[str, Any]:
    """Fields of the model's config that the settings replace."""
    names = ("context_length", *SHAPE_SETTINGS, "dropout_rate")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def with_vocab_size(shape: ModelConfig, vocab_size: int) -> ModelConfig:
    """The same for another vocabulary; ids that this one does not have are forgotten."""
    ids = {name: getattr(shape, name) for name in ("eos_token_id", "pad_token_id")}
    kept = {name: None if index is None or index >= vocab_size else index for name, index in ids.items()}
    return shape.replace(vocab_size=vocab_size, **kept)


def with_tokenizer(shape: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The same for the vocabulary of a tokenizer; a decoder starts with padding."""
    pad = tokenizer.pad_token_id
    start = {"start_token_id": pad} if hasattr(shape, "start_token_id") else {}
    return shape.replace(
        vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad, **start
    )


def make_model(config: PretrainConfig, model_class: type[LanguageModel], shape: ModelConfig) -> LanguageModel:
    """The model to train, compiled, with the variables of its optimizer; made under the scope of its strategy."""
    keras.utils.set_random_seed(config.seed)
    model = model_class(shape, dtype=config.dtype)
    model.compile(
        _optimizer(config),
        micro_batches=config.micro_batches,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        jit_compile=config.jit_compile,
        remat=config.remat,
        steps_per_execution=config.steps_per_execution,
    )
    model.optimizer.build(model.trainable_variables)
    # Each call of `fit` would end by writing the averages over the weights, from which the next one goes on.
    model.optimizer.finalize_variable_values = lambda variables: None
    return model


def _optimizer(config: PretrainConfig) -> keras.optimizers.Optimizer:
    is_flat = config.schedule == "inverse_sqrt_flat"  # It has no rise that must end before the run does.
    schedule = make_schedule(
        config.schedule,
        config.learning_rate,
        total_steps=config.steps,
        warmup_steps=config.warmup_steps if is_flat else min(config.warmup_steps, config.steps - 1),
        final=config.final_learning_rate,
    )
    more: dict[str, Any] = {"beta_2": config.beta_2} if config.optimizer in ("adamw", "lamb") else {}
    if config.embedding_rate != 1.0:
        more["learning_rate_factors"] = {TABLES: config.embedding_rate}
    if config.ema_momentum is not None:
        more |= {"use_ema": True, "ema_momentum": config.ema_momentum}
    return make_optimizer(
        config.optimizer, schedule, weight_decay=config.weight_decay, global_clipnorm=config.clip_norm, **more
    )
