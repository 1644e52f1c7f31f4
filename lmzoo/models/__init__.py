"""Architectures. `ARCHITECTURES` is the one place that lists them: what sits above goes through it."""

from lmzoo.models.base import LanguageModel
from lmzoo.models.gpt import GPTModel

ARCHITECTURES: dict[str, type[LanguageModel]] = {
    "gpt2": GPTModel,
}
"""`model_type` of a checkpoint's config.json -> model class."""
