"""Architectures. `ARCHITECTURES` is the one place that lists them: what sits above goes through it."""

import os
from typing import Any

from lmzoo import checkpoints
from lmzoo.config import ModelConfig, closest
from lmzoo.models.albert import AlbertModel
from lmzoo.models.base import LanguageModel as LanguageModel
from lmzoo.models.bert import BertModel, DistilBertModel, RobertaModel
from lmzoo.models.causal import CausalLM as CausalLM
from lmzoo.models.electra import ElectraGenerator, ElectraModel
from lmzoo.models.generative import GenerativeLM as GenerativeLM
from lmzoo.models.gpt import GPTModel
from lmzoo.models.masked import MaskedLM as MaskedLM
from lmzoo.models.seq2seq import Seq2SeqLM as Seq2SeqLM
from lmzoo.models.t5 import MT5Model, T5Model

ARCHITECTURES: dict[str, type[LanguageModel]] = {
    "gpt2": GPTModel,
    "bert": BertModel,
    "roberta": RobertaModel,
    "distilbert": DistilBertModel,
    "albert": AlbertModel,
    "electra": ElectraModel,
    "t5": T5Model,
    "mt5": MT5Model,
}
"""`model_type` of a checkpoint's config.json -> model class."""

_OF_ANOTHER_CLASS: dict[str, type[LanguageModel]] = {"ElectraForMaskedLM": ElectraGenerator}
"""Class of transformers that config.json names -> model class, where it is another one than the `model_type`'s."""


def find_preset(name: str) -> tuple[type[LanguageModel], ModelConfig]:
    """The model class and the config of a preset, whatever its architecture.

    Raises:
        ValueError: no architecture has it.
    """
    model_classes = [*ARCHITECTURES.values(), *_OF_ANOTHER_CLASS.values()]
    for model_class in model_classes:
        if name in model_class.config_class.PRESETS:
            return model_class, model_class.config_class.preset(name)
    known = [preset for model_class in model_classes for preset in model_class.config_class.PRESETS]
    raise ValueError(f"there is no preset {name!r}.{closest(name, known)}")


def find_architecture(directory: str | os.PathLike[str]) -> type[LanguageModel]:
    """The model class of the checkpoint in `directory`.

    Raises:
        CheckpointError: there is none, or no architecture reads it.
    """
    config = checkpoints.read_config(directory)
    model_type, names = config.get("model_type"), config.get("architectures") or [""]
    if model_type not in ARCHITECTURES:
        raise checkpoints.CheckpointError(
            f"{directory} holds a checkpoint of model_type {model_type!r}; known: {', '.join(ARCHITECTURES)}."
        )
    return _OF_ANOTHER_CLASS.get(names[0], ARCHITECTURES[model_type])


def load_pretrained(directory: str | os.PathLike[str], *, output_head: bool = True, dtype: Any = None) -> LanguageModel:
    """A model of whatever architecture the checkpoint in `directory` is of; see `LanguageModel.from_pretrained`."""
    return find_architecture(directory).from_pretrained(directory, output_head=output_head, dtype=dtype)
