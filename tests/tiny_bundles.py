"""A small bundle of each kind of pipeline, and requests for each of its signatures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tiny_encoders
import tiny_pipeline
import tiny_text_to_text

from lmzoo.pipelines import (
    MaskFiller,
    Pipeline,
    QuestionAnswerer,
    TextClassifier,
    TextEmbedder,
    TextGenerator,
    TextToText,
    TokenClassifier,
)

Inputs = dict[str, np.ndarray]

_ROWS = 2
_UNKNOWN = 4  # places where a signature says nothing of them
_TEXTS = ["Ada Lovelace lives in New York, and the [MASK] sat", "naïve 😀 \x00 [MASK]"]
_COLUMNS: dict[str, Any] = {
    "text": _TEXTS,
    "pair": _TEXTS[::-1],
    "continuation": _TEXTS[::-1],
    "question": ["Who?", ""],
    "context": _TEXTS,
    "decoder_token_ids": np.array([[0, 5], [0, 6]], np.int32),
    "token_ids": np.array([[5, 6, 7, 8], [9, 1, 0, 0]], np.int32),
    "padding_mask": np.array([[True] * 4, [True, True, False, False]]),
    "token_type_ids": np.array([[0, 0, 1, 1], [0] * 4], np.int32),
}


@functools.cache
def pipelines() -> dict[str, Pipeline]:
    """By name; the generator is greedy, so that it gives the same texts each time."""
    tokenizer, model = tiny_encoders.tiny_tokenizer(), tiny_encoders.task_model
    return {
        "generator": TextGenerator(tiny_pipeline.shared_model(), tiny_pipeline.tiny_tokenizer(), 6, top_p=0.9, seed=1),
        "translator": TextToText(tiny_text_to_text.tiny_t5(), tiny_text_to_text.tiny_tokenizer(), 6, num_beams=2),
        "filler": MaskFiller(tiny_encoders.tiny_encoder(), tokenizer, top_k=3),
        "classifier": TextClassifier(model("single_label"), tokenizer),
        "tagger": TokenClassifier(model("tokens"), tokenizer),
        "answerer": QuestionAnswerer(model("answers"), tokenizer),
        "embedder": TextEmbedder(model("embeddings"), tokenizer),
    }


def export_all(directory: Path, names: tuple[str, ...] = (), **settings: Any) -> dict[str, Path]:
    """Exports pipelines, or those with these names; gives the directory of each one's versions."""
    for name in names or pipelines():
        pipelines()[name].export(directory / name, **settings)
    return {name: directory / name for name in names or pipelines()}


def requests(signatures: Any) -> dict[str, Inputs]:
    """Inputs for each signature of a bundle: texts or ids, what it has defaults for, and a cache that is empty."""
    made = {}
    for name, signature in signatures.items():
        inputs = {key: tf.make_ndarray(value) for key, value in signature.defaults.items()}
        # An optional input has one value, or one a row, and rows are what all inputs of a request have.
        inputs = {key: np.repeat(value, _ROWS, 0) for key, value in inputs.items()}
        for key in set(signature.inputs) - set(inputs):
            inputs[key] = _column(key, signature.inputs[key])
        made[name] = inputs
    return made


def _column(name: str, info: Any) -> np.ndarray:
    """Rows of an input, in the shape that it has in the signature."""
    _, *shape = (dimension.size for dimension in info.tensor_shape.dim)
    if name not in _COLUMNS:
        dtype = tf.as_dtype(info.dtype).as_numpy_dtype
        return np.zeros([_ROWS, *(_UNKNOWN if size < 0 else size for size in shape)], dtype)
    column = _COLUMNS[name]
    if isinstance(column, list):
        return np.array([text.encode() for text in column], object)
    return column[:, : shape[0]] if shape[0] > 0 else column
