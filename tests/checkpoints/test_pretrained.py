"""from_pretrained and save_pretrained of every architecture."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import inputs_for

from lmzoo import checkpoints
from lmzoo.checkpoints import CheckpointError
from lmzoo.models import ARCHITECTURES, load_pretrained


def weights_of(model):
    return {name: np.asarray(variable.value) for name, variable in model.checkpoint_variables().items()}


def assert_same_weights(one, other):
    expected = weights_of(other)
    for name, values in weights_of(one).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def rewrite(directory, change):
    """Changes the tensors of a checkpoint in one file."""
    path = directory / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    change(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_bytes", [10**10, 4000])
def test_round_trip(model, tmp_path, max_shard_bytes):
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes == 4000)
    twin = type(model).from_pretrained(tmp_path)
    assert twin.config == model.config
    assert_same_weights(twin, model)
    inputs = inputs_for(model, np.arange(8, dtype="int32")[None])
    np.testing.assert_array_equal(twin(inputs), model(inputs))


def test_every_weight_is_in_the_checkpoint(model):
    named = {id(variable) for variable in model.checkpoint_variables().values()}
    assert named == {id(variable) for variable in model.weights}


def test_saving_twice_gives_the_same_bytes(model, tmp_path):
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_class_is_found_by_model_type(model, architecture, tmp_path):
    model.save_pretrained(tmp_path)
    twin = load_pretrained(tmp_path, dtype="mixed_bfloat16")
    assert type(twin) is ARCHITECTURES[architecture]
    assert twin.compute_dtype == "bfloat16"
    assert_same_weights(twin, model)


def test_overrides(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, dropout_rate=0.3).config == model.config.replace(dropout_rate=0.3)
    with pytest.raises(ValueError, match="has no field 'dropuot_rate'"):
        type(model).from_pretrained(tmp_path, dropuot_rate=0.3)
    with pytest.raises(CheckpointError, match=r"shape: .* expected \[62, "):
        type(model).from_pretrained(tmp_path, vocab_size=62)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(make_model, tmp_path, dtype):
    """Files say what the weights are; the model that reads them says what they become."""
    model = make_model(dtype=dtype)
    model.save_pretrained(tmp_path)
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(numpy_dtype)}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert_same_weights(type(model).from_pretrained(tmp_path, dtype=dtype), model)
    wide = type(model).from_pretrained(tmp_path)
    for name, values in weights_of(wide).items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, weights_of(model)[name].astype("float32"))


def test_mixed_precision_writes_float32(make_model, tmp_path):
    model = make_model(dtype="mixed_bfloat16")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert_same_weights(type(model).from_pretrained(tmp_path), model)


def test_another_architecture(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for model_type in ("llama", None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        with pytest.raises(CheckpointError, match=rf"holds a checkpoint of model_type {model_type!r}, but .* reads"):
            type(model).from_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=rf"model_type {model_type!r}; known: "):
            load_pretrained(tmp_path)


def test_a_config_that_cannot_be(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": -1}))
    with pytest.raises(CheckpointError, match=rf"cannot be made from {tmp_path}: .*vocab_size is -1"):
        type(model).from_pretrained(tmp_path)


def test_all_that_does_not_fit_is_named(model, tmp_path):
    """A model with other tensors in its place: what lacks, what is too much, and what has another shape."""
    model.save_pretrained(tmp_path)
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    names = sorted(name for name in stored if name.startswith(model.checkpoint_prefix))

    def change(tensors):
        del tensors[names[0]]
        tensors[names[1]] = np.zeros((7,), "float32")
        tensors["extra.weight"] = np.zeros((1,), "float32")

    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError) as caught:
        type(model).from_pretrained(tmp_path)
    problems = str(caught.value).split("\n  ")[1:]
    assert [problem.split(":")[0] for problem in problems] == ["missing", "shape", "unknown"]
    for problem, name in zip(
        problems, (names[0].removeprefix(model.checkpoint_prefix), names[1], "extra.weight"), strict=True
    ):
        assert name in problem


def test_loading_into_a_model_that_does_not_fit_changes_nothing(make_model, model, tmp_path):
    model.save_pretrained(tmp_path)
    other = make_model(seed=3, vocab_size=60)
    before = weights_of(other)
    with pytest.raises(CheckpointError, match="shape: "):
        other.load_pretrained_weights(tmp_path)
    for name, values in weights_of(other).items():
        np.testing.assert_array_equal(values, before[name])


def test_a_save_during_a_load_is_noticed(make_model, tmp_path, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path)
    real = checkpoints.read_tensors

    def read_late(directory):
        make_model(seed=1).save_pretrained(directory)
        return real(directory)

    monkeypatch.setattr(checkpoints, "read_tensors", read_late)
    with pytest.raises(CheckpointError, match="was replaced while it was being read"):
        type(model).from_pretrained(tmp_path)
