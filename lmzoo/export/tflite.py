"""Models as .tflite files for phones: static shapes, operators that every runtime has, weights in few bits."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import keras
import tensorflow as tf
from tensorflow.lite.python.convert import ConverterError

from lmzoo.export.flatbuffers import finished, require_builtins
from lmzoo.export.tflite_calibration import calibration_inputs
from lmzoo.export.tflite_weights import Weights, quantized
from lmzoo.files import write_whole
from lmzoo.layers import KeyValueCache
from lmzoo.models import CausalLM, Seq2SeqLM

Tensor = Any
Specs = dict[str, tf.TensorSpec]

_LARGEST_FILE = 2**31


class Signature(NamedTuple):
    """A function with names for its inputs and outputs.

    Attributes:
        function: takes the inputs as keyword arguments, and returns a dict of tensors.
        inputs: name -> shape, all of it static, and type.
    """

    function: Callable[..., dict[str, Tensor]]
    inputs: Specs


def export_tflite(
    model: Any,
    path: str | os.PathLike[str],
    *,
    weights: Weights = "float32",
    batch_size: int = 1,
    length: int | None = None,
    prefill_length: int = 32,
    calibration: Iterable[Sequence[int]] = (),
) -> Path:
    """Writes a model as a .tflite file that ai-edge-litert, and every runtime of TFLite, runs.

    A model that continues texts gets the signatures

    - `prefill`: token_ids [B, P] int32, lengths [B] int32 and the cache -> logits [B, V] float32 after the last token
      of each row, and the cache. A row's first `lengths` tokens are read; what is behind them is padding;
    - `decode`: the same for one token a row, P = 1;

    one that answers texts

    - `encode`: token_ids [B, T], lengths [B] -> the parts of the cache that belong to the text;
    - `decode`: token_ids [B, 1], lengths [B] and the cache -> logits [B, V], and the cache;

    and any other model

    - `tokens`: token_ids [B, T] int32, padding_mask [B, T] bool, token_type_ids [B, T] int32 -> its output.

    All tensors of the cache have names that begin with "cache_" and start as zeros. An output takes the place of the
    input of its name. Keys and values, of rank 4, are written where they lie if both are given the same memory, and
    nothing is copied then; the others are small, are read after they were written, and must have memory of their own.
    `cache_next_slot` or `cache_tokens_next_slot` says how many of the S places are taken; before a call, P must be
    free. `lmzoo.export.TFLiteGenerator` does all that.

    Args:
        model: a language model or a task's model, in float32.
        path: of the file, which is replaced if it exists.
        weights: "float32"; "float16", half the size; "int8", a quarter, with activations that are quantized as they
            come; "int8-full", with inputs and outputs of matrix products in int8 too, by the ranges seen in
            `calibration`: for chips that have nothing else, since it is less exact; or "int4", in groups of 32.
        batch_size: B.
        length: T or S: tokens that an encoder reads, and places of the cache. None is the model's context length.
        prefill_length: P, tokens of a prompt that are read at a time.
        calibration: rows of token ids of real text, for "int8-full".

    Returns:
        The path of the file.

    Raises:
        ValueError: a size or a format out of range, a model that is not in float32 or too large for a file, or a graph
            with operators that TFLite has not built in.
        ImportError: the weights need ai-edge-quantizer, and it is not installed.
        OSError: the file could not be written; an older one is as it was.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights is {weights!r}, but must be one of {', '.join(get_args(Weights))}.")
    if model.compute_dtype != "float32":
        raise ValueError(f"the model computes in {model.compute_dtype}, but must be loaded in float32 to be exported.")
    if model.count_params() * 4 > _LARGEST_FILE:
        raise ValueError(
            f"the model has {model.count_params():,} parameters, but a .tflite file holds 2 GiB: "
            f"{_LARGEST_FILE // 4:,} in float32, from which the other formats are made. Take a smaller model."
        )
    signatures = model_signatures(model, batch_size=batch_size, length=length, prefill_length=prefill_length)
    shown = calibration_inputs(signatures, calibration) if weights == "int8-full" else {}
    content = finished(convert(model, signatures), {"weights": weights, **_notes(model)})
    content = quantized(content, weights, shown)
    require_builtins(content)
    path = Path(path)
    write_whole(path, content)
    return path


def model_signatures(
    model: Any, *, batch_size: int = 1, length: int | None = None, prefill_length: int = 32
) -> dict[str, Signature]:
    """The functions of a model that a .tflite file holds, by name; arguments as in `export_tflite`."""
    context_length = model.config.context_length
    length = context_length if length is None else length
    if not 1 <= length <= context_length:
        raise ValueError(f"length is {length}, but must be from 1 to {context_length}, the model's context_length.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be 1 or more.")
    if isinstance(model, Seq2SeqLM):
        return _seq2seq_signatures(model, batch_size, length)
    if isinstance(model, CausalLM):
        if not 1 <= prefill_length <= length:
            raise ValueError(f"prefill_length is {prefill_length}, but must be from 1 to {length}, the cache's length.")
        return _causal_signatures(model, batch_size, length, prefill_length)
    return {"tokens": _encoder_signature(model, batch_size, length)}


def convert(model: Any, signatures: Mapping[str, Signature]) -> bytes:
    """Functions of a model as the content of a .tflite file, in float32.

    Raises:
        ValueError: they need operators that TFLite has not built in, which are named.
    """
    module = tf.Module()
    module.weights = [weight.value for weight in model.weights]
    functions = {}
    for name, signature in signatures.items():
        function = tf.function(signature.function, autograph=False)
        functions[name] = function.get_concrete_function(**signature.inputs)
        setattr(module, name, function)
    with tempfile.TemporaryDirectory() as directory:
        tf.saved_model.save(module, directory, signatures=functions)
        converter = tf.lite.TFLiteConverter.from_saved_model(directory, signature_keys=list(signatures))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            content = converter.convert()
        except ConverterError as error:
            strange = re.findall(r"(?:Custom|Flex|TF Select) ops: (.+)", str(error))
            if not strange:
                raise
            raise ValueError(f"the graph has {', '.join(strange)}, which TFLite has not built in.") from error
    require_builtins(content)
    return content


# -- The functions.


class _SlottedCache(KeyValueCache):
    """A cache that is written by an operator which works in place, if a runtime is given the same memory twice."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> _SlottedCache:
        place = [0, 0, self.next_slot, 0]
        new_keys, new_values = list(self.keys), list(self.values)
        new_keys[layer] = keras.ops.slice_update(new_keys[layer], place, keys)
        new_values[layer] = keras.ops.slice_update(new_values[layer], place, values)
        return self._replace(keys=tuple(new_keys), values=tuple(new_values))


def _mapped_caches(change: Callable[[KeyValueCache], Any], cache: Any) -> Any:
    """A nest of named tuples with something else in the place of each `KeyValueCache`."""
    if isinstance(cache, KeyValueCache):
        return change(cache)
    if hasattr(cache, "_fields"):
        return type(cache)(*(_mapped_caches(change, each) for each in cache))
    return cache


def _named(cache: Any, name: str = "cache") -> dict[str, Tensor]:
    """The tensors of a cache, in the order of `tf.nest`, by the names that they have in a signature."""
    if not isinstance(cache, tuple):
        return {name: cache}
    keys = getattr(cache, "_fields", range(len(cache)))
    return {
        path: each
        for key, part in zip(keys, cache, strict=True)
        for path, each in _named(part, f"{name}_{key}").items()
    }


def _step_signature(model: Any, empty: Any, batch_size: int, width: int) -> Signature:
    """Reads `width` tokens a row after a cache like `empty`."""

    def step(token_ids: Tensor, lengths: Tensor, **tensors: Tensor) -> dict[str, Tensor]:
        cache = tf.nest.pack_sequence_as(empty, [tensors[name] for name in _named(empty)])
        cache = _mapped_caches(lambda each: _SlottedCache(*each), cache)
        logits, cache = model.decode_step(token_ids, cache, tf.sequence_mask(lengths, width))
        # The next tokens overwrite what is padding in all rows.
        spare = tf.reduce_max(lengths) - width
        cache = _mapped_caches(lambda each: each.advance(spare), cache)
        changed = {name: tensor for name, tensor in _named(cache).items() if tensor is not tensors[name]}
        return {"logits": logits, **changed}

    inputs = {**_token_specs(batch_size, width), **{name: _spec(each, name) for name, each in _named(empty).items()}}
    return Signature(step, inputs)


def _causal_signatures(model: CausalLM, batch_size: int, length: int, prefill_length: int) -> dict[str, Signature]:
    empty = model.init_cache(batch_size, length)
    widths = {"prefill": prefill_length, "decode": 1}
    return {name: _step_signature(model, empty, batch_size, width) for name, width in widths.items()}


def _seq2seq_signatures(model: Seq2SeqLM, batch_size: int, length: int) -> dict[str, Signature]:
    def read(token_ids: Tensor, lengths: Tensor) -> Any:
        return model.init_cache({"token_ids": token_ids, "padding_mask": tf.sequence_mask(lengths, length)}, length)

    def encode(token_ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        cache = _mapped_caches(lambda each: (), read(token_ids, lengths))  # What is empty needs no output.
        return _named(cache)

    inputs = _token_specs(batch_size, length)
    empty = read(*(tf.zeros(spec.shape, spec.dtype) for spec in inputs.values()))
    return {"encode": Signature(encode, inputs), "decode": _step_signature(model, empty, batch_size, 1)}


def _encoder_signature(model: Any, batch_size: int, length: int) -> Signature:
    def tokens(**inputs: Tensor) -> dict[str, Tensor]:
        outputs = model(inputs, training=False)
        return outputs if isinstance(outputs, dict) else {"output": outputs}

    types = {"token_ids": tf.int32, "padding_mask": tf.bool, "token_type_ids": tf.int32}
    return Signature(tokens, {name: tf.TensorSpec([batch_size, length], kind, name) for name, kind in types.items()})


def _token_specs(batch_size: int, width: int) -> Specs:
    return {
        "token_ids": tf.TensorSpec([batch_size, width], tf.int32, "token_ids"),
        "lengths": tf.TensorSpec([batch_size], tf.int32, "lengths"),
    }


def _spec(tensor: Any, name: str) -> tf.TensorSpec:
    return tf.TensorSpec(tensor.shape, tensor.dtype, name)


def _notes(model: Any) -> dict[str, Any]:
    """What a program around the graph has to know and cannot see in it."""
    names = ("model_type", "vocab_size", "context_length", "eos_token_id", "pad_token_id", "start_token_id")
    return {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}
