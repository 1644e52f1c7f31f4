"""Requests over REST and their answers: formats, types, limits and errors, on SavedModels of a few operations."""

import http.client
import json
import math
import socket
import threading
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest
import tensorflow as tf
from client import call, send
from small_models import export_small

from lmzoo.export import write_saved_model
from lmzoo.serving import Limits, model_server
from lmzoo.serving.servable import read_saved_model

LIMITS = Limits(max_request_bytes=4096, max_rows=5, max_connections=8, queue_seconds=0.5, timeout_seconds=2)
MIXED = {"text": ["a", "é"], "pair": [[1, 2]], "big": -(2**63), "truth": [True, False], "any_shape": [[0.1], [2]]}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "small"
    export_small(directory, version=3)
    with model_server([directory], grpc_port=None, limits=LIMITS) as addresses:
        yield addresses.rest


def predict(url, request, path="/v1/models/small:predict"):
    return call(url, path, request)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"instances": [1, 2.5]}, {"predictions": [2.0, 3.5]}),
        ({"instances": [{"x": 1}]}, {"predictions": [2.0]}),
        ({"inputs": [1, 2.5]}, {"outputs": [2.0, 3.5]}),
        ({"inputs": {"x": []}, "signature_name": "serving_default"}, {"outputs": []}),
        ({"signature_name": "repeat", "inputs": {"text": ["ab"], "times": [3]}}, {"outputs": ["ababab"]}),
        (
            {"signature_name": "repeat", "instances": [{"text": {"b64": "w6k"}, "times": 2}]},
            {"predictions": ["éé"]},
        ),
        (
            {"signature_name": "mixed", "inputs": MIXED},
            {"outputs": {**MIXED, "raw_bytes": [{"b64": "YQ=="}, {"b64": "w6k="}], "text": None}},
        ),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models/small:predict", "/v1/models/small/versions/3:predict"])
def test_a_request_is_answered_in_its_own_format(url, request_, expected, path):
    if isinstance(expected.get("outputs"), dict):
        expected = {"outputs": {name: value for name, value in expected["outputs"].items() if value is not None}}
    assert predict(url, request_, path) == (200, expected)


def test_bytes_go_in_and_out_as_base64(url):
    request = {**MIXED, "text": [{"b64": "/wA="}], "truth": []}
    status, answer = predict(url, {"signature_name": "mixed", "inputs": request})
    assert (status, answer["outputs"]["raw_bytes"]) == (200, [{"b64": "/wA="}])


def test_floats_are_written_as_tf_serving_writes_them(url):
    # One is added in float32: six digits if they are enough, else nine, and a point or an exponent in any case.
    body = json.dumps({"inputs": [0.25, 0.2, 1 / 3, -1.0]}).encode()
    assert send(url, "POST", "/v1/models/small:predict", body)[1] == b'{"outputs": [1.25, 1.2, 1.33333337, 0.0]}'
    body = json.dumps({"inputs": [1e10, 9e6, -1 + 2**-20]}).encode()
    assert send(url, "POST", "/v1/models/small:predict", body)[1] == b'{"outputs": [1e+10, 9000001.0, 9.53674316e-07]}'
    body = b'{"signature_name": "pick", "inputs": [0, 1, 2]}'
    assert send(url, "POST", "/v1/models/small:predict", body)[1] == b'{"outputs": [1.5, NaN, Infinity]}'
    status, answer = predict(url, b'{"inputs": [NaN, -Infinity]}')
    assert status == 200
    assert math.isnan(answer["outputs"][0])
    assert answer["outputs"][1] == -math.inf


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"", "JSON Parse error"),
        (b'{"instances": [1', "JSON Parse error"),
        (b"\xff{}", "JSON Parse error"),
        (b"[" * 100, "JSON Parse error"),
        (b'{"inputs": [1e999]}', "too big"),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", "but may have"),
        ([1], "Is not object"),
        ({}, "Missing 'inputs' or 'instances' key"),
        ({"inputs": [1], "instances": [1]}, "only one of"),
        ({"instances": 1}, "to be an list/array"),
        ({"instances": []}, "No values in 'instances'"),
        ({"instances": [1, {"x": 1}]}, "Expecting value/list but got object at item 1"),
        ({"instances": [{"x": 1}, 1]}, "Expecting object but got value/list at item 1"),
        ({"instances": [{"z": 1}]}, "does not have named input: 'z'"),
        ({"instances": [{}]}, "keys must be equal to: x"),
        ({"inputs": {}}, "Missing named input: x"),
        ({"inputs": {"x": [1], "y": [1]}}, "does not have named input: 'y'"),
        ({"inputs": ["1"]}, "not of expected type: float32"),
        ({"inputs": [True]}, "not of expected type: float32"),
        ({"inputs": [None]}, "not of expected type: float32"),
        ({"inputs": [1e39]}, "without loss of precision"),
        ({"inputs": [2**24 + 1]}, "without loss of precision"),
        ({"inputs": [[1], [1, 2]]}, "expected a list of size: 1"),
        ({"inputs": [[1], 1]}, "expected a list of size: 1"),
        ({"inputs": 1}, "has the shape []"),
        ({"inputs": [[1]]}, "has the shape [1, 1]"),
        ({"inputs": [1, 2, 3, 4, 5, 6]}, "has 6 rows, but this server takes 5"),
        (b'{"inputs": ' + b"[" * 900 + b"]" * 900 + b"}", "lists deep"),
        ({"inputs": [1], "signature_name": 1}, "must be a string value"),
        ({"inputs": [1], "signature_name": "nothing"}, "not found in signature def"),
        ({"inputs": [3], "signature_name": "pick"}, "indices[0] = 3 is not in [0, 3)"),
        ({"inputs": [2.0], "signature_name": "pick"}, "not of expected type: int32"),
        ({"inputs": [2**31], "signature_name": "pick"}, "not of expected type: int32"),
        ({"inputs": {"text": ["a"]}, "signature_name": "repeat"}, "Missing named input: times"),
        ({"instances": ["a"], "signature_name": "repeat"}, "multiple input tensors"),
        ({"inputs": {"text": [{"b64": "?"}], "times": [1]}, "signature_name": "repeat"}, "Unable to base64 decode"),
        ({"inputs": {"text": [{"b65": ""}], "times": [1]}, "signature_name": "repeat"}, "expected type: string"),
        (b'{"inputs": {"text": ["\\ud800"], "times": [1]}, "signature_name": "repeat"}', "surrogate"),
        ({"instances": [{**MIXED, "big": 1, "any_shape": 1}], "signature_name": "mixed"}, "has the shape"),
    ],
)
def test_a_bad_request_is_told_what_is_bad(url, request_, message):
    status, answer = predict(url, request_)
    assert list(answer) == ["error"]
    assert message in answer["error"]
    assert status == (413 if "may have" in message else 400)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/models/other:predict", 404),
        ("POST", "/v1/models/small/versions/4:predict", 404),
        ("POST", f"/v1/models/small/versions/{'9' * 300}:predict", 400),
        ("POST", "/v1/models/small/labels/stable:predict", 400),
        ("POST", "/v1/models/small:predicted", 404),
        ("POST", "/v1/models/small:classify", 400),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/other/metadata", 404),
        ("GET", "/v1/models/small/versions/4", 404),
        ("GET", "/v1/models/small:predict", 405),
        ("DELETE", "/v1/models/small", 405),
        ("POST", "/v1/models/small/metadata", 405),
        ("BREW", "/v1/models/small", 501),
        ("GET", "/", 404),
        ("GET", "/" + "x" * 70_000, 414),
    ],
)
def test_paths_and_methods_that_are_none(url, method, path, status):
    got, body, headers = send(url, method, path, b'{"inputs": [1]}' if method == "POST" else None)
    assert got == status
    assert list(json.loads(body)) == ["error"]
    assert (status == 405) == ("Allow" in headers)


def raw(url, *pieces, pause=0.0):
    """What comes back for bytes that are sent as they are."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v1/models/small HTTP/9.9\r\n\r\n", 505),
        (b"POST /v1/models/small:predict HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/models/small:predict HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/models/small:predict HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /v1/models/small:predict HTTP/1.1\r\nContent-Length: 99999\r\n\r\n", 413),
        (b"POST /v1/models/small:predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST /v1/models/small:predict HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", 415),
        (b"POST /v1/models/small:predict HTTP/1.1\r\nContent-Length: 9\r\n\r\nx", 408),
    ],
)
def test_broken_http_is_answered_in_json(url, head, status):
    answer = raw(url, head)
    assert answer.split()[1] == str(status).encode()
    assert list(json.loads(answer.partition(b"\r\n\r\n")[2])) == ["error"]


def test_a_connection_serves_many_requests_also_after_an_error(url):
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    for body, status in ((b'{"inputs": [1]}', 200), (b"{", 400), (b'{"inputs": [1]}', 200)):
        connection.request("POST", "/v1/models/small:predict", body)
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (status, True)
    connection.close()


def test_what_runs_too_long_is_given_up_and_others_wait_for_their_turn(url):
    slow = {"signature_name": "slow", "inputs": [2**31 - 1]}
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(predict(url, slow))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(status for status, _ in answers) == [503, 504, 504, 504, 504]
    assert all("error" in answer for _, answer in answers)
    assert predict(url, {"inputs": [1]}) == (200, {"outputs": [2.0]})


def test_connections_beyond_the_limit_are_refused_and_come_back(url):
    address = urlsplit(url)
    with ExitStack() as stack:
        for _ in range(LIMITS.max_connections):
            stack.enter_context(socket.create_connection((address.hostname, address.port)))
        time.sleep(0.2)
        answer = raw(url, b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After" in answer
    end = time.monotonic() + 30
    while send(url, "GET", "/v1/models/small")[0] != 200:
        assert time.monotonic() < end


def test_status_and_metadata_say_what_tf_serving_says(url):
    ok = {"error_code": "OK", "error_message": ""}
    told = {"model_version_status": [{"version": "3", "state": "AVAILABLE", "status": ok}]}
    assert call(url, "/v1/models/small") == call(url, "/v1/models/small/versions/3") == (200, told)
    status, answer = call(url, "/v1/models/small/metadata")
    assert status == 200
    assert answer["model_spec"] == {"name": "small", "signature_name": "", "version": "3"}
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    assert set(signatures) == {"serving_default", "mixed", "repeat", "slow", "pick"}
    assert signatures["serving_default"]["method_name"] == "tensorflow/serving/predict"
    assert signatures["serving_default"]["inputs"]["x"]["dtype"] == "DT_FLOAT"
    assert signatures["mixed"]["inputs"]["pair"]["tensor_shape"] == {
        "dim": [{"size": "-1", "name": ""}, {"size": "2", "name": ""}],
        "unknown_rank": False,
    }
    assert signatures["repeat"]["defaults"]["times"]["int_val"] == [2]
    assert send(url, "HEAD", "/v1/models/small")[:2] == (200, b"")


class Examples(tf.Module):
    """Signatures for examples: sums their numbers, and says which words they have."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "inputs")])
    def add(self, inputs):
        features = {"a": tf.io.FixedLenFeature([2], tf.float32), "b": tf.io.FixedLenFeature([], tf.int64)}
        parsed = tf.io.parse_example(inputs, features)
        return {"outputs": tf.reduce_sum(parsed["a"], 1) + tf.cast(parsed["b"], tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "inputs")])
    def name(self, inputs):
        words = tf.io.parse_example(inputs, {"words": tf.io.FixedLenFeature([2], tf.string)})["words"]
        return {"classes": words, "scores": tf.cast(tf.strings.length(words), tf.float32) / 10.0}


@pytest.fixture(scope="module")
def examples_url(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "examples"
    module = Examples()
    path = write_saved_model(directory, module, {"serving_default": module.add, "name": module.name})
    saved_model = read_saved_model(path)
    signatures = saved_model.meta_graphs[0].signature_def
    signatures["serving_default"].method_name = "tensorflow/serving/regress"
    signatures["name"].method_name = "tensorflow/serving/classify"
    (path / "saved_model.pb").write_bytes(saved_model.SerializeToString())
    with model_server([directory], grpc_port=None) as addresses:
        yield addresses.rest


def test_examples_are_classified_and_regressed(examples_url):
    path = "/v1/models/examples"
    request = {"context": {"b": 1}, "examples": [{"a": [0.5, 1.0]}, {"a": [0.1, 0.1], "b": [True]}]}
    assert call(examples_url, f"{path}:regress", request) == (200, {"results": [2.5, 1.2]})
    request = {"signature_name": "name", "examples": [{"words": ["é", {"b64": "YWI="}]}]}
    assert call(examples_url, f"{path}:classify", request) == (200, {"results": [[["é", 0.2], ["ab", 0.2]]]})
    for verb, bad, message in (
        ("regress", {"signature_name": "name", "examples": [{}]}, "Was: tensorflow/serving/classify"),
        ("regress", {"examples": []}, "'examples'"),
        ("regress", {"examples": [1]}, "must be JSON object"),
        ("regress", {"examples": [{"a": [1.0, "x"]}]}, "several types"),
        ("regress", {"examples": [{"a": [1.0]}]}, "a"),
        ("regress", b'{"examples": [{"\\ud800": 1}]}', "surrogate"),
    ):
        status, answer = call(examples_url, f"{path}:{verb}", bad)
        assert (status, list(answer)) == (400, ["error"])
        assert message in answer["error"]
