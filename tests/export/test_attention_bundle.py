"""The signature that tells attention needs what the others need: a process with TensorFlow."""

import numpy as np
import pytest
import tensorflow as tf
from bundle import Bundle, run_elsewhere
from test_bundle import warmup_requests
from tiny_bundles import pipelines
from tiny_encoders import TEXTS, task_model, tiny_tokenizer

from lmzoo.pipelines import TextEmbedder

pytest.importorskip("tensorflow_serving.apis")
pytestmark = pytest.mark.slow


def check(pipeline, directory):
    path = pipeline.export(directory, attention=True)
    inputs = dict.fromkeys(pipeline._inputs, TEXTS)
    expected = {name: value.numpy() for name, value in pipeline._attention(*map(tf.constant, inputs.values())).items()}
    actual, nothing = run_elsewhere([(path, "attention", each) for each in (inputs, {key: [] for key in inputs})])
    assert actual["tokens"] == np.char.decode(expected["tokens"].astype(bytes), "utf-8").tolist()
    np.testing.assert_allclose(actual["attention"], expected["attention"], atol=1e-5)
    assert nothing == {"tokens": [], "attention": []}

    signature = Bundle(path).signatures["attention"]
    assert set(signature.inputs) == set(inputs)
    kinds = {name: (tf.as_dtype(info.dtype), len(info.tensor_shape.dim)) for name, info in signature.outputs.items()}
    assert kinds == {"tokens": (tf.string, 2), "attention": (tf.float32, 5)}
    requests = [each for each in warmup_requests(path) if each.model_spec.signature_name == "attention"]
    assert len(requests) > 1
    assert '"signature_name": "attention"' in (directory / "README.md").read_text()


def test_a_process_with_tensorflow_alone_gives_the_same(tmp_path):
    check(TextEmbedder(task_model("embeddings"), tiny_tokenizer()), tmp_path / "embedder")


@pytest.mark.parametrize("name", ["generator", "translator", "answerer"])
def test_each_kind_of_pipeline_gives_the_same_elsewhere(name, tmp_path):
    check(pipelines()[name], tmp_path / name)
