"""ALBERT: a BERT with one block for all layers, and narrow embeddings that a projection widens.

Reference:
    Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", section 3, and the
    released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import keras

from lmzoo.models.encoder import EncoderConfig
from lmzoo.models.heads import HeadDropout, TaskHeads
from lmzoo.models.masked import MaskedLM

_LARGE = {"num_layers": 24, "num_heads": 16, "model_dim": 1024}
_XLARGE = {"num_layers": 24, "num_heads": 16, "model_dim": 2048}
_XXLARGE = {"num_layers": 12, "num_heads": 64, "model_dim": 4096}
# The first releases, with the exact GELU; the largest of them had been trained without dropout already.
_V1 = {"activation": "gelu", "dropout_rate": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlbertConfig(EncoderConfig):
    """Shape of an ALBERT: that of `EncoderConfig`, and this.

    Args:
        embedding_dim: E, width of the embeddings.
    """

    model_type: ClassVar[str] = "albert"

    vocab_size: int = 30_000
    eos_token_id: int | None = 3
    dropout_rate: float = 0.0
    activation: str = "gelu_tanh"
    embedding_dim: int = 128

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "albert-base-v1": _V1,
        "albert-large-v1": {**_LARGE, **_V1},
        "albert-xlarge-v1": {**_XLARGE, **_V1},
        "albert-xxlarge-v1": {**_XXLARGE, "activation": "gelu"},
        "albert-base-v2": {},
        "albert-large-v2": _LARGE,
        "albert-xlarge-v2": _XLARGE,
        "albert-xxlarge-v2": _XXLARGE,
    }

    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        **EncoderConfig.HUGGING_FACE_NAMES,
        "embedding_dim": "embedding_size",
    }
    HUGGING_FACE_FIXED: ClassVar[Mapping[str, Any]] = {
        **EncoderConfig.HUGGING_FACE_FIXED,
        "num_hidden_groups": 1,
        "inner_group_num": 1,
    }
    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]] = ("AlbertForMaskedLM", "AlbertForPreTraining")

    def _check_kind(self) -> None:
        super()._check_kind()
        self._require_positive("embedding_dim")

    @property
    def projects(self) -> bool:
        """True: there is a projection even where E is D."""
        return True

    @property
    def num_blocks(self) -> int:
        """One, which stands for every layer."""
        return 1


@keras.saving.register_keras_serializable("lmzoo")
class AlbertModel(MaskedLM):
    """ALBERT, from token ids to the scores of hidden tokens; `MaskedLM` says what it learns and takes.

    Its sentence labels are those of sentence-order prediction.

    Example:
        model = AlbertModel.from_preset("albert-base-v2")
        model.compile()
        model.fit(dataset)
        logits = model({"token_ids": ids, "padding_mask": ids != 0})

    Args:
        config: shape of the model.
        dtype: a Keras dtype or policy.
    """

    config_class: ClassVar[type[AlbertConfig]] = AlbertConfig
    config: AlbertConfig
    tokenizer_kind = "unigram"
    task_heads = TaskHeads(
        classes="Albert",
        dropout=HeadDropout(name="classifier_dropout_prob", rate=0.1),
        token_dropout=HeadDropout(name="classifier_dropout_prob", rate=0.1),
    )
    checkpoint_prefix = "albert."
    checkpoint_heads = ("predictions.", "sop_classifier.")
    checkpoint_optional = r"pooler\..*|predictions\..*|sop_classifier\..*"
    checkpoint_ignored = r"(classifier|qa_outputs|pooler|sop_classifier)\..*|embeddings\.position_ids"
    checkpoint_tied: ClassVar[Mapping[str, str]] = {
        "predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }
    checkpoint_projection = "encoder.embedding_hidden_mapping_in"
    checkpoint_blocks = "encoder.albert_layer_groups.{}.albert_layers.0"
    checkpoint_block_parts = (
        "attention.{query,key,value}",
        "attention.dense",
        "attention.LayerNorm",
        "ffn",
        "ffn_output",
        "full_layer_layer_norm",
    )
    checkpoint_head_parts = ("predictions.dense", "predictions.LayerNorm", "predictions.bias")
    checkpoint_pooler = "pooler"
    checkpoint_sentence_head = "sop_classifier.classifier"
