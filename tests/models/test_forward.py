"""What must hold of every language model's logits, whatever its weights."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CAUSAL, SCORING
from hypothesis import given, settings
from hypothesis import strategies as st

TESTED = SCORING
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
FEW, MANY = settings(max_examples=10), settings(max_examples=30)


def random_ids(model, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, shape).astype("int32")


def logits_alone(model, ids):
    """Logits [T, V] of one row, with nothing beside it."""
    return np.asarray(model(np.asarray(ids, "int32")[None]))[0]


def pack(documents, length, filler):
    """Documents in one row of `length` tokens; `filler` stands in the padding."""
    joined = np.concatenate(documents)
    row = {
        "token_ids": np.concatenate([joined, filler[: length - len(joined)]]),
        "segment_ids": np.concatenate([np.full(len(each), number) for number, each in enumerate(documents, 1)]),
        "positions": np.concatenate([np.arange(len(each)) for each in documents]),
    }
    return {name: np.pad(each, (0, length - len(each))).astype("int32")[None] for name, each in row.items()}


def test_shape_and_type_of_logits(model):
    ids = random_ids(model, 3, 7)
    logits = model(ids)
    assert logits.shape == (3, 7, model.config.vocab_size)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    np.testing.assert_array_equal(logits, model({"token_ids": ids}))
    np.testing.assert_array_equal(logits, model(ids.astype("int64")))
    np.testing.assert_allclose(model.logits(model.features(ids)), logits, **TOLERANCE)


def check_causality(model, data):
    length = data.draw(st.integers(2, model.config.context_length))
    place = data.draw(st.integers(1, length - 1))
    ids = random_ids(model, 1, length, seed=data.draw(st.integers(0, 2**32 - 1)))
    changed = ids.copy()
    changed[0, place:] = (changed[0, place:] + data.draw(st.integers(1, model.config.vocab_size - 1))) % (
        model.config.vocab_size
    )
    one, other = np.asarray(model(ids)), np.asarray(model(changed))
    np.testing.assert_allclose(one[:, :place], other[:, :place], **TOLERANCE)
    assert np.abs(one[:, place:] - other[:, place:]).max() > 1e-3


def check_padding(model, data):
    length = data.draw(st.integers(1, 12))
    left, right = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    ids = random_ids(model, length, seed=data.draw(st.integers(0, 2**32 - 1)))
    filler = random_ids(model, left + right, seed=data.draw(st.integers(0, 9)))
    padded = np.concatenate([filler[:left], ids, filler[left:]])[None]
    mask = np.zeros(padded.shape, bool)
    mask[0, left : left + length] = True
    other = random_ids(model, 1, padded.shape[1], seed=1)  # A full row beside it.
    inputs = {"token_ids": np.concatenate([padded, other]), "padding_mask": np.concatenate([mask, mask | True])}
    logits = np.asarray(model(inputs))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[0, left : left + length], logits_alone(model, ids), **TOLERANCE)
    np.testing.assert_allclose(logits[1], logits_alone(model, other[0]), **TOLERANCE)


def check_packing(model, data):
    sizes = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) <= 24))
    seed = data.draw(st.integers(0, 2**32 - 1))
    documents = [random_ids(model, size, seed=seed + number) for number, size in enumerate(sizes)]
    inputs = pack(documents, data.draw(st.integers(sum(sizes), 24)), random_ids(model, 24, seed=seed))
    logits = np.asarray(model(inputs))[0]
    assert np.isfinite(logits).all()
    start = 0
    for document in documents:
        part = logits[start : start + len(document)]
        np.testing.assert_allclose(part, logits_alone(model, document), **TOLERANCE)
        start += len(document)


def check_every_token_counts(model, data):
    """Without causality, each token of a document has a say in the scores of all the others."""
    length = data.draw(st.integers(2, model.config.context_length))
    place = data.draw(st.integers(0, length - 1))
    ids = random_ids(model, 1, length, seed=data.draw(st.integers(0, 2**32 - 1)))
    changed = ids.copy()
    changed[0, place] = (changed[0, place] + 1) % model.config.vocab_size
    difference = np.abs(np.asarray(model(ids)) - np.asarray(model(changed)))[0].max(-1)
    assert difference.min() > 1e-6


CHECKS = {"padding": check_padding, "packing": check_packing}


@pytest.mark.parametrize("check", CHECKS)
@FEW
@given(data=st.data())
def test_property(model, check, data):
    CHECKS[check](model, data)


@FEW
@given(data=st.data())
def test_direction(model, architecture, data):
    (check_causality if architecture in CAUSAL else check_every_token_counts)(model, data)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@MANY
@given(data=st.data())
def test_property_on_many_examples(model, check, data):
    CHECKS[check](model, data)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_direction_on_many_examples(model, architecture, data):
    (check_causality if architecture in CAUSAL else check_every_token_counts)(model, data)


def gradients_of_loss(model, inputs, labels, weights):
    variables = [variable.value for variable in model.trainable_variables]
    with tf.GradientTape() as tape:
        value, _ = model.compute_sums(inputs, labels, weights, training=True)["loss"]
    gradients = tape.gradient(value, variables, unconnected_gradients="zero")  # Of heads for other labels.
    return value.numpy(), [tf.convert_to_tensor(each).numpy() for each in gradients]


def test_gradients_of_a_packed_row_are_those_of_its_documents(model):
    documents = [random_ids(model, size, seed=size) for size in (7, 1, 5)]
    inputs = pack(documents, 16, random_ids(model, 16))
    labels = random_ids(model, 1, 16, seed=5)
    weights = (inputs["segment_ids"] > 0).astype("float32")
    value, gradients = gradients_of_loss(model, inputs, labels, weights)
    start, total, sums = 0, 0.0, [0.0] * len(gradients)
    for document in documents:
        part = slice(start, start + len(document))
        alone = gradients_of_loss(model, document[None], labels[:, part], weights[:, part])
        total += alone[0]
        sums = [a + b for a, b in zip(sums, alone[1], strict=True)]
        start += len(document)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    for variable, one, other in zip(model.trainable_variables, gradients, sums, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max(), err_msg=variable.path)


def test_dynamic_shapes(model):
    run = tf.function(model, input_signature=[tf.TensorSpec((None, None), tf.int32)], autograph=False)
    for shape in ((1, 1), (2, 5), (3, model.config.context_length)):
        ids = random_ids(model, *shape)
        np.testing.assert_allclose(run(ids), model(ids), **TOLERANCE)


def test_zero_rows(model):
    assert model(np.zeros((0, 5), "int32")).shape == (0, 5, model.config.vocab_size)


def test_rows_longer_than_the_context_are_refused(model):
    limit = model.config.context_length
    assert model(random_ids(model, 1, limit)).shape[1] == limit
    with pytest.raises(ValueError, match=rf"rows have {limit + 1} tokens, but this model reads {limit} at most"):
        model.features(random_ids(model, 1, limit + 1))


def test_a_packed_batch_needs_positions(model):
    inputs = pack([np.arange(3), np.arange(4)], 8, np.zeros(8))
    del inputs["positions"]
    with pytest.raises(ValueError, match="segment_ids but no positions"):
        model.features(inputs)


def test_dropout_acts_in_training_only(make_model):
    model = make_model(dropout_rate=0.5)
    ids = random_ids(model, 2, 8)
    calm = np.asarray(model(ids))
    np.testing.assert_array_equal(calm, model(ids, training=False))
    noisy = np.asarray(model(ids, training=True))
    assert np.abs(noisy - calm).max() > 1e-2
    assert np.abs(noisy - model(ids, training=True)).max() > 1e-2
