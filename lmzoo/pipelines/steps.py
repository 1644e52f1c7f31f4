"""Decoding step by step, for who loops himself: ids and a cache in, scores and the cache out.

A cache has S places, and the newest token is in the last of them, whatever the length of a row: with each token, all
others move one place on. So a cache says all that there is to know, and rows that are at different tokens share a
batch. By name it holds `mask` [B, S] bool, what is there, and `key_0`, `value_0`, ... [B, N, S, H] for each layer; that
of an encoder-decoder also `source_key_0`, `source_value_0`, ... [B, N, T, H] and `source_bias` [B, 1, 1, T].
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from lmzoo.layers import KeyValueCache
from lmzoo.models import GenerativeLM
from lmzoo.models.seq2seq import Seq2SeqCache
from lmzoo.pipelines.guards import checked_ids, with_room

Tensor = Any
Outputs = dict[str, Tensor]


def prefill(model: GenerativeLM, token_ids: Tensor, lengths: Tensor, rows: Any, cache_length: int) -> Outputs:
    """Reads prompts: `logits` [B, V] of the next token, and the cache.

    Args:
        model: what reads.
        token_ids: [B, P] ids of the vocabulary, padded on the right, P from 1 to S.
        lengths: [B], from 1 to P.
        rows: number of rows, or the source that they answer.
        cache_length: S.
    """
    mask = tf.sequence_mask(lengths, tf.shape(token_ids)[1])
    logits, cache = model.decode_step(token_ids, model.init_cache(rows, cache_length), mask)
    tokens = cache.tokens if isinstance(cache, Seq2SeqCache) else cache
    source = tf.range(cache_length) - tf.expand_dims(cache_length - lengths, 1)  # [B, S], negative where nothing goes
    places = tf.maximum(source, 0)
    named = {"logits": logits, "mask": source >= 0}
    for layer, pair in enumerate(zip(tokens.keys, tokens.values, strict=True)):
        for kind, each in zip(("key", "value"), pair, strict=True):
            named[f"{kind}_{layer}"] = tf.gather(each, places, axis=2, batch_dims=1)
    if isinstance(cache, Seq2SeqCache):
        for layer, pair in enumerate(zip(cache.keys, cache.values, strict=True)):
            named |= {f"source_key_{layer}": pair[0], f"source_value_{layer}": pair[1]}
        named["source_bias"] = cache.bias
    return named


def decode_function(model: GenerativeLM, prefilled: Outputs) -> Any:
    """The graph of one more token: `token_ids` [B, 1] and a cache to `logits` [B, V] and the cache.

    Args:
        model: what reads.
        prefilled: outputs of `prefill`, whose shapes are those of the cache.
    """
    names = [name for name in prefilled if name != "logits"]
    num_layers = sum(name.startswith("key_") for name in names)
    size = prefilled["mask"].shape[1]

    def decode(token_ids: Tensor, *values: Tensor) -> Outputs:
        inputs = dict(zip(names, values, strict=True))
        used = tf.reduce_sum(tf.cast(inputs["mask"], tf.int32), axis=1)
        token_ids = with_room(checked_ids(token_ids, model.config.vocab_size), used, size - 1)
        # What comes round to the last place is written over.
        moved = {name: tf.roll(inputs[name], -1, axis=2) for name in _cached(num_layers)}
        tokens = KeyValueCache(
            keys=tuple(moved[f"key_{layer}"] for layer in range(num_layers)),
            values=tuple(moved[f"value_{layer}"] for layer in range(num_layers)),
            mask=tf.roll(inputs["mask"], -1, axis=1),
            next_slot=tf.constant(size - 1),
        )
        cache: Any = tokens
        if "source_bias" in inputs:
            keys, values = (
                tuple(inputs[f"source_{kind}_{layer}"] for layer in range(num_layers)) for kind in ("key", "value")
            )
            cache = Seq2SeqCache(tokens, keys, values, inputs["source_bias"])
        logits, cache = model.decode_step(token_ids, cache, tf.ones_like(token_ids, tf.bool))
        tokens = cache.tokens if isinstance(cache, Seq2SeqCache) else cache
        new = zip(_cached(num_layers), (*tokens.keys, *tokens.values), strict=True)
        return {"logits": logits, **inputs, "mask": tokens.mask, **dict(new)}

    specs = [tf.TensorSpec([None, *prefilled[name].shape[1:]], prefilled[name].dtype, name) for name in names]
    token = tf.TensorSpec([None, 1], tf.int32, "token_ids")
    return tf.function(decode, input_signature=[token, *specs], autograph=False)


def _cached(num_layers: int) -> list[str]:
    """Names of what a cache holds of its own tokens: all keys, then all values."""
    return [f"{kind}_{layer}" for kind in ("key", "value") for layer in range(num_layers)]
