"""Requests and responses as protocol buffers: TensorProto to array and back, and the records that warm a server up."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.serving.errors import invalid
from lmzoo.serving.servable import Arrays, Servable

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
# As in TF Serving, for which a file with more of them is broken.
_MAX_WARMUP_RECORDS = 1000


def has_serving_api() -> bool:
    """Whether the official protocol buffers and stubs of TF Serving are installed."""
    return find_spec("tensorflow_serving") is not None


def run_request(servable: Servable, request: Any, max_values: int, seconds: float) -> Arrays:
    """The outputs that a PredictRequest asks for.

    Args:
        servable: what runs it.
        request: its inputs, the name of its signature, and the outputs that it wants.
        max_values: the most values of an input, which a few bytes can claim to have.
        seconds: the run is given up after so long.

    Raises:
        ServingError: an input is no tensor, or as `Servable.run`.
    """
    inputs = {name: read_tensor_proto(name, value, max_values) for name, value in request.inputs.items()}
    return servable.run(request.model_spec.signature_name, inputs, request.output_filter, seconds)


def read_tensor_proto(name: str, proto: Any, max_values: int) -> np.ndarray:
    """A TensorProto as an array.

    Raises:
        ServingError: it is broken, or has more than `max_values` values.
    """
    sizes = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        raise invalid(f"input {name} has no full shape: {sizes}.")
    if math.prod(sizes) > max_values:
        raise invalid(f"input {name} has the shape {sizes}, but this server takes {max_values} values at most.")
    try:
        return tf.make_ndarray(proto)
    except Exception as error:  # What it raises for a broken one depends on what is broken, and is said nowhere.
        raise invalid(f"input {name} is no tensor: {error}") from error


def replay_warmup(servable: Servable, seconds: float = 60.0) -> int:
    """Runs the requests that a SavedModel brings along, as TF Serving does before it takes others.

    Args:
        servable: whose requests they are.
        seconds: for each request.

    Returns:
        How many there were; 0 also where the protocol buffers of TF Serving are not installed.

    Raises:
        ServingError: a request failed.
        ValueError: a record is not one of a PredictRequest, or there are too many.
        tf.errors.OpError: the file is broken.
    """
    file = servable.path / WARMUP_FILE
    if not file.is_file() or not has_serving_api():
        return 0
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    count = 0
    for record in tf.compat.v1.io.tf_record_iterator(str(file)):
        log = PredictionLog.FromString(record)
        if log.WhichOneof("log_type") != "predict_log":
            raise ValueError(f"{file} has a record that is no PredictLog, which the development server cannot replay.")
        count += 1
        if count > _MAX_WARMUP_RECORDS:
            raise ValueError(f"{file} has more than {_MAX_WARMUP_RECORDS} records, which TF Serving refuses.")
        run_request(servable, log.predict_log.request, 2**31, seconds)
    return count
