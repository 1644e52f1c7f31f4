"""TensorFlow's C API, which loads as TensorFlow Serving does, gives the texts of the pipeline."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from bundle import Bundle
from tiny_pipeline import PROMPTS, shared_model, tiny_tokenizer

from lmzoo.pipelines import TextGenerator


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc to compile the C program with")
    library = Path(tf.sysconfig.get_lib())
    names = ["libtensorflow_cc.so.2", "libtensorflow_framework.so.2"]
    missing = [name for name in names if not (library / name).is_file()]
    if missing:
        pytest.skip(f"this TensorFlow wheel has no {' and no '.join(missing)} to link against")
    path = tmp_path_factory.mktemp("c") / "load_saved_model"
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{tf.sysconfig.get_include()}"]
    command += [str(Path(__file__).with_name("load_saved_model.c")), "-o", str(path), f"-L{library}"]
    command += [*(f"-l:{name}" for name in names), f"-Wl,-rpath,{library}"]
    subprocess.run(command, check=True, timeout=300)
    return path


@pytest.fixture(scope="module")
def generator():
    return TextGenerator(shared_model(), tiny_tokenizer(), 10, stop_strings="the")


@pytest.fixture(scope="module")
def path(generator, tmp_path_factory):
    return generator.export(tmp_path_factory.mktemp("bundle"))


def run(program, path, *arguments):
    command = [program, path, *arguments]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, capture_output=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def strings(output):
    texts = []
    while output:
        size, _, output = output.partition(b"\n")
        texts.append(output[: int(size)].decode())
        output = output[int(size) + 1 :]
    return texts


def test_strings_and_seeds_give_the_texts_of_the_pipeline(program, path, generator):
    signatures = Bundle(path).signatures
    signature = signatures["generate"]
    names = [signature.inputs["text"].name, signature.outputs["text"].name]
    seed = ["--seed", signature.inputs["seed"].name, "5"]
    assert strings(run(program, path, "strings", *names, *seed, *PROMPTS)) == generator(PROMPTS, seed=5)
    served = signatures["serving_default"]
    names = [served.inputs["text"].name, served.outputs["text"].name]
    assert len(strings(run(program, path, "strings", *names, *PROMPTS))) == len(PROMPTS)
    assert strings(run(program, path, "strings", *names)) == []


def test_ids_give_the_logits_of_the_model(program, path):
    signature = Bundle(path).signatures["tokens"]
    token_ids = tiny_tokenizer().encode("the cat sat on the mat")
    names = [signature.inputs["token_ids"].name, signature.outputs["logits"].name]
    shape, *values = run(program, path, "ids", *names, *map(str, token_ids)).decode().splitlines()
    logits = shared_model()(np.array([token_ids])).numpy()
    assert [int(size) for size in shape.split()] == list(logits.shape)
    np.testing.assert_allclose(np.array(values, np.float32), logits.ravel(), atol=1e-5)


def test_what_cannot_be_loaded_is_an_error(program, tmp_path):
    done = subprocess.run([program, tmp_path, "ids", "a:0", "b:0"], capture_output=True, timeout=300, check=False)
    assert done.returncode == 1
    assert b"Could not find SavedModel" in done.stderr
