"""A tokenizer and an encoder-decoder for the tests of pipelines that answer texts, and of what they export."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from tiny_pipeline import TEXTS

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import ARCHITECTURES

CONTEXT_LENGTH = 24
SOURCES = ["the cat", "", "naïve 😀", "x" * 200, "a</s>b", " \n\n  ", "漢", "the cat sat on the mat " * 5]


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), kind="unigram", vocab_size=60, num_sentinels=3)


@functools.cache
def tiny_t5() -> Any:
    """A T5 in float32 with weights large enough that its answers depend on the text, and end now and then."""
    model_class = ARCHITECTURES["t5"]
    shape = {"num_layers": 2, "num_decoder_layers": 1, "num_heads": 2, "model_dim": 16, "head_dim": 8}
    shape |= {"feedforward_dim": 24, "num_buckets": 6, "max_distance": 9, "dropout_rate": 0.0}
    shape |= {"vocab_size": 40, "context_length": CONTEXT_LENGTH, "tied_head": False, "scaled_head": False}
    model = model_class(model_class.config_class.from_dict(shape))
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        mean, scale = float("norm" in variable.path), 4.0 if "token_embedding" in variable.path else 1.0
        variable.assign(random.normal(mean, 0.3 * scale, variable.shape).astype("float32"))
    return model
