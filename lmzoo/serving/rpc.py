"""TF Serving's gRPC API, by its official stubs (from the extra `serving`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from lmzoo.serving.errors import ServingError, invalid
from lmzoo.serving.models import Models
from lmzoo.serving.protos import run_request

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_SIGNATURES = "signature_def"


@contextlib.contextmanager
def _aborting(context: Any) -> Iterator[None]:
    """Ends a call with the code of an error."""
    try:
        yield
    except ServingError as error:
        context.abort(_CODES[int(error.code)], str(error))


def _version(spec: Any) -> int | None:
    return spec.version.value if spec.HasField("version") else None


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predictions and metadata; classification and regression are unimplemented, as no exported signature has them.

    Args:
        models: what is served.
    """

    def __init__(self, models: Models) -> None:
        self._models = models

    def Predict(self, request: Any, context: Any) -> Any:
        """Runs a signature."""
        limits, spec = self._models.limits, request.model_spec
        with _aborting(context):
            used = self._models[spec.name].use(_version(spec), spec.version_label)
            with used as (version, servable), self._models.turn():
                outputs = run_request(servable, request, limits.max_request_bytes, limits.timeout_seconds)
            response = predict_pb2.PredictResponse(
                outputs={name: tf.make_tensor_proto(value) for name, value in outputs.items()}
            )
            response.model_spec.name = spec.name
            response.model_spec.version.value = version
            response.model_spec.signature_name = spec.signature_name or "serving_default"
            return response

    def GetModelMetadata(self, request: Any, context: Any) -> Any:
        """Gives the signatures."""
        spec = request.model_spec
        with _aborting(context):
            if not request.metadata_field:
                raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
            for field in request.metadata_field:
                if field != _SIGNATURES:
                    raise invalid(f"Metadata field {field} is not supported")
            with self._models[spec.name].use(_version(spec), spec.version_label) as (version, servable):
                signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=servable.signatures)
            response = get_model_metadata_pb2.GetModelMetadataResponse()
            response.model_spec.name = spec.name
            response.model_spec.version.value = version
            response.metadata[_SIGNATURES].Pack(signatures)
            return response


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """The states of models; their configuration cannot be changed.

    Args:
        models: what is served.
    """

    def __init__(self, models: Models) -> None:
        self._models = models

    def GetModelStatus(self, request: Any, context: Any) -> Any:
        """Gives the state of the versions of a model, or of one."""
        with _aborting(context):
            response = get_model_status_pb2.GetModelStatusResponse()
            for each in self._models[request.model_spec.name].statuses(_version(request.model_spec)):
                told = response.model_version_status.add(version=each.version)
                told.state = get_model_status_pb2.ModelVersionStatus.State.Value(each.state)
                told.status.error_code = int(each.code)
                told.status.error_message = each.message
            return response


@contextlib.contextmanager
def running(models: Models, host: str, port: int, grace_seconds: float = 5.0) -> Iterator[int]:
    """Serves over gRPC; gives the port, which is one that is free if `port` is 0.

    Raises:
        OSError: the address is taken, or not of this machine.
    """
    limits = models.limits
    server = grpc.server(
        futures.ThreadPoolExecutor(limits.max_concurrency + 2, thread_name_prefix="grpc"),
        maximum_concurrent_rpcs=limits.max_connections,
        options=[
            ("grpc.max_receive_message_length", limits.max_request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(PredictionService(models), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(models), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {address}: {error}") from error
    server.start()
    try:
        yield bound
    finally:
        server.stop(grace_seconds).wait()
