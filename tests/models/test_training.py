"""fit, evaluate and predict with the model's own objective."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CAUSAL, WITH_A_FORWARD_PASS_OF_THEIR_OWN

causal = pytest.mark.parametrize("architecture", CAUSAL, indirect=True)


TESTED = WITH_A_FORWARD_PASS_OF_THEIR_OWN


def make_data(model, rows=10, length=9, seed=0):
    """Token ids, labels, and weights of which some are 0."""
    random = np.random.default_rng(seed)
    ids, labels = random.integers(0, model.config.vocab_size, (2, rows, length)).astype("int32")
    weights = random.random((rows, length)) * random.integers(0, 2, (rows, length))
    return ids, labels, weights.astype("float32")


def expected_logs(model, ids, labels, weights, label_smoothing=0.0, z_loss=0.0):
    """Loss, perplexity and accuracy over all tokens, in numpy, from the model's logits."""
    inputs = ids if isinstance(ids, dict) else {"token_ids": ids}
    logits = np.asarray(model(inputs), "float64")
    log_z = np.log(np.exp(logits).sum(-1))
    at_label = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    losses = log_z - (1 - label_smoothing) * at_label - label_smoothing * logits.mean(-1) + z_loss * log_z**2
    loss = (weights * losses).sum() / weights.sum()
    accuracy = (weights * (logits.argmax(-1) == labels)).sum() / weights.sum()
    return {"loss": loss, "perplexity": np.exp(loss), "accuracy": accuracy}


def assert_logs(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, err_msg=name)


def test_defaults_of_compile(make_model):
    model = make_model()
    model.compile()
    optimizer = model.optimizer
    assert isinstance(optimizer, keras.optimizers.AdamW)
    assert (float(optimizer.learning_rate), optimizer.weight_decay) == (pytest.approx(3e-4), 0.1)
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.global_clipnorm) == (0.9, 0.95, 1.0)
    optimizer.build(model.trainable_variables)
    for variable in model.trainable_variables:
        assert optimizer.decays(variable) == (len(variable.shape) >= 2), variable.path


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_equals_numpy(make_model, smoothing):
    """Over batches of 4, 4 and 2 rows, whose weights differ: sums over all tokens, not means of means."""
    model = make_model()
    model.compile(label_smoothing=smoothing, z_loss=smoothing / 10)
    ids, labels, weights = make_data(model)
    logs = model.evaluate(ids, labels, sample_weight=weights, batch_size=4, return_dict=True, verbose=0)
    assert_logs(logs, expected_logs(model, ids, labels, weights, smoothing, smoothing / 10))
    assert logs["perplexity"] == pytest.approx(np.exp(logs["loss"]), rel=1e-5)


def test_training_logs_describe_the_weights_before_the_step(make_model):
    model = make_model()
    model.compile()
    ids, labels, weights = make_data(model)
    expected = expected_logs(model, ids, labels, weights)
    logs = model.train_on_batch(ids, labels, weights, return_dict=True)
    assert logs.pop("gradient_norm") > 0
    assert_logs(logs, expected)


def test_all_forms_of_a_batch(make_model):
    """Arrays, dicts, datasets; weights by token, by row, or none."""
    model = make_model()
    model.compile()
    ids, labels, weights = make_data(model)
    ones = np.ones_like(weights)

    def evaluate(*args, **kwargs):
        return model.evaluate(*args, **kwargs, batch_size=4, return_dict=True, verbose=0)

    expected = expected_logs(model, ids, labels, ones)
    assert_logs(evaluate(ids, labels), expected)
    assert_logs(evaluate({"token_ids": ids}, labels), expected)
    dataset = tf.data.Dataset.from_tensor_slices(({"token_ids": ids}, labels, weights)).batch(4)
    logs = model.evaluate(dataset, return_dict=True, verbose=0)
    assert_logs(logs, expected_logs(model, ids, labels, weights))
    by_row = np.arange(10, dtype="float32")
    expected = expected_logs(model, ids, labels, by_row[:, None] * ones)
    assert_logs(evaluate(ids, labels, sample_weight=by_row), expected)
    model.compile()  # A function that has seen weights of several ranks no longer knows which one comes.
    assert_logs(evaluate(ids, labels, sample_weight=by_row[:, None]), expected)


@causal
def test_without_labels_each_token_is_the_label_of_the_one_before(make_model):
    model = make_model()
    model.compile()
    ids, _, _ = make_data(model)
    expected = expected_logs(model, ids[:, :-1], ids[:, 1:], np.ones((10, 8)))
    assert_logs(model.evaluate(ids, return_dict=True, verbose=0), expected)
    dataset = tf.data.Dataset.from_tensor_slices({"token_ids": ids}).batch(4)
    assert_logs(model.evaluate(dataset, return_dict=True, verbose=0), expected)
    history = model.fit(ids, epochs=2, batch_size=4, verbose=0).history
    assert history["loss"][1] < history["loss"][0]
    assert all(np.isfinite(values).all() for values in history.values())


@causal
def test_without_labels_padding_and_other_documents_do_not_count(make_model):
    model = make_model()
    model.compile()
    ids, _, weights = make_data(model, rows=3, length=8)
    padding_mask = np.array([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], bool)
    counts = padding_mask[:, 1:] & padding_mask[:, :-1]
    shifted = {"token_ids": ids[:, :-1], "padding_mask": padding_mask[:, :-1]}
    logs = model.test_on_batch({"token_ids": ids, "padding_mask": padding_mask}, return_dict=True)
    assert_logs(logs, expected_logs(model, shifted, ids[:, 1:], counts.astype("float64")))

    segment_ids = np.array([[1, 1, 1, 2, 2, 2, 2, 2], [1, 2, 2, 2, 3, 3, 0, 0], [1] * 8], "int32")
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 1, 2, 0, 1, 0, 0], [*range(8)]], "int32")
    batch = {"token_ids": ids, "segment_ids": segment_ids, "positions": positions}
    counts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    expected = expected_logs(
        model, {name: each[:, :-1] for name, each in batch.items()}, ids[:, 1:], counts * weights[:, 1:]
    )
    model.reset_metrics()
    assert_logs(model.test_on_batch(batch, None, weights, return_dict=True), expected)


def test_a_keras_loss_and_metric_give_the_same(make_model):
    ids, labels, weights = make_data(make_model())
    logs, weights_after = [], []
    for loss in (None, keras.losses.SparseCategoricalCrossentropy(from_logits=True)):
        model = make_model()
        metrics = [] if loss is None else [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        model.compile(keras.optimizers.SGD(0.1), loss=loss, weighted_metrics=metrics)
        logs.append(model.train_on_batch(ids, labels, weights, return_dict=True))
        weights_after.append([keras.ops.convert_to_numpy(each) for each in model.trainable_variables])
    del logs[0]["perplexity"]
    assert_logs(logs[0], logs[1])
    for one, other in zip(*weights_after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_overfits_a_small_batch(make_model, dtype):
    model = make_model(dtype=dtype)
    model.compile(keras.optimizers.Adam(1e-2))
    ids, _, _ = make_data(model, rows=4, length=10)
    ids[:, 0] = range(4)  # No two rows begin alike, so that each label can be known.
    ids, labels = ids[:, :-1], ids[:, 1:]
    dataset = tf.data.Dataset.from_tensors((ids, labels)).repeat(60)
    losses = model.fit(dataset, epochs=2, verbose=0).history["loss"]
    logs = model.evaluate(ids, labels, return_dict=True, verbose=0)
    assert losses[0] > 0.5
    assert logs["loss"] < 0.1
    assert logs["accuracy"] == 1.0
    assert model.skipped_steps <= (20 if dtype == "mixed_float16" else 0)
    assert all(each.dtype == "float32" for each in model.trainable_variables)


def test_micro_batches_change_nothing(make_model):
    ids, labels, weights = make_data(make_model(), rows=8)
    results: list = []
    for micro_batches in (1, 4):
        model = make_model()
        model.compile(keras.optimizers.SGD(0.1), micro_batches=micro_batches)
        logs = model.train_on_batch(ids, labels, weights, return_dict=True)
        results.append((logs, [keras.ops.convert_to_numpy(each) for each in model.trainable_variables]))
    assert_logs(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_xla_gives_the_same(make_model):
    ids, labels, weights = make_data(make_model())
    logs = []
    for jit_compile in (False, True):
        model = make_model()
        model.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
        model.train_on_batch(ids, labels, weights)
        model.reset_metrics()
        logs.append(model.train_on_batch(ids, labels, weights, return_dict=True))
    for name, value in logs[0].items():
        np.testing.assert_allclose(logs[1][name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("mixed_bfloat16", 0.03), ("mixed_float16", 0.005), ("bfloat16", 0.05)]
)
def test_half_precision_is_close_to_float32(make_model, dtype, tolerance):
    exact, half = make_model(), make_model(dtype=dtype)
    ids, _, _ = make_data(exact)
    expected, actual = np.asarray(exact(ids)), np.asarray(half(ids))
    assert actual.dtype == "float32"
    assert keras.backend.standardize_dtype(half.features(ids).dtype) == half.compute_dtype
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-5 < error < tolerance


def test_predictions(make_model):
    model = make_model()
    ids, _, _ = make_data(model)
    expected = np.asarray(model(ids))
    np.testing.assert_allclose(model.predict(ids, batch_size=4, verbose=0), expected, rtol=1e-4, atol=2e-5)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids, bool)}
    np.testing.assert_allclose(model.predict(inputs, batch_size=4, verbose=0), expected, rtol=1e-4, atol=2e-5)


def test_rows_of_different_lengths_in_one_dataset(make_model):
    """The length of a batch may be known only when it comes."""
    model = make_model()
    model.compile()
    ids, _, _ = make_data(model)
    batches = [(ids[:, :-1], ids[:, 1:]), (ids[:3, :3], ids[:3, 1:4])]
    spec = (tf.TensorSpec((None, None), tf.int32), tf.TensorSpec((None, None), tf.int32))
    dataset = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(2))
    logs = model.evaluate(dataset, return_dict=True, verbose=0)
    losses, counts = [], []
    for inputs, labels in batches:
        part = expected_logs(model, inputs, labels, np.ones_like(labels, "float64"))
        losses.append(part["loss"])
        counts.append(labels.size)
    assert logs["loss"] == pytest.approx(np.average(losses, weights=counts), rel=1e-5)
    model.fit(dataset, verbose=0)


def test_training_does_not_make_the_logits(make_model, monkeypatch):
    """The objective goes from hidden states to the loss; what makes all logits is not called."""
    model = make_model()
    model.compile()
    monkeypatch.setattr(type(model), "logits", None)
    ids, labels, weights = make_data(model)
    model.train_on_batch(ids, labels, weights)
    model.evaluate(ids, labels, sample_weight=weights, verbose=0)


@pytest.mark.parametrize("options", [{"label_smoothing": -0.1}, {"label_smoothing": 1.0}, {"z_loss": -1e-3}])
def test_bad_options_of_the_objective_are_refused(make_model, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but must"):
        make_model().compile(**options)
