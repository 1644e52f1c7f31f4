"""What a server gets beside the SavedModel: requests to warm up with, instructions, and versions that appear whole."""

import json
import os
import re
import sys

import pytest
import tensorflow as tf
from test_saved_model import content, watch

from lmzoo.export import read_signatures, saved_versions, write_bundle
from lmzoo.export.warmup import REQUESTS

NUM_EXPORTS = int(os.environ.get("LMZOO_NUM_EXPORTS", "10"))
TEXTS = ["a", "a b c d"]


class Repeat(tf.Module):
    """Gives each text as often as it is asked to, with a table of its own."""

    def __init__(self, number=0):
        super().__init__()
        self.number = tf.Variable(number)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, "text"),
            tf.TensorSpec([None], tf.float32, "scale"),
            tf.TensorSpec([None], tf.int32, "max_new_tokens"),
        ]
    )
    def repeat(self, text, scale=tf.constant([0.8]), max_new_tokens=tf.constant([64])):  # noqa: B008
        times = tf.cast(scale * 10.0, tf.int32) + max_new_tokens + self.number
        return {"text": tf.strings.join([text, tf.strings.as_string(times)])}

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32, "token_ids")])
    def tokens(self, token_ids):
        return {"logits": token_ids + self.number}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string), tf.TensorSpec([None, 2, 3, 4], tf.float32)])
    def both(self, text, key_0):
        return {"text": text, "key_0": key_0, "key_1": key_0}


def write(directory, number=0, **settings):
    module = Repeat(number)
    signatures = {"serving_default": module.repeat, "tokens": module.tokens, "both": module.both}
    return write_bundle(directory, module, signatures, texts=TEXTS, title="Repeater", **settings)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bundles") / "repeater")


def warmup_requests(path):
    from tensorflow_serving.apis import prediction_log_pb2

    records = tf.data.TFRecordDataset(str(path / REQUESTS)).as_numpy_iterator()
    return [prediction_log_pb2.PredictionLog.FromString(record).predict_log.request for record in records]


def replay(path):
    """Runs each warm-up request as a server does: by the signature, with the tensors of the request."""
    pytest.importorskip("tensorflow_serving")
    loaded = tf.saved_model.load(str(path))
    outputs = []
    for request in warmup_requests(path):
        inputs = {name: tf.constant(tf.make_ndarray(value)) for name, value in request.inputs.items()}
        outputs.append(loaded.signatures[request.model_spec.signature_name](**inputs))
    return outputs


def test_there_is_a_request_for_each_length_and_each_signature_on_strings(path):
    pytest.importorskip("tensorflow_serving")
    requests = warmup_requests(path)
    assert [request.model_spec.signature_name for request in requests] == ["serving_default"] * 2
    assert [request.inputs["text"].string_val[0] for request in requests] == [b"a", b"a b c d"]
    assert [set(request.inputs) for request in requests] == [{"text", "scale", "max_new_tokens"}] * 2
    # What the default asks for, but for two new tokens.
    assert [outputs["text"].numpy().tolist() for outputs in replay(path)] == [[b"a10"], [b"a b c d10"]]


def test_without_the_messages_of_a_server_there_is_a_warning_and_a_model(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.warns(UserWarning, match=r"no warm-up requests were written.*pip install 'lmzoo\[serving\]'"):
        path = write(tmp_path)
    assert not (path / REQUESTS).exists()
    assert tf.saved_model.load(str(path)).signatures["tokens"](token_ids=tf.constant([[1]]))


def test_the_page_beside_the_versions_says_how_to_serve_and_to_call(path):
    page = (path.parent / "README.md").read_text()
    assert "tensorflow_model_server --model_name=repeater " in page
    assert "docker run " in page
    for line in (
        "### `both`",
        "| in | `scale` | float32 [?] | 0.8 |",
        "| in | `token_ids` | int32 [?, ?] |  |",
        "| out | `key_0` and 1 more | float32 [?, 2, 3, 4] |  |",
    ):
        assert line in page
    loaded = tf.saved_model.load(str(path))
    bodies = [json.loads(body) for body in re.findall(r"curl -d '(.*)' localhost:8501/v1/models/repeater:", page)]
    assert [body["signature_name"] for body in bodies] == ["serving_default", "tokens"]
    for body in bodies:
        infos = read_signatures(path)[body["signature_name"]].inputs
        assert set(body["inputs"]) == set(infos)
        inputs = {name: tf.constant(value, infos[name].dtype) for name, value in body["inputs"].items()}
        loaded.signatures[body["signature_name"]](**inputs)
    # A server refuses digits that are no float32.
    assert '"scale": [0.8]' in page


def test_what_somebody_made_his_own_is_left_alone(tmp_path):
    write(tmp_path)
    (tmp_path / "batching_parameters.txt").write_text("mine")
    (tmp_path / "README.md").write_text("mine too")
    write(tmp_path)
    assert (tmp_path / "batching_parameters.txt").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == "mine too"
    assert saved_versions(tmp_path) == [1, 2]


@pytest.mark.slow
def test_a_watcher_that_loads_and_warms_up_each_version_at_once_meets_whole_ones_only(tmp_path):
    def serve(path):
        return content(path), [outputs["text"].numpy().tolist() for outputs in replay(path)]

    seen = watch(tmp_path, serve, lambda: [write(tmp_path, number) for number in range(NUM_EXPORTS)])
    assert sorted(seen) == list(range(1, NUM_EXPORTS + 1))
    for version, (files, answers) in seen.items():
        assert files == content(tmp_path / str(version))
        assert answers == [[b"a%d" % (9 + version)], [b"a b c d%d" % (9 + version)]]
