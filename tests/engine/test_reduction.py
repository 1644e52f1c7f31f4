import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from lmzoo.engine import reduction


def test_dense_adds_repeated_rows():
    slices = tf.IndexedSlices(tf.constant([[1.0], [2.0], [4.0]]), tf.constant([1, 0, 1]), dense_shape=[3, 1])
    np.testing.assert_array_equal(reduction.dense(slices), [[2.0], [5.0], [0.0]])


def test_dense_widens_half_precision_only():
    assert reduction.dense(tf.ones([1], tf.float16)).dtype == tf.float32
    assert reduction.dense(tf.ones([1], tf.bfloat16)).dtype == tf.float32
    assert reduction.dense(tf.ones([1], tf.float64)).dtype == tf.float64
    assert reduction.dense(None) is None


def test_global_norm():
    gradients = [tf.constant([[1.0, 2.0]]), tf.constant(2.0), tf.constant([4.0], tf.float64)]
    assert float(reduction.global_norm(gradients)) == pytest.approx(5.0)
    for bad in (np.nan, np.inf):
        assert not np.isfinite(reduction.global_norm([tf.constant([1.0, bad])]))


@pytest.mark.parametrize("limit", [{"global_clipnorm": 0.7}, {"clipnorm": 0.7}, {"clipvalue": 0.3}, {}], ids=str)
@pytest.mark.parametrize("size", [0.01, 1.0])
def test_clip_does_to_gradients_what_keras_does(limit, size):
    gradients = [tf.random.stateless_normal(shape, [1, shape[0]]) * size for shape in ([3, 4], [5])]
    expected = keras.optimizers.SGD(**limit)._clip_gradients(gradients)
    doubled = [2.0 * gradient for gradient in gradients]
    actual = reduction.clip(doubled, reduction.global_norm(gradients), tf.constant(0.5), **limit)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_clip_without_anything_to_do_is_free():
    gradient = tf.constant([1.0])
    assert reduction.clip([gradient], tf.constant(1.0))[0] is gradient


def test_pack_and_unpack():
    sums = {"loss": (tf.constant(1.0), tf.constant([2.0])), "other": (tf.constant(3), tf.constant(4.0))}
    packed = reduction.pack(sums, ["other", "loss"])
    np.testing.assert_array_equal(packed, [3.0, 4.0, 1.0, 2.0])
    unpacked = reduction.unpack(packed, ["other", "loss"])
    assert [float(part) for part in unpacked["loss"]] == [1.0, 2.0]


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(0, 20), count=st.integers(1, 7), static=st.booleans())
def test_micro_batches_are_a_partition_into_nearly_equal_parts(rows, count, static):
    batch = ({"a": tf.range(rows)}, tf.reshape(tf.range(2 * rows), [rows, 2]), None)
    if static and rows % count:
        with pytest.raises(ValueError, match=f"micro_batches={count} with XLA .* gets"):
            reduction.micro_batch(batch, tf.constant(0), count, static=True)
        return
    parts = [reduction.micro_batch(batch, tf.constant(index), count, static=static) for index in range(count)]
    sizes = [part[1].shape[0] for part in parts]
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(tf.concat([part[0]["a"] for part in parts], 0), range(rows))
    np.testing.assert_array_equal(tf.concat([part[1] for part in parts], 0), batch[1])
    assert all(part[2] is None for part in parts)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([None], (21.0, 6.0)),
        ([[1.0, 0.5]], (13.5, 4.5)),
        ([[[1.0], [0.5]]], (13.5, 4.5)),
        ([[[0, 1, 0], [0, 0, 2]]], (14.0, 3.0)),
        ([[2.0, 0.0], [[True, False, True], [True, True, True]]], (8.0, 4.0)),
    ],
    ids=str,
)
def test_weighted_sums(weights, expected):
    values = tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    weights = [None if each is None else tf.constant(each) for each in weights]
    assert tuple(float(part) for part in reduction.weighted_sums(values, *weights)) == expected


def test_a_value_of_weight_zero_does_not_count_even_if_nan():
    value, weight = reduction.weighted_sums(tf.constant([np.nan, 2.0]), tf.constant([0.0, 1.0]))
    assert (float(value), float(weight)) == (2.0, 1.0)
