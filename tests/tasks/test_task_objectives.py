"""What each task computes and learns, against numpy, and what padding and weights of 0 may change: nothing."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from examples import TASKS, log_softmax, loss_of, make_batch, make_task, quick
from lmzoo.tasks import EmbeddingModel, QuestionAnsweringModel, SequenceClassificationModel, TokenClassificationModel

TESTED = ("bert",)
EVERY = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(scope="module")
def tasks(model):
    """Name -> task, made once; tests leave the weights as they are."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_task(name, model)
            for variable in made[name].trainable_variables:
                if variable.name == "kernel" and "output" in variable.path and "block" not in variable.path:
                    variable.assign(np.random.default_rng(0).normal(size=variable.shape))
        return made[name]

    return get


def test_shapes(tasks):
    for name, shape in {
        "single_label": (6, 3),
        "regression": (6, 1),
        "tokens": (6, 9, 3),
        "answers": (6, 9, 2),
        "cosine": (6, 16),
    }.items():
        outputs = tasks(name)(make_batch(name)[0])
        assert outputs.shape == shape
        assert outputs.dtype == "float32"


@EVERY
def test_an_input_without_a_mask_is_one_that_shows_all(tasks, name):
    inputs, _, _ = make_batch(name)
    ids = inputs["token_ids"]
    shown = tasks(name)({"token_ids": ids, "padding_mask": np.ones_like(ids, dtype=bool)})
    np.testing.assert_allclose(tasks(name)(ids), shown, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tasks(name)({"token_ids": ids}), shown, rtol=1e-5, atol=1e-5)


def padded(inputs, labels, weights, name, side):
    """The same batch with four more columns of padding, full of other ids."""
    after = {"left": (4, 0), "right": (0, 4)}[side]
    random = np.random.default_rng(9)

    def wider(array, fill):
        more = np.full((len(array), 4), fill, array.dtype)
        return np.concatenate([more, array] if side == "left" else [array, more], axis=1)

    inputs = {key: wider(each, each.dtype != bool and random.integers(2, 61)) for key, each in inputs.items()}
    if name == "tokens":
        labels, weights = wider(labels, -100), wider(weights, 0)
    if name == "answers":
        labels = labels + after[0]
    return inputs, labels, weights


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"], indirect=True)
def test_padding_changes_nothing(model, name, side):
    task = make_task(name, model)
    batch = make_batch(name)
    wide = padded(*batch, name, side)
    assert loss_of(task, *wide) == pytest.approx(loss_of(task, *batch), rel=1e-4)
    if name not in ("tokens", "answers"):
        np.testing.assert_allclose(task(wide[0]), task(batch[0]), rtol=1e-4, atol=1e-5)


@EVERY
def test_rows_of_weight_0_do_nothing(tasks, name):
    inputs, labels, weights = make_batch(name)
    kept = np.array([True, False, True, True, False, True])
    expected = loss_of(tasks(name), *({key: each[kept] for key, each in inputs.items()}, labels[kept], weights[kept]))
    if name in ("single_label", "tokens"):
        labels = np.where(kept.reshape(-1, *[1] * (labels.ndim - 1)), labels, -100)
    silent = (weights.T * kept).T.astype("float32")
    assert loss_of(tasks(name), inputs, labels, silent) == pytest.approx(expected, rel=1e-5)
    _, total = tasks(name).compute_sums(inputs, labels, silent, training=False)["loss"]
    assert float(total) == pytest.approx(silent.sum())


@EVERY
def test_no_weights_are_weights_of_1(tasks, name):
    inputs, labels, weights = make_batch(name)
    ones = inputs["padding_mask"].astype("float32") if name == "tokens" else np.ones_like(weights)
    assert loss_of(tasks(name), inputs, labels, None) == pytest.approx(loss_of(tasks(name), inputs, labels, ones))


def test_single_label(tasks):
    inputs, labels, weights = make_batch("single_label")
    task = tasks("single_label")
    logits = np.asarray(task(inputs))
    losses = -log_softmax(logits)[np.arange(6), labels]
    assert loss_of(task, inputs, labels, weights) == pytest.approx((losses * weights).sum() / weights.sum(), rel=1e-5)
    correct, _ = task.compute_sums(inputs, labels, weights, training=False)["accuracy"]
    assert float(correct) == (weights * (logits.argmax(1) == labels)).sum()


def test_label_smoothing_and_class_weights(model):
    inputs, labels, weights = make_batch("single_label")
    task = make_task("single_label", model)
    scores = log_softmax(np.asarray(task(inputs)))
    task.compile(label_smoothing=0.3, class_weights={"blue": 4.0, "red": 1.0, "green": 0.5})
    losses = -0.7 * scores[np.arange(6), labels] - 0.3 * scores.mean(1)
    counted = weights * np.array([1.0, 0.5, 4.0])[labels]
    assert loss_of(task, inputs, labels, weights) == pytest.approx((losses * counted).sum() / counted.sum(), rel=1e-5)
    _, total = task.compute_sums(inputs, labels, weights, training=False)["accuracy"]
    assert float(total) == weights.sum()  # Accuracy stays the share of the examples.


def test_multi_label(model):
    inputs, labels, weights = make_batch("multi_label")
    task = make_task("multi_label", model)
    logits = np.asarray(task(inputs))
    probabilities = 1 / (1 + np.exp(-logits))
    losses = -labels * np.log(probabilities) - (1 - labels) * np.log(1 - probabilities)
    counted = weights[:, None] * np.ones(3)
    assert loss_of(task, inputs, labels, weights) == pytest.approx((losses * counted).sum() / counted.sum(), rel=1e-4)
    task.compile(class_weights=(1.0, 0.0, 5.0))
    counted = counted * [1.0, 0.0, 5.0]
    assert loss_of(task, inputs, labels, weights) == pytest.approx((losses * counted).sum() / counted.sum(), rel=1e-4)
    value, total = task.compute_sums(inputs, labels, weights, training=False)["accuracy"]
    right = ((logits > 0) == labels).mean(1)
    assert float(value / total) == pytest.approx((right * weights).sum() / weights.sum())


def test_regression(tasks):
    inputs, labels, weights = make_batch("regression")
    task = tasks("regression")
    assert task.labels == ("score",)
    errors = (np.asarray(task(inputs)) - labels)[:, 0] ** 2
    expected = (errors * weights).sum() / weights.sum()
    assert loss_of(task, inputs, labels, weights) == pytest.approx(expected, rel=1e-5)
    assert loss_of(task, inputs, labels[:, 0], weights) == pytest.approx(expected, rel=1e-5)
    assert list(task.sum_metrics()) == ["loss"]


def test_answers(tasks):
    inputs, labels, weights = make_batch("answers")
    task = tasks("answers")
    logits = np.where(inputs["padding_mask"][:, :, None], np.asarray(task(inputs)), -np.inf)
    with np.errstate(invalid="ignore"):
        scores = log_softmax(logits.transpose(0, 2, 1))
    losses = -np.take_along_axis(scores, labels[:, :, None], 2)[..., 0].mean(1)
    assert loss_of(task, inputs, labels, weights) == pytest.approx((losses * weights).sum() / weights.sum(), rel=1e-5)
    best = logits.argmax(1).astype("int32")
    best[0, 1] = (best[0, 1] + 1) % 3  # Half an answer is none.
    correct, _ = task.compute_sums(inputs, best, weights, training=False)["accuracy"]
    assert float(correct) == weights[1:].sum()


def vectors_of(task, inputs):
    second = {"token_ids": inputs["pair_token_ids"], "padding_mask": inputs["pair_padding_mask"]}
    return np.asarray(task(inputs)), np.asarray(task(second))


@pytest.mark.parametrize("normalize", [True, False])
def test_pooling(model, normalize):
    inputs, _, _ = make_batch("cosine")
    hidden, mask = np.asarray(model.features(inputs)), inputs["padding_mask"]
    expected = {"mean": (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True), "first": hidden[:, 0]}
    for pooling, vectors in expected.items():
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else 1.0
        actual = EmbeddingModel(model, pooling=pooling, normalize=normalize)(inputs)
        np.testing.assert_allclose(actual, vectors / lengths, rtol=1e-4, atol=1e-5)


def test_cosine(model):
    inputs, labels, weights = make_batch("cosine")
    task = EmbeddingModel(model)
    one, two = vectors_of(task, inputs)
    errors = ((one * two).sum(1) - labels) ** 2
    expected = (errors * weights).sum() / weights.sum()
    assert loss_of(task, inputs, labels, weights) == pytest.approx(expected, rel=1e-5)
    free = EmbeddingModel(model, normalize=False)  # The objective is about cosines all the same.
    assert loss_of(free, inputs, labels, weights) == pytest.approx(expected, rel=1e-5)


def test_contrastive(model):
    inputs, labels, weights = make_batch("contrastive")
    task = EmbeddingModel(model, objective="contrastive", temperature=0.2)
    one, two = vectors_of(task, inputs)
    scores = one @ two.T / 0.2
    losses = -(np.diag(log_softmax(scores)) + np.diag(log_softmax(scores.T))) / 2
    assert loss_of(task, inputs, labels, weights) == pytest.approx((losses * weights).sum() / weights.sum(), rel=1e-4)
    correct, _ = task.compute_sums(inputs, labels, weights, training=False)["accuracy"]
    assert float(correct) == (weights * (scores.argmax(1) == np.arange(6))).sum()


def test_a_row_without_any_token_gives_numbers(model):
    inputs, labels, weights = make_batch("cosine")
    inputs["padding_mask"][2] = False
    assert np.isfinite(np.asarray(EmbeddingModel(model)(inputs))).all()
    task = EmbeddingModel(model)
    task.compile(run_eagerly=True)
    task.train_on_batch(inputs, labels, weights)
    assert task.skipped_steps == 0


@pytest.mark.parametrize("name", quick("contrastive"))
def test_learns_eight_examples_by_heart(make_model, name):
    keras.utils.set_random_seed(0)
    task = make_task(name, make_model(num_layers=1))
    inputs, labels, weights = make_batch(name, rows=8)
    task.compile(keras.optimizers.Adam(0.01))
    before = loss_of(task, inputs, labels, weights)
    task.fit(inputs, labels, sample_weight=weights, batch_size=8, epochs=60, verbose=0)
    assert loss_of(task, inputs, labels, weights) < 0.1 * before
    if "accuracy" in task.sum_metrics():
        assert task.evaluate(inputs, labels, sample_weight=weights, verbose=0, return_dict=True)["accuracy"] > 0.95


def test_segments_of_0_are_padding(model):
    task = make_task("cosine", model)
    inputs, _, _ = make_batch("cosine")
    mask = inputs["padding_mask"]
    packed = {
        "token_ids": inputs["token_ids"],
        "segment_ids": mask.astype("int32"),
        "positions": np.maximum(mask.cumsum(1) - 1, 0).astype("int32"),
    }
    np.testing.assert_allclose(task(packed), task(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("task_class", "arguments", "message"),
    [
        (SequenceClassificationModel, {"labels": ("one",)}, "needs two or more"),
        (SequenceClassificationModel, {"labels": ("a", "a")}, "all different"),
        (SequenceClassificationModel, {"labels": "ab"}, "must be names"),
        (SequenceClassificationModel, {"problem": "ranking"}, "problem is 'ranking', but must be one of"),
        (TokenClassificationModel, {"labels": ()}, "one or more"),
        (EmbeddingModel, {"pooling": "max"}, "pooling is 'max'"),
        (EmbeddingModel, {"objective": "triplet"}, "objective is 'triplet'"),
        (EmbeddingModel, {"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_what_a_task_refuses(model, task_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        task_class(model, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("single_label", {"class_weights": (1.0, 2.0)}, "3 of them"),
        ("single_label", {"class_weights": {"red": 1.0}}, r"class_weights are for \['red'\]"),
        ("single_label", {"class_weights": (1.0, -1.0, 1.0)}, "0 or more"),
        ("tokens", {"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ("multi_label", {"label_smoothing": 0.1}, "goes with single_label only"),
        ("regression", {"class_weights": (1.0,)}, "regression has no classes"),
        ("answers", {"remat": "layer"}, "remat is 'layer'"),
    ],
)
def test_what_compile_refuses(model, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, model).compile(**arguments)


def test_embeddings_need_pairs(model):
    with pytest.raises(ValueError, match="no pair_token_ids"):
        EmbeddingModel(model).compute_sums({"token_ids": np.ones((2, 3), "int32")}, None, None, training=True)


def test_the_default_is_adamw_as_bert_was_fine_tuned(model):
    task = QuestionAnsweringModel(model)
    task.compile()
    optimizer = task.optimizer
    assert float(optimizer.learning_rate) == pytest.approx(5e-5)
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.weight_decay) == (0.9, 0.999, 0.01)
    assert optimizer.global_clipnorm == 1.0
    assert {variable.name for variable in task.trainable_variables if optimizer.decays(variable)} == {
        "kernel",
        "embeddings",
    }
