"""TensorFlow's C API, which loads as TensorFlow Serving does, gives the texts and scores of each kind of pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from bundle import Bundle
from c_program import compiled, run
from tiny_bundles import export_all, pipelines, requests
from tokenizer_texts import generated_strings

from lmzoo.serving.servable import graph_ops

# Prints the operations, of those in standard input, that a process with TensorFlow alone does not know.
UNKNOWN = """
import json, sys
sys.modules.update(dict.fromkeys(("lmzoo", "keras", "tensorflow_text")))
import tensorflow
from tensorflow.python.framework import op_def_registry
print(json.dumps([name for name in json.load(sys.stdin) if op_def_registry.get(name) is None]))
"""
# Operations that are in TensorFlow, but run Python, or only where its own compilers and clusters are.
UNSERVABLE = ("PyFunc", "EagerPyFunc", "PyFuncStateless", "Xla", "Tpu", "TPU", "Collective", "Custom")
# One bundle in the default tests; the slow ones run all.
NAMES = [name if name == "generator" else pytest.param(name, marks=pytest.mark.slow) for name in pipelines()]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def path(request, tmp_path_factory):
    """The version directory of a bundle."""
    return export_all(tmp_path_factory.mktemp("bundles"), (request.param,))[request.param] / "1"


everyone = pytest.mark.parametrize("path", NAMES, indirect=True)


def check(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        value = value.numpy()
        assert actual[name].shape == value.shape, name
        if value.dtype == np.float32:
            np.testing.assert_allclose(actual[name], value, atol=1e-5, err_msg=name)
        else:
            assert actual[name].tolist() == value.tolist(), name


@everyone
def test_any_strings_give_the_texts_and_scores_of_the_pipeline(program, path):
    strings = [
        string[:40] + b" [MASK] " + string[40:] if number % 2 else string
        for number, string in enumerate(generated_strings(200))
    ]
    signature = Bundle(path).signatures["serving_default"]
    pipeline = pipelines()[path.parent.name]
    columns = [strings[number:] + strings[:number] for number in range(len(signature.inputs))]
    inputs = {name: np.array(column, object) for name, column in zip(sorted(signature.inputs), columns, strict=True)}
    expected = pipeline(*(tf.constant(inputs[name]) for name in getattr(pipeline, "_inputs", ("text",))))
    check(run(program, path, signature, inputs), expected if isinstance(expected, dict) else {"text": expected})


@pytest.mark.slow
@pytest.mark.parametrize("path", ["generator"], indirect=True)
def test_every_signature_runs_with_its_defaults_too(program, path):
    signatures = {name: each for name, each in Bundle(path).signatures.items() if not name.startswith("__")}
    loaded = tf.saved_model.load(str(path))
    for name, inputs in requests(signatures).items():
        given = {key: value for key, value in inputs.items() if key not in signatures[name].defaults}
        expected = loaded.signatures[name](**{key: tf.constant(value) for key, value in inputs.items()})
        check(run(program, path, signatures[name], given), expected)


@everyone
def test_operations_are_those_of_tensorflow_itself(path):
    """What TF Serving links: TensorFlow's operations, and tensorflow-text's, of which there are none."""
    ops = graph_ops(path)
    assert {"MatMul", "StatefulPartitionedCall"} <= ops
    assert not [name for name in ops if name.startswith(UNSERVABLE)]
    command = [sys.executable, "-c", UNKNOWN]
    done = subprocess.run(command, input=json.dumps([*ops, "WhatsThis"]), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["WhatsThis"]


def test_a_library_brings_operations_that_a_bundle_needs(program, tmp_path):
    """As the test above shows no bundle of ours does; tensorflow-text's tokenizers do."""
    text = pytest.importorskip("tensorflow_text")
    module = tf.Module()
    tokenizer = text.WhitespaceTokenizer()
    split = tf.function(
        lambda text: {"words": tokenizer.tokenize(text).to_tensor()},
        input_signature=[tf.TensorSpec([None], tf.string, "text")],
    )
    tf.saved_model.save(module, str(tmp_path), signatures=split)
    signature = Bundle(tmp_path).signatures["serving_default"]
    inputs = {"text": np.array([b"a cat"], object)}
    with pytest.raises(AssertionError, match="Op type not registered"):
        run(program, tmp_path, signature, inputs)
    library = Path(text.__file__).parent / "python" / "ops" / "_whitespace_tokenizer_v2.so"
    words = run(program, tmp_path, signature, inputs, (library,))["words"]
    assert words.tolist() == [[b"a", b"cat"]]


def test_what_cannot_be_loaded_is_an_error(program, tmp_path):
    done = subprocess.run([program, tmp_path, "--", "b:0"], capture_output=True, timeout=300, check=False)
    assert done.returncode == 1
    assert b"Could not find SavedModel" in done.stderr
