"""Every signature of every kind of bundle gives over REST and over gRPC what the SavedModel gives."""

import base64

import numpy as np
import pytest
import tensorflow as tf
from client import call
from tiny_bundles import export_all, pipelines, requests

from lmzoo.serving import model_server
from lmzoo.serving.servable import read_saved_model

grpc = pytest.importorskip("grpc")
apis = pytest.importorskip("tensorflow_serving.apis")
from tensorflow_serving.apis import (  # noqa: E402
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)


@pytest.fixture(scope="module")
def served(request, tmp_path_factory):
    """Directory of a bundle, URL of its REST API, channel of its gRPC."""
    directory = export_all(tmp_path_factory.mktemp("bundles"), (request.param,), attention=True)[request.param]
    with model_server([directory]) as addresses, grpc.insecure_channel(addresses.grpc) as channel:
        yield directory, addresses.rest, channel


def signatures_of(directory):
    return read_saved_model(directory / "1").meta_graphs[0].signature_def


def as_json(value):
    """Strings of the last row go as base64, which the others could too."""
    if value.dtype != object:
        return value.tolist()
    *texts, last = value.tolist()
    return [*(text.decode() for text in texts), {"b64": base64.b64encode(last).decode()}]


def check(actual, expected):
    expected = expected.numpy()
    if expected.dtype == object:
        actual = np.array(actual, object)
        decoded = np.array([text.decode("utf-8", "replace") for text in expected.ravel()], object)
        assert actual.shape == expected.shape
        assert actual.ravel().tolist() == decoded.tolist()
    else:
        np.testing.assert_allclose(np.array(actual, expected.dtype).reshape(expected.shape), expected, atol=1e-5)


def predict(channel, name, signature, inputs, **spec):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for key, value in spec.items():
        getattr(request.model_spec, key).value = value
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("served", pipelines(), indirect=True)
def test_every_signature_makes_the_round_trip(served):
    directory, url, channel = served
    name, path = directory.name, f"/v1/models/{directory.name}:predict"
    signatures = signatures_of(directory)
    loaded = tf.saved_model.load(str(directory / "1"))
    made = requests({key: value for key, value in signatures.items() if not key.startswith("__")})
    assert {"serving_default", "attention"} <= set(made)
    for signature, inputs in made.items():
        expected = loaded.signatures[signature](**{key: tf.constant(value) for key, value in inputs.items()})
        columns = {key: as_json(value) for key, value in inputs.items()}
        status, answer = call(url, path, {"signature_name": signature, "inputs": columns})
        assert status == 200, answer
        outputs = answer["outputs"] if len(expected) > 1 else {next(iter(expected)): answer["outputs"]}
        assert set(outputs) == set(expected)

        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        rows = rows if len(columns) > 1 else [row[next(iter(columns))] for row in rows]
        status, answer = call(url, path, {"signature_name": signature, "instances": rows})
        assert status == 200, answer
        predictions = answer["predictions"]
        response = predict(channel, name, signature, inputs)
        assert response.model_spec.version.value == 1
        for key, value in expected.items():
            check(outputs[key], value)
            check([row[key] for row in predictions] if len(expected) > 1 else predictions, value)
            over_grpc = tf.make_ndarray(response.outputs[key])
            if over_grpc.dtype == object:
                assert over_grpc.tolist() == value.numpy().tolist()
            else:
                check(over_grpc, value)


@pytest.mark.parametrize("served", ["generator"], indirect=True)
def test_grpc_fills_in_defaults_and_tells_what_is_wrong(served):
    directory, _, channel = served
    text = {"text": np.array([b"the cat"], object)}
    whole = predict(channel, directory.name, "", text)
    assert whole.model_spec.signature_name == "serving_default"
    one = predict(channel, directory.name, "generate", {**text, "max_new_tokens": np.array([1], np.int32)})
    first, only = (response.outputs["text"].string_val[0] for response in (whole, one))
    assert first.startswith(only)
    assert len(only) < len(first)
    assert predict(channel, directory.name, "generate", text).outputs["text"].string_val[0] == first

    wrong = tf.make_tensor_proto(np.array([1.0]))
    for (name, signature, inputs, spec), code in {
        ("other", "", (), ()): grpc.StatusCode.NOT_FOUND,
        ("generator", "", (), (("version", 9),)): grpc.StatusCode.NOT_FOUND,
        ("generator", "nothing", (), ()): grpc.StatusCode.INVALID_ARGUMENT,
        ("generator", "", (), ()): grpc.StatusCode.INVALID_ARGUMENT,
        ("generator", "", (("text", 1.0),), ()): grpc.StatusCode.INVALID_ARGUMENT,
        ("generator", "tokens", (("token_ids", ((10**6,),)),), ()): grpc.StatusCode.INVALID_ARGUMENT,
    }.items():
        values = {key: np.array(value) for key, value in inputs}
        with pytest.raises(grpc.RpcError) as raised:
            predict(channel, name, signature, values, **dict(spec))
        assert raised.value.code() == code

    request = predict_pb2.PredictRequest()
    request.model_spec.name = directory.name
    request.inputs["text"].CopyFrom(wrong)
    request.inputs["text"].tensor_shape.dim[0].size = 2**40
    with pytest.raises(grpc.RpcError, match="values at most"):
        prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=60)


@pytest.mark.parametrize("served", ["generator"], indirect=True)
def test_grpc_gives_metadata_and_status(served):
    directory, _, channel = served
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = directory.name
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    response = stub.GetModelMetadata(request, timeout=60)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert signatures.signature_def["generate"] == signatures_of(directory)["generate"]
    request.metadata_field[0] = "weights"
    with pytest.raises(grpc.RpcError, match="weights is not supported"):
        stub.GetModelMetadata(request, timeout=60)

    status = get_model_status_pb2.GetModelStatusRequest()
    status.model_spec.name = directory.name
    models = model_service_pb2_grpc.ModelServiceStub(channel)
    (told,) = models.GetModelStatus(status, timeout=60).model_version_status
    assert (told.version, told.state, told.status.error_code) == (1, told.AVAILABLE, 0)
    status.model_spec.name = "other"
    with pytest.raises(grpc.RpcError) as raised:
        models.GetModelStatus(status, timeout=60)
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
