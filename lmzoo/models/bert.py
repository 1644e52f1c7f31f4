"""BERT: an encoder with learned positions and post-normalisation; RoBERTa and DistilBERT by its options.

Reference:
    Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", section 3,
    and the released code; Liu et al. 2019, "RoBERTa"; Sanh et al. 2019, "DistilBERT".
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import keras

from lmzoo import checkpoints
from lmzoo.models.encoder import EncoderConfig
from lmzoo.models.heads import HeadDropout, TaskHeads
from lmzoo.models.masked import MaskedLM
from lmzoo.models.transformer import TransformerConfig

# The 24 models of Turc et al. 2019, "Well-Read Students Learn Better", by the names they were released under.
_SMALL = {
    f"bert_uncased_L-{layers}_H-{width}_A-{width // 64}": {
        "num_layers": layers,
        "num_heads": width // 64,
        "model_dim": width,
    }
    for layers in (2, 4, 6, 8, 10, 12)
    for width in (128, 256, 512, 768)
}
_LARGE = {"num_layers": 24, "num_heads": 16, "model_dim": 1024}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Shape of a BERT, as `EncoderConfig` says."""

    model_type: ClassVar[str] = "bert"

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "bert-tiny": _SMALL["bert_uncased_L-2_H-128_A-2"],
        "bert-mini": _SMALL["bert_uncased_L-4_H-256_A-4"],
        "bert-small": _SMALL["bert_uncased_L-4_H-512_A-8"],
        "bert-medium": _SMALL["bert_uncased_L-8_H-512_A-8"],
        "bert-base": {},
        "bert-base-uncased": {},
        "bert-base-cased": {"vocab_size": 28_996},
        "bert-large": _LARGE,
        "bert-large-uncased": _LARGE,
        "bert-large-cased": {**_LARGE, "vocab_size": 28_996},
        **_SMALL,
    }

    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]] = ("BertForMaskedLM", "BertForPreTraining")


@keras.saving.register_keras_serializable("lmzoo")
class BertModel(MaskedLM):
    """BERT, from token ids to the scores of hidden tokens; `MaskedLM` says what it learns and takes.

    Example:
        model = BertModel.from_preset("bert-tiny")
        model.compile()
        model.fit(dataset)
        logits = model({"token_ids": ids, "padding_mask": ids != 0})

    Args:
        config: shape of the model.
        dtype: a Keras dtype or policy.
    """

    config_class: ClassVar[type[BertConfig]] = BertConfig
    config: BertConfig
    task_heads = TaskHeads(classes="Bert")
    tokenizer_kind = "wordpiece"
    checkpoint_prefix = "bert."
    checkpoint_heads = ("cls.",)
    checkpoint_optional = r"pooler\..*|cls\..*"
    # Heads of fine-tuning tasks, a head that the config leaves out, and a count that old checkpoints carry.
    checkpoint_ignored = r"(classifier|qa_outputs|pooler|cls\.seq_relationship)\..*|embeddings\.position_ids"
    checkpoint_tied: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    checkpoint_head_parts: ClassVar[Sequence[str]] = (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
    )

    @classmethod
    def from_google_checkpoint(
        cls, directory: str | os.PathLike[str], *, name: str = "bert_model.ckpt", dtype: Any = None, **overrides: Any
    ) -> Self:
        """A model with the weights of a checkpoint as Google released them: bert_config.json and TensorFlow files.

        Args:
            directory: holds bert_config.json, and `name`.index and `name`.data-*.
            name: of the TensorFlow checkpoint; pretraining with Google's code writes "model.ckpt-<step>".
            dtype, overrides: as in `from_pretrained`, which also says what is raised.
        """
        values = {**checkpoints.read_config(directory, "bert_config.json"), "model_type": cls.config_class.model_type}
        files = checkpoints.read_tensorflow_tensors(os.path.join(directory, name), _name_of_google)
        model = cls(cls._config_from(values, directory).replace(**overrides), dtype=dtype)
        model.load_tensors(files)
        return model


def _name_of_google(name: str) -> str | None:
    """Google's name of a weight -> Hugging Face's; None for the step and the optimizer's state."""
    if name == "global_step" or re.search(r"/(adam|lamb)_[mv]$", name):
        return None
    name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name).replace("/", ".")
    for ending, ours in ((r"\.(kernel|output_weights)$", ".weight"), (r"\.output_bias$", ".bias")):
        name = re.sub(ending, ours, name)
    return f"{name}.weight" if name.endswith("_embeddings") else name


# -- RoBERTa and DistilBERT: what their configs and checkpoints have that BERT's have not.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """Shape of a RoBERTa: one token type, no pooler, and positions that begin after the id of padding."""

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50_265
    eos_token_id: int | None = 2
    pad_token_id: int | None = 1
    num_token_types: int = 1
    pooler: bool = False
    norm_epsilon: float = 1e-5

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"roberta-base": {}, "roberta-large": _LARGE}
    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]] = ("RobertaForMaskedLM",)
    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        field: name for field, name in BertConfig.HUGGING_FACE_NAMES.items() if field != "pooler"
    }

    def _check_kind(self) -> None:
        self._require_positive("num_token_types")
        if self.pooler is not False:
            self._refuse("pooler", "must be False: RoBERTa learns no next sentences")
        if self.pad_token_id is None:
            self._refuse("pad_token_id", "must be a token id, since positions begin after it")

    @property
    def position_offset(self) -> int:
        """Row of the table of positions that a document's first token has: those before it belong to padding."""
        return (self.pad_token_id or 0) + 1

    @property
    def head_activation(self) -> str:
        """Activation inside the masked-LM head, whatever that of the blocks is."""
        return "gelu"


@keras.saving.register_keras_serializable("lmzoo")
class RobertaModel(BertModel):
    """RoBERTa: `BertModel` with the options of `RobertaConfig`; neither token types nor sentence labels."""

    config_class = RobertaConfig
    task_heads = TaskHeads(classes="Roberta", pools="first", dense="classifier.dense", output="classifier.out_proj")
    tokenizer_kind = "bpe"
    checkpoint_prefix = "roberta."
    checkpoint_heads = ("lm_head.",)
    checkpoint_optional = r"lm_head\..*"
    checkpoint_tied: ClassVar[Mapping[str, str]] = {
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    checkpoint_head_parts = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig(BertConfig):
    """Shape of a DistilBERT: half the layers of a BERT, no token types, no pooler."""

    model_type: ClassVar[str] = "distilbert"

    num_layers: int = 6
    num_token_types: int = 0
    pooler: bool = False

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "distilbert-base": {},
        "distilbert-base-uncased": {},
        "distilbert-base-cased": {"vocab_size": 28_996},
    }
    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]] = ("DistilBertForMaskedLM",)
    HUGGING_FACE_DROPOUT_RATES = ("attention_dropout",)
    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        **TransformerConfig.HUGGING_FACE_NAMES,
        "context_length": "max_position_embeddings",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "model_dim": "dim",
        "feedforward_dim": "hidden_dim",
        "dropout_rate": "dropout",
        "activation": "activation",
    }

    def _check_kind(self) -> None:
        for field, value in {"num_token_types": 0, "pooler": False, "norm_epsilon": 1e-12}.items():
            if getattr(self, field) != value:
                self._refuse(field, f"must be {value!r}, as in all of DistilBERT's checkpoints")


@keras.saving.register_keras_serializable("lmzoo")
class DistilBertModel(BertModel):
    """DistilBERT: `BertModel` with the options of `DistilBertConfig`; neither token types nor sentence labels."""

    config_class = DistilBertConfig
    task_heads = TaskHeads(
        classes="DistilBert",
        pools="first",
        dense="pre_classifier",
        activation="relu",
        drops_first=False,
        dropout=HeadDropout(name="seq_classif_dropout", rate=0.2),
        token_dropout=HeadDropout(),
    )
    checkpoint_prefix = "distilbert."
    checkpoint_heads = ("vocab_",)
    checkpoint_optional = r"vocab_.*"
    checkpoint_ignored = r"(pre_classifier|classifier|qa_outputs)\..*|embeddings\.position_ids"
    checkpoint_tied: ClassVar[Mapping[str, str]] = {"vocab_projector.weight": "embeddings.word_embeddings.weight"}
    checkpoint_blocks = "transformer.layer.{}"
    checkpoint_block_parts = (
        "attention.{q_lin,k_lin,v_lin}",
        "attention.out_lin",
        "sa_layer_norm",
        "ffn.lin1",
        "ffn.lin2",
        "output_layer_norm",
    )
    checkpoint_head_parts = ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
