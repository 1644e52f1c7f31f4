"""`:classify` and `:regress` of TF Serving's REST API: signatures that take serialized tf.train.Example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.serving.errors import invalid
from lmzoo.serving.servable import Arrays
from lmzoo.serving.tensors import json_texts, read_text, shown

_METHOD = "tensorflow/serving/{verb}"
_INPUT = "inputs"


def check_method(signature: Any, verb: str) -> None:
    """Raises a ServingError unless a signature is for a verb, "classify" or "regress"."""
    expected = _METHOD.format(verb=verb)
    if signature.method_name != expected or set(signature.inputs) != {_INPUT}:
        raise invalid(
            f"Expected {verb} signature method_name to be {expected}, with the input {_INPUT}. "
            f"Was: {signature.method_name}, with {', '.join(sorted(signature.inputs))}."
        )


def read_examples(request: Mapping[str, Any]) -> Arrays:
    """The serialized examples of a request, each with the features of its context.

    Raises:
        ServingError: there are none, or a feature is no number, string or list of one kind of these.
    """
    examples = request.get("examples")
    if not isinstance(examples, list) or not examples:
        raise invalid("Expecting 'examples' to be a list of one or more objects")
    context = _features(request.get("context", {}))
    serialized = [
        tf.train.Example(features=tf.train.Features(feature={**context, **_features(example)})).SerializeToString()
        for example in examples
    ]
    return {_INPUT: np.array(serialized, object)}


def _features(example: Any) -> dict[str, tf.train.Feature]:
    if not isinstance(example, dict):
        raise invalid(f"Example must be JSON object but got {shown(example)}")
    return {
        read_text(name, name).decode(): _feature(name, value if isinstance(value, list) else [value])
        for name, value in example.items()
    }


def _feature(name: str, values: list[Any]) -> tf.train.Feature:
    if all(isinstance(value, int) and -(2**63) <= value < 2**63 for value in values):  # Booleans too.
        return tf.train.Feature(int64_list=tf.train.Int64List(value=map(int, values)))
    if all(isinstance(value, float) for value in values):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    if all(isinstance(value, (str, dict)) for value in values):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[read_text(name, value) for value in values]))
    raise invalid(f"Feature: {name} has elements of unexpected or several types: {shown(values)}")


def write_results(outputs: Arrays, verb: str) -> bytes:
    """The body of a response: a number for each example, or a list of pairs of label and score.

    Raises:
        ServingError: the outputs are not those of the verb.
    """
    if verb == "regress":
        if set(outputs) != {"outputs"} or outputs["outputs"].size != len(outputs["outputs"]):
            raise invalid("A regression has one output, outputs, with one number an example.")
        results = json_texts("outputs", outputs["outputs"])
    else:
        results = _classes(outputs)
    return f'{{"results": [{", ".join(results)}]}}'.encode()


def _classes(outputs: Arrays) -> list[str]:
    """Label and score of each class in JSON; what a signature does not have is "" or 0."""
    shape = next(iter(outputs.values())).shape
    if not outputs.keys() <= {"classes", "scores"} or len(shape) != 2:
        raise invalid("A classification has the outputs classes and scores, or one of them, [examples, classes].")
    labels = json_texts("classes", outputs.get("classes", np.full(shape, b"", object)))
    scores = json_texts("scores", outputs.get("scores", np.zeros(shape, np.float32)))
    pairs = [f"[{label}, {score}]" for label, score in zip(labels, scores, strict=True)]
    size = shape[1]
    return [f"[{', '.join(pairs[row * size : (row + 1) * size])}]" for row in range(shape[0])]
