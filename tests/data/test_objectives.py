import numpy as np

from lmzoo.data.objectives import Causal, Rows

ROWS = Rows(
    token_ids=np.array([[5, 6, 0, 7], [8, 9, 0, 0]], np.int32),
    next_token_ids=np.array([[6, 0, 0, 3], [9, 0, 0, 0]], np.int32),
    has_next=np.array([[True, True, False, True], [True, True, False, False]]),
    segment_ids=np.array([[1, 1, 1, 2], [1, 1, 1, 0]], np.int32),
    positions=np.array([[0, 1, 2, 0], [0, 1, 2, 0]], np.int32),
    seeds=np.array([3, 4], np.uint64),
)


def test_causal():
    inputs, labels, weights = Causal()(ROWS)
    assert set(inputs) == {"token_ids", "segment_ids", "positions"}
    for key, array in inputs.items():
        np.testing.assert_array_equal(array, getattr(ROWS, key))
    np.testing.assert_array_equal(labels, ROWS.next_token_ids)
    np.testing.assert_array_equal(weights, [[1, 1, 0, 1], [1, 1, 0, 0]])
    assert weights.dtype == np.float32


def test_causal_over_one_long_text_gives_token_ids_alone():
    inputs, labels, weights = Causal(separate_documents=False)(ROWS)
    assert set(inputs) == {"token_ids"}
    np.testing.assert_array_equal(inputs["token_ids"], ROWS.token_ids)
    np.testing.assert_array_equal(labels, ROWS.next_token_ids)
    np.testing.assert_array_equal(weights, ROWS.has_next)
