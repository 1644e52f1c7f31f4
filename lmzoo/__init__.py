"""Language models in Keras 3 and TensorFlow: raw text in, a trained model out, served by TF Serving or on a phone.

Names are imported when they are first used, so that `import lmzoo` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmzoo.config import ModelConfig as ModelConfig
    from lmzoo.data.tokenizers import Tokenizer as Tokenizer
    from lmzoo.models.bert import BertConfig as BertConfig
    from lmzoo.models.bert import BertModel as BertModel
    from lmzoo.models.bert import DistilBertConfig as DistilBertConfig
    from lmzoo.models.bert import DistilBertModel as DistilBertModel
    from lmzoo.models.bert import RobertaConfig as RobertaConfig
    from lmzoo.models.bert import RobertaModel as RobertaModel
    from lmzoo.models.gpt import GPTConfig as GPTConfig
    from lmzoo.models.gpt import GPTModel as GPTModel
    from lmzoo.pipelines import TextGenerator as TextGenerator
    from lmzoo.training import PretrainConfig as PretrainConfig
    from lmzoo.training import evaluate as evaluate
    from lmzoo.training import pretrain as pretrain

__version__ = "0.1.0"

_PUBLIC = {
    "ModelConfig": "lmzoo.config",
    "BertConfig": "lmzoo.models.bert",
    "BertModel": "lmzoo.models.bert",
    "DistilBertConfig": "lmzoo.models.bert",
    "DistilBertModel": "lmzoo.models.bert",
    "RobertaConfig": "lmzoo.models.bert",
    "RobertaModel": "lmzoo.models.bert",
    "GPTConfig": "lmzoo.models.gpt",
    "GPTModel": "lmzoo.models.gpt",
    "Tokenizer": "lmzoo.data.tokenizers",
    "TextGenerator": "lmzoo.pipelines",
    "PretrainConfig": "lmzoo.training",
    "evaluate": "lmzoo.training",
    "pretrain": "lmzoo.training",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lmzoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
