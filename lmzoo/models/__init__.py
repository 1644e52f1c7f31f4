"""Architectures. `ARCHITECTURES` is the one place that lists them: what sits above goes through it."""

import os
from typing import Any

from lmzoo import checkpoints
from lmzoo.config import ModelConfig, closest
from lmzoo.models.base import LanguageModel as LanguageModel
from lmzoo.models.bert import BertModel, DistilBertModel, RobertaModel
from lmzoo.models.causal import CausalLM as CausalLM
from lmzoo.models.gpt import GPTModel

ARCHITECTURES: dict[str, type[LanguageModel]] = {
    "gpt2": GPTModel,
    "bert": BertModel,
    "roberta": RobertaModel,
    "distilbert": DistilBertModel,
}
"""`model_type` of a checkpoint's config.json -> model class."""


def find_preset(name: str) -> tuple[type[LanguageModel], ModelConfig]:
    """The model class and the config of a preset, whatever its architecture.

    Raises:
        ValueError: no architecture has it.
    """
    for model_class in ARCHITECTURES.values():
        if name in model_class.config_class.PRESETS:
            return model_class, model_class.config_class.preset(name)
    known = [preset for model_class in ARCHITECTURES.values() for preset in model_class.config_class.PRESETS]
    raise ValueError(f"there is no preset {name!r}.{closest(name, known)}")


def load_pretrained(directory: str | os.PathLike[str], *, dtype: Any = None) -> LanguageModel:
    """A model of whatever architecture the checkpoint in `directory` is of; see `LanguageModel.from_pretrained`."""
    model_type = checkpoints.read_config(directory).get("model_type")
    if model_type not in ARCHITECTURES:
        raise checkpoints.CheckpointError(
            f"{directory} holds a checkpoint of model_type {model_type!r}; known: {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[model_type].from_pretrained(directory, dtype=dtype)
