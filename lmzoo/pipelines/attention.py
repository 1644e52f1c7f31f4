"""How much the tokens of a text attend to one another, as outputs of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from lmzoo.data.tokenizers import Tokenizer
from lmzoo.layers import recorded_attention
from lmzoo.pipelines.token_texts import token_texts

Tensor = Any

MAX_TOKENS = 64
"""Tokens of a text that are shown. The outputs grow with their square, and with layers times heads."""


def attention_function(
    read: Callable[..., tuple[Tensor, Tensor]], names: Sequence[str], tokenizer: Tokenizer
) -> tf.types.experimental.PolymorphicFunction:
    """The graph from texts to `tokens` [B, T], and their `attention` [B, L, N, T, T] to one another.

    Args:
        read: has a model read columns of texts, tf.string [B]; gives its tokens [B, T] int32, and which of them are no
            padding, [B, T] bool.
        names: of the columns.
        tokenizer: of the tokens.
    """
    texts = token_texts(tokenizer)
    # Behind another token it shows whether a token begins a word, unless the vocabulary has a mark for what does not.
    known = texts.alone if any(texts.continues) else texts.inside
    shown = tf.constant([*known, ""])  # The last one is for padding, and for what a tokenizer has not.

    def run(*columns: Tensor) -> dict[str, Tensor]:
        with recorded_attention() as layers:
            token_ids, mask = read(*columns)
        attention = tf.stack(layers, axis=1)  # [B, L, N, T, T]
        is_token = mask[:, None, None, :, None]  # Of what looks. What is looked at has a weight of 0 as padding.
        with tf.device("CPU:0"):
            tokens = tf.gather(shown, tf.where(mask, tf.minimum(token_ids, len(known)), len(known)))
        return {"tokens": tokens, "attention": tf.where(is_token, attention, 0.0)}

    specs = [tf.TensorSpec([None], tf.string, name) for name in names]
    return tf.function(run, input_signature=specs, autograph=False)
