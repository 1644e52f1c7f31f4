"""The newest version of a directory is served, whatever comes and goes there, and no request is dropped."""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from client import call
from small_models import export_small

from lmzoo.serving import Limits, model_server, models
from lmzoo.serving.errors import Code, ServingError
from lmzoo.serving.models import ServedModel
from lmzoo.serving.servable import Servable

ONE = {"x": np.ones(1, np.float32)}


@pytest.fixture
def model(tmp_path):
    made = ServedModel("small", tmp_path / "small")
    export_small(made.directory)
    made.poll()
    yield made
    made.close()


def states(model):
    return {status.version: status.state for status in model.statuses()}


def result(model):
    with model.use() as (version, servable):
        return version, servable.run("", ONE)["y"].tolist()


def test_a_newer_version_takes_over_and_the_older_one_ends(model):
    assert result(model) == (1, [2.0])
    export_small(model.directory, 5.0, version=4)
    assert result(model) == (1, [2.0])
    model.poll()
    assert result(model) == (4, [6.0])
    assert states(model) == {4: "AVAILABLE", 1: "END"}
    with pytest.raises(ServingError, match=r"Specific\(small, 1\)") as raised, model.use(1):
        pass
    assert raised.value.code == Code.NOT_FOUND


def test_a_request_keeps_the_version_that_it_began_with(model):
    with model.use() as (version, servable):
        export_small(model.directory, 5.0)
        model.poll()
        assert states(model) == {2: "AVAILABLE", 1: "UNLOADING"}
        assert version == 1
        assert servable.run("", ONE)["y"].tolist() == [2.0]
        assert result(model) == (2, [6.0])
    assert states(model)[1] == "END"
    with pytest.raises(ServingError, match="closed"):
        servable.run("", ONE)


def break_variables(path):
    (path / "variables" / "variables.index").unlink()


@pytest.mark.parametrize(
    ("make_broken", "message"),
    [
        (lambda path: path.mkdir(), "saved_model.pb"),
        (lambda path: (path.mkdir(), (path / "saved_model.pb").write_bytes(b"half")), "no SavedModel"),
        (lambda path: break_variables(export_small(path.parent, version=int(path.name))), "variables"),
    ],
)
def test_a_version_that_cannot_be_loaded_is_told_of_and_the_one_before_is_served(
    model, make_broken, message, monkeypatch
):
    tries = []
    monkeypatch.setattr(models, "Servable", lambda *settings: tries.append(settings) or Servable(*settings))
    make_broken(model.directory / "7")
    for _ in range(7):
        model.poll()
    assert len(tries) == 5
    newest = model.statuses()[0]
    assert (newest.version, newest.state) == (7, "END")
    assert newest.code != Code.OK
    assert message in newest.message
    assert result(model) == (1, [2.0])
    export_small(model.directory, 9.0, version=8)
    model.poll()
    assert result(model) == (8, [10.0])


def test_the_version_is_served_on_when_its_directory_is_deleted(model):
    shutil.rmtree(model.directory)
    model.poll()
    assert result(model) == (1, [2.0])


def write_warmup(path, *requests):
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    (path / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(path / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        for signature, inputs in requests:
            request = predict_pb2.PredictRequest()
            request.model_spec.signature_name = signature
            for name, value in inputs.items():
                request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
            writer.write(log.SerializeToString())


def test_warmup_requests_are_run_before_a_version_is_served(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_serving")
    ran, closed = [], []
    close = Servable.close
    monkeypatch.setattr(Servable, "close", lambda self: closed.append(self.path.name) or close(self))
    run = Servable.run
    monkeypatch.setattr(Servable, "run", lambda self, name, *rest: ran.append(name) or run(self, name, *rest))
    model = ServedModel("small", tmp_path)
    write_warmup(export_small(tmp_path), ("", {"x": [1.0]}), ("repeat", {"text": [b"a"]}))
    model.poll()
    assert ran == ["", "repeat"]
    assert states(model) == {1: "AVAILABLE"}
    write_warmup(export_small(tmp_path), ("pick", {"index": np.array([99], np.int32)}))
    model.poll()
    assert states(model) == {2: "END", 1: "AVAILABLE"}
    assert closed == ["2"]
    assert "indices[0] = 99" in model.statuses()[0].message
    model.close()


def test_operations_that_no_server_has_are_refused_by_name(model):
    path = export_small(model.directory)
    graph = (path / "saved_model.pb").read_bytes()
    (path / "saved_model.pb").write_bytes(graph.replace(b"GatherV2", b"GatherV9"))
    model.poll()
    assert "neither TensorFlow nor tensorflow-text has" in model.statuses()[0].message
    assert "GatherV9" in model.statuses()[0].message


@pytest.mark.parametrize("make", [lambda path: path, lambda path: export_small(path)])
def test_a_bundle_that_is_none_is_an_error_that_says_what_to_do(tmp_path, make):
    path = make(tmp_path)
    message = "no numbered version" if path == tmp_path else f"give {tmp_path}"
    with pytest.raises(ValueError, match=message), model_server([path], grpc_port=None):
        pass
    with pytest.raises(FileNotFoundError, match="no directory"), model_server([tmp_path / "nowhere"]):
        pass
    with pytest.raises(ValueError, match="max_rows is 0"):
        Limits(max_rows=0)


def reload_while_asked(directory, num_versions):
    """Exports versions, waits for each to be served, and gives all answers of clients that never stop asking."""
    export_small(directory, 0.0)
    done = threading.Event()

    def ask(url):
        answers = []
        while not done.is_set():
            answers.append(call(url, "/v1/models/small:predict", {"instances": [0.5]}))
        return answers

    with (
        model_server([directory], grpc_port=None, poll_seconds=0.02) as addresses,
        ThreadPoolExecutor(2) as pool,
    ):
        asked = [pool.submit(ask, addresses.rest) for _ in range(2)]
        try:
            for number in range(1, num_versions + 1):
                export_small(directory, float(number))
                shutil.rmtree(directory / str(number), ignore_errors=True)
                end = time.monotonic() + 60
                while call(addresses.rest, f"/v1/models/small/versions/{number + 1}")[0] != 200:
                    assert time.monotonic() < end
        finally:
            done.set()
        return [each.result() for each in asked], call(addresses.rest, "/v1/models/small")[1]


# More of them with LMZOO_TEST_RELOADS.
MANY = int(os.environ.get("LMZOO_TEST_RELOADS", "25"))


@pytest.mark.parametrize("num_versions", [3, pytest.param(MANY, marks=pytest.mark.slow)])
def test_no_request_is_dropped_while_versions_come(tmp_path, num_versions):
    asked, statuses = reload_while_asked(tmp_path / "small", num_versions)
    for answers in asked:
        assert {status for status, _ in answers} == {200}
        numbers = [answer["predictions"][0] - 0.5 for _, answer in answers]
        assert numbers == sorted(numbers)
        assert set(numbers) <= set(map(float, range(num_versions + 1)))
    codes = {each["status"]["error_code"] for each in statuses["model_version_status"]}
    assert codes == {"OK"}, json.dumps(statuses)
