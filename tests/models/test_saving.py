""".keras files, and configs: what comes back is what was saved."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import WITH_A_FORWARD_PASS_OF_THEIR_OWN, inputs_for

TESTED = (*WITH_A_FORWARD_PASS_OF_THEIR_OWN, "t5")


def make_batch(model, rows=4, length=9, seed=0):
    random = np.random.default_rng(seed)
    ids = random.integers(0, model.config.vocab_size, (rows, length + 1)).astype("int32")
    inputs = inputs_for(model, ids[:, :-1])
    inputs = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
    return inputs, ids[:, 1:], random.random((rows, length)).astype("float32")


def values_of(variables):
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_a_model_that_was_not_compiled(make_model, tmp_path, dtype):
    model = make_model(dtype=dtype, name="my_model")
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    assert type(twin) is type(model)
    assert (twin.name, twin.config, twin.dtype_policy) == ("my_model", model.config, model.dtype_policy)
    assert not twin.compiled
    inputs, _, _ = make_batch(model)
    np.testing.assert_array_equal(twin(inputs), model(inputs))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_training_goes_on_where_it_stopped(make_model, tmp_path, dtype):
    """Weights, optimizer, objective and its options: the next steps of the copy are those of the original."""
    model = make_model(dtype=dtype)
    model.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0), label_smoothing=0.1, z_loss=1e-3, micro_batches=2)
    for seed in range(3):
        model.train_on_batch(*make_batch(model, seed=seed))
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    assert twin.optimizer.get_config() == model.optimizer.get_config()
    for seed in range(3, 5):
        assert_equal(values_of(twin.optimizer.variables), values_of(model.optimizer.variables))
        assert_equal(values_of(twin.weights), values_of(model.weights))
        batch = make_batch(model, seed=seed)
        model.reset_metrics()
        twin.reset_metrics()
        assert twin.train_on_batch(*batch, return_dict=True) == model.train_on_batch(*batch, return_dict=True)
    assert_equal(values_of(twin.weights), values_of(model.weights))
    assert twin.test_on_batch(*batch, return_dict=True) == model.test_on_batch(*batch, return_dict=True)


def test_default_optimizer_comes_back(make_model, tmp_path):
    model = make_model()
    model.compile()
    model.train_on_batch(*make_batch(model))
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    batch = make_batch(model, seed=1)
    model.train_on_batch(*batch)
    twin.train_on_batch(*batch)
    assert_equal(values_of(twin.weights), values_of(model.weights))


def test_weights_file(make_model, tmp_path):
    model, twin = make_model(), make_model(seed=1)
    model.save_weights(tmp_path / "model.weights.h5")
    twin.load_weights(tmp_path / "model.weights.h5")
    assert_equal(values_of(twin.weights), values_of(model.weights))


def test_config_round_trip(make_model):
    model = make_model(dtype="mixed_bfloat16", name="some_name")
    config = model.get_config()
    twin = type(model).from_config(config)
    assert twin.get_config() == config
    assert [each.shape for each in twin.weights] == [each.shape for each in model.weights]
    assert config["name"] == "some_name"
    type(model).from_config(config)  # It was not changed by the first call.


def test_clones_have_their_own_weights(make_model):
    model = make_model()
    twin = keras.models.clone_model(model)
    assert [each.shape for each in twin.weights] == [each.shape for each in model.weights]
    assert not {id(each) for each in twin.weights} & {id(each) for each in model.weights}


@pytest.mark.slow
def test_another_process_has_only_to_import_the_models(make_model, tmp_path):
    model = make_model()
    model.compile()
    model.save(tmp_path / "model.keras")
    code = "import sys, keras, lmzoo.models; print(type(keras.saving.load_model(sys.argv[1])).__name__)"
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.keras"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout.strip() == type(model).__name__, result.stderr
