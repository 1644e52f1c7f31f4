"""A tokenizer, a model and a scripted model for the tests of pipelines and of what they export."""

from __future__ import annotations

import functools
import types
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.generation import Decoder
from lmzoo.models import ARCHITECTURES

CONTEXT_LENGTH = 48
# Some characters come as one token, some as several, so that tokens end inside of characters.
TEXTS = [
    "the cat sat on the mat and that was that " * 3,
    "naïve café, déjà vu ",
    "漢字 and 😀\n\n",
    "a b\tc  d   e\n",
] * 4
PROMPTS = ["the cat", "", "naïve 😀", "x" * 200, "a<|endoftext|>b", " \n\n  ", "漢", "the cat sat on the mat"]


@functools.cache
def tiny_tokenizer(kind: str = "bpe") -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), kind=kind, vocab_size=300 if kind == "bpe" else None)


def tiny_model(dtype: Any = None, **overrides: Any) -> Any:
    """A model with random weights large enough that its texts depend on the prompt, and end now and then."""
    keras.utils.set_random_seed(1)
    model_class = ARCHITECTURES["gpt2"]
    shape = {"num_layers": 2, "num_heads": 2, "model_dim": 32, "dropout_rate": 0.0, "eos_token_id": 0}
    shape |= {"vocab_size": 300, "context_length": CONTEXT_LENGTH}
    model = model_class(model_class.config_class.from_dict({**shape, **overrides}), dtype=dtype)
    random = np.random.default_rng(2)
    for variable in model.trainable_variables:
        noise = random.normal(0.0, 0.3, variable.shape)
        variable.assign(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")) + noise)
    return model


@functools.cache
def shared_model() -> Any:
    """A tiny model in float32 that tests read only."""
    return tiny_model()


class ScriptedModel:
    """Gives the ids of a script, whatever the prompt. `num_steps` counts how often it was asked for more."""

    weights = ()

    def __init__(self, vocab_size: int = 300, eos_token_id: int | None = 0) -> None:
        self.config = types.SimpleNamespace(
            vocab_size=vocab_size, context_length=CONTEXT_LENGTH, eos_token_id=eos_token_id, pad_token_id=None
        )
        self._script = tf.Variable([0], shape=[None], trainable=False)
        self.num_steps = tf.Variable(0, trainable=False)

    def play(self, token_ids: list[int]) -> None:
        self._script.assign([*token_ids, 0])
        self.num_steps.assign(0)

    def _step(self, token_ids: Any, place: Any, padding_mask: Any) -> Any:
        self.num_steps.assign_add(1)
        token = tf.gather(self._script, tf.minimum(place, tf.size(self._script) - 1))
        return tf.one_hot(tf.repeat(token, tf.shape(token_ids)[0]), self.config.vocab_size), place + 1

    def decoder(self, max_new_tokens: int, options: Any) -> Decoder:
        return Decoder(
            self._step,
            lambda batch_size, cache_length: tf.constant(0),
            max_new_tokens=max_new_tokens,
            options=options,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=0,
        )
