"""Language models in Keras 3 and TensorFlow: raw text in, a trained model out, served by TF Serving or on a phone.

Names are imported when they are first used, so that `import lmzoo` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmzoo.checkpoints import Metric as Metric
    from lmzoo.checkpoints import ModelCard as ModelCard
    from lmzoo.config import ModelConfig as ModelConfig
    from lmzoo.data.tokenizers import Tokenizer as Tokenizer
    from lmzoo.models import load_pretrained as load_pretrained
    from lmzoo.models.albert import AlbertConfig as AlbertConfig
    from lmzoo.models.albert import AlbertModel as AlbertModel
    from lmzoo.models.bert import BertConfig as BertConfig
    from lmzoo.models.bert import BertModel as BertModel
    from lmzoo.models.bert import DistilBertConfig as DistilBertConfig
    from lmzoo.models.bert import DistilBertModel as DistilBertModel
    from lmzoo.models.bert import RobertaConfig as RobertaConfig
    from lmzoo.models.bert import RobertaModel as RobertaModel
    from lmzoo.models.electra import ElectraConfig as ElectraConfig
    from lmzoo.models.electra import ElectraGenerator as ElectraGenerator
    from lmzoo.models.electra import ElectraGeneratorConfig as ElectraGeneratorConfig
    from lmzoo.models.electra import ElectraModel as ElectraModel
    from lmzoo.models.gpt import GPTConfig as GPTConfig
    from lmzoo.models.gpt import GPTModel as GPTModel
    from lmzoo.models.t5 import MT5Config as MT5Config
    from lmzoo.models.t5 import MT5Model as MT5Model
    from lmzoo.models.t5 import T5Config as T5Config
    from lmzoo.models.t5 import T5Model as T5Model
    from lmzoo.pipelines import MaskFiller as MaskFiller
    from lmzoo.pipelines import QuestionAnswerer as QuestionAnswerer
    from lmzoo.pipelines import TextClassifier as TextClassifier
    from lmzoo.pipelines import TextEmbedder as TextEmbedder
    from lmzoo.pipelines import TextGenerator as TextGenerator
    from lmzoo.pipelines import TextToText as TextToText
    from lmzoo.pipelines import TokenClassifier as TokenClassifier
    from lmzoo.pipelines import load_pipeline as load_pipeline
    from lmzoo.tasks import EmbeddingModel as EmbeddingModel
    from lmzoo.tasks import QuestionAnsweringModel as QuestionAnsweringModel
    from lmzoo.tasks import SequenceClassificationModel as SequenceClassificationModel
    from lmzoo.tasks import TokenClassificationModel as TokenClassificationModel
    from lmzoo.tasks import load_task as load_task
    from lmzoo.training import FinetuneConfig as FinetuneConfig
    from lmzoo.training import PretrainConfig as PretrainConfig
    from lmzoo.training import evaluate as evaluate
    from lmzoo.training import finetune as finetune
    from lmzoo.training import pretrain as pretrain

__version__ = "0.1.0"

_PUBLIC = {
    "ModelConfig": "lmzoo.config",
    "Metric": "lmzoo.checkpoints",
    "ModelCard": "lmzoo.checkpoints",
    "Tokenizer": "lmzoo.data.tokenizers",
    "load_pretrained": "lmzoo.models",
    "AlbertConfig": "lmzoo.models.albert",
    "AlbertModel": "lmzoo.models.albert",
    "BertConfig": "lmzoo.models.bert",
    "BertModel": "lmzoo.models.bert",
    "DistilBertConfig": "lmzoo.models.bert",
    "DistilBertModel": "lmzoo.models.bert",
    "RobertaConfig": "lmzoo.models.bert",
    "RobertaModel": "lmzoo.models.bert",
    "ElectraConfig": "lmzoo.models.electra",
    "ElectraGenerator": "lmzoo.models.electra",
    "ElectraGeneratorConfig": "lmzoo.models.electra",
    "ElectraModel": "lmzoo.models.electra",
    "GPTConfig": "lmzoo.models.gpt",
    "GPTModel": "lmzoo.models.gpt",
    "MT5Config": "lmzoo.models.t5",
    "MT5Model": "lmzoo.models.t5",
    "T5Config": "lmzoo.models.t5",
    "T5Model": "lmzoo.models.t5",
    "MaskFiller": "lmzoo.pipelines",
    "QuestionAnswerer": "lmzoo.pipelines",
    "TextClassifier": "lmzoo.pipelines",
    "TextEmbedder": "lmzoo.pipelines",
    "TextGenerator": "lmzoo.pipelines",
    "TextToText": "lmzoo.pipelines",
    "TokenClassifier": "lmzoo.pipelines",
    "load_pipeline": "lmzoo.pipelines",
    "EmbeddingModel": "lmzoo.tasks",
    "QuestionAnsweringModel": "lmzoo.tasks",
    "SequenceClassificationModel": "lmzoo.tasks",
    "TokenClassificationModel": "lmzoo.tasks",
    "load_task": "lmzoo.tasks",
    "FinetuneConfig": "lmzoo.training",
    "PretrainConfig": "lmzoo.training",
    "evaluate": "lmzoo.training",
    "finetune": "lmzoo.training",
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
