"""Requests that a server runs before it says that a model is ready, so that the first user does not wait."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

# Where TF Serving looks for them, and how many records it takes.
REQUESTS = Path("assets.extra", "tf_serving_warmup_requests")
_MAX_RECORDS = 1000
# What would take long, and runs the same operations in less.
_SHORTER = {"max_new_tokens": 2}


def write_warmup(path: Path, signatures: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Writes a request for each signature that reads strings and nothing else without a default, with each text.

    Without tensorflow-serving-api, whose messages they are, it warns and writes none.

    Args:
        path: of the SavedModel.
        signatures: name -> `SignatureDef`.
        texts: one for each length that requests may have.
    """
    try:
        from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_log_pb2
    except ImportError:
        warnings.warn(
            "no warm-up requests were written, for want of tensorflow-serving-api: pip install 'lmzoo[serving]'.",
            stacklevel=2,
        )
        return
    file = path / REQUESTS
    file.parent.mkdir()
    requests = [
        predict_pb2.PredictRequest(model_spec=model_pb2.ModelSpec(signature_name=name), inputs=inputs)
        for name, signature in signatures.items()
        for inputs in _inputs(signature, texts)
    ]
    with tf.io.TFRecordWriter(str(file)) as writer:
        for request in requests[:_MAX_RECORDS]:
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
            writer.write(log.SerializeToString())


def _inputs(signature: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The inputs of a signature for each text; none where it needs something else than texts."""
    strings = [name for name, info in signature.inputs.items() if info.dtype == tf.string.as_datatype_enum]
    if not strings or set(signature.inputs) != {*strings, *signature.defaults}:
        return []
    others = dict(signature.defaults)
    for name in _SHORTER.keys() & others.keys():
        others[name] = tf.make_tensor_proto([_SHORTER[name]], tf.make_ndarray(others[name]).dtype)
    return [{**others, **{name: tf.make_tensor_proto([text]) for name in strings}} for text in texts]
