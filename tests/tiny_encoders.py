"""Tokenizers, an encoder and models of tasks for the tests of pipelines that read whole texts, and of their exports."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import ARCHITECTURES
from lmzoo.tasks import (
    EmbeddingModel,
    QuestionAnsweringModel,
    SequenceClassificationModel,
    TokenClassificationModel,
)

CONTEXT_LENGTH = 32
SENTENCES = [
    "Ada Lovelace lives in New York, and Alan does not.",
    "the cat sat on the mat and that was that",
    "naïve café, déjà vu 漢字 and 😀",
]
TEXTS = [*SENTENCES, "", "x" * 70, "漢", " \n\n ", "a [SEP] b", "the cat " * 40, "Ünïcödé\u0301!"]
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")


@functools.cache
def tiny_tokenizer(kind: str = "wordpiece") -> Tokenizer:
    return Tokenizer.train(iter(SENTENCES * 10), kind=kind, vocab_size=300 if kind == "bpe" else 110, masked=True)


@functools.cache
def tiny_encoder(**overrides: Any) -> Any:
    """A BERT in float32 with weights large enough that texts are told apart; tests read it only."""
    keras.utils.set_random_seed(1)
    model_class = ARCHITECTURES["bert"]
    shape = {"num_layers": 2, "num_heads": 2, "model_dim": 16, "dropout_rate": 0.0}
    shape |= {"vocab_size": 310, "context_length": CONTEXT_LENGTH}
    return randomized(model_class(model_class.config_class.from_dict({**shape, **overrides})))


def randomized(model: Any) -> Any:
    random = np.random.default_rng(2)
    for variable in model.trainable_variables:
        variable.assign_add(random.normal(0.0, 0.4, variable.shape).astype("float32"))
    return model


@functools.cache
def task_model(name: str) -> Any:
    encoder = tiny_encoder()
    return randomized(
        {
            "single_label": lambda: SequenceClassificationModel(encoder, ("bad", "good", "neither")),
            "multi_label": lambda: SequenceClassificationModel(encoder, ("a", "b", "c"), problem="multi_label"),
            "regression": lambda: SequenceClassificationModel(encoder, problem="regression"),
            "two_targets": lambda: SequenceClassificationModel(encoder, ("x", "y"), problem="regression"),
            "tokens": lambda: TokenClassificationModel(encoder, TAGS),
            "answers": lambda: QuestionAnsweringModel(encoder),
            "embeddings": lambda: EmbeddingModel(encoder),
        }[name]()
    )


def reference(model: Any, encodings: Any, method: str = "__call__") -> list[np.ndarray]:
    """What a model, or a method of it, gives for encodings from Python, each of them on its own."""
    rows = zip(encodings.token_ids, encodings.token_type_ids, strict=True)
    return [
        getattr(model, method)(
            {"token_ids": np.array([ids], "int32"), "token_type_ids": np.array([types], "int32")}
        ).numpy()[0]
        for ids, types in rows
    ]


def without_twin() -> Tokenizer:
    """A tokenizer of a kind that no graph can do."""
    import tokenizers

    words = {word: number for number, word in enumerate(["the", "[MASK]", "cat", "sat", "on", "a", "mat"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="the"))
    return Tokenizer(backend, {"mask_token": "[MASK]"})


class ScriptedTagger(TokenClassificationModel):
    """Gives each token id the logits that a table has for it."""

    def play(self, seed: int) -> ScriptedTagger:
        shape = (self.config.vocab_size, len(self.labels))
        self.table = tf.Variable(np.random.default_rng(seed).normal(0.0, 2.0, shape).astype("float32"))
        return self

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return tf.gather(self.table, inputs["token_ids"])


class ScriptedReader(QuestionAnsweringModel):
    """Gives each token the logits that tables have for its id and for its place in the window."""

    def play(self, seed: int) -> ScriptedReader:
        random = np.random.default_rng(seed)
        self.tables = [
            tf.Variable(random.normal(0.0, 2.0, (size, 2)).astype("float32"))
            for size in (self.config.vocab_size, self.config.context_length)
        ]
        return self

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        token_ids = inputs["token_ids"]
        return tf.gather(self.tables[0], token_ids) + self.tables[1][: tf.shape(token_ids)[1]]
