from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmzoo.data.packing import pack

LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=40)
ROW = st.integers(1, 12)


def cut(lengths, seq_length):
    """The pieces of documents of these lengths, as (place, length)."""
    pieces, start = [], 0
    for length in lengths:
        for offset in range(0, length, seq_length):
            pieces.append((start + offset, min(seq_length, length - offset)))
        start += length
    return pieces


def best_fit_decreasing(pieces, seq_length):
    """The plain way: each piece, longest first, into the fullest row with room. Gives how full each row is."""
    rows = []
    for _, length in sorted(pieces, key=lambda piece: -piece[1]):
        fitting = [number for number, full in enumerate(rows) if full + length <= seq_length]
        if fitting:
            rows[max(fitting, key=lambda number: rows[number])] += length
        else:
            rows.append(length)
    return sorted(rows)


def layout_by_token(packing, rows):
    """The layout as one tuple a token, in the order of the rows."""
    layout = packing.layout(np.asarray(rows))
    for field in layout:
        assert field.shape == (len(rows), packing.seq_length)
    return layout, layout.segment_ids > 0


def check_every_token_once(packing, lengths):
    """What holds for any packing of whole documents."""
    ends = np.cumsum(lengths)
    layout, real = layout_by_token(packing, np.arange(packing.num_rows))
    np.testing.assert_array_equal(np.sort(layout.places[real]), np.arange(ends[-1]))
    for field in layout:
        assert not field[~real].any()
    is_last = np.isin(layout.places, ends - 1)
    np.testing.assert_array_equal(layout.has_next, real & ~is_last)
    for row in range(packing.num_rows):
        length = real[row].sum()
        assert length > 0
        assert real[row, :length].all()  # padding comes at the end
        segments, positions = layout.segment_ids[row, :length], layout.positions[row, :length]
        documents = np.searchsorted(ends, layout.places[row, :length], side="right")
        begins = np.r_[True, documents[1:] != documents[:-1]]
        np.testing.assert_array_equal(segments, np.cumsum(begins))
        for segment in range(1, segments[-1] + 1):
            inside = segments == segment
            np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
            places = layout.places[row, :length][inside]
            np.testing.assert_array_equal(places, places[0] + np.arange(inside.sum()))


@settings(max_examples=150)
@given(LENGTHS, ROW)
def test_stream(lengths, seq_length):
    packing = pack(np.cumsum(lengths), seq_length, "stream")
    check_every_token_once(packing, lengths)
    layout, real = layout_by_token(packing, np.arange(packing.num_rows))
    np.testing.assert_array_equal(layout.places[real], np.arange(sum(lengths)))  # in the order of the corpus
    assert packing.num_rows == -(-sum(lengths) // seq_length)


@settings(max_examples=150)
@given(LENGTHS, ROW)
def test_pad(lengths, seq_length):
    packing = pack(np.cumsum(lengths), seq_length, "pad")
    check_every_token_once(packing, lengths)
    layout, real = layout_by_token(packing, np.arange(packing.num_rows))
    assert [(int(row[0]), int(used.sum())) for row, used in zip(layout.places, real, strict=True)] == cut(
        lengths, seq_length
    )


@settings(max_examples=300)
@given(LENGTHS, ROW)
def test_best_fit(lengths, seq_length):
    packing = pack(np.cumsum(lengths), seq_length, "best-fit")
    layout, real = layout_by_token(packing, np.arange(packing.num_rows))
    assert sorted(real.sum(axis=1).tolist()) == best_fit_decreasing(cut(lengths, seq_length), seq_length)
    pieces = Counter()
    for row in range(packing.num_rows):
        for segment in range(1, layout.segment_ids[row].max() + 1):
            inside = layout.segment_ids[row] == segment
            places = layout.places[row, inside]
            np.testing.assert_array_equal(places, places[0] + np.arange(len(places)))
            np.testing.assert_array_equal(layout.positions[row, inside], np.arange(len(places)))
            pieces[int(places[0]), len(places)] += 1
    assert pieces == Counter(cut(lengths, seq_length))
    is_last = np.isin(layout.places, np.cumsum(lengths) - 1)
    np.testing.assert_array_equal(layout.has_next, real & ~is_last)


@settings(max_examples=100)
@given(LENGTHS, ROW, st.sampled_from(["stream", "pad", "best-fit"]), st.randoms(use_true_random=False))
def test_a_row_is_the_same_in_any_batch(lengths, seq_length, method, random):
    packing = pack(np.cumsum(lengths), seq_length, method)
    rows = [random.randrange(packing.num_rows) for _ in range(random.randrange(6))]
    together = packing.layout(np.array(rows, np.int64))
    for number, row in enumerate(rows):
        alone = packing.layout(np.array([row]))
        for field, single in zip(together, alone, strict=True):
            np.testing.assert_array_equal(field[number], single[0])


def test_stream_by_hand():
    layout = pack(np.array([3, 4, 10]), 4, "stream").layout(np.array([0, 2, 1]))
    assert layout.places.tolist() == [[0, 1, 2, 3], [8, 9, 0, 0], [4, 5, 6, 7]]
    assert layout.segment_ids.tolist() == [[1, 1, 1, 2], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert layout.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0], [0, 1, 2, 3]]
    assert layout.has_next.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert [field.dtype for field in layout] == [np.int64, np.int32, np.int32, np.bool_]


def test_best_fit_wastes_little():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4.5, 1, 20_000).astype(np.int64) + 1
    ends = np.cumsum(lengths)
    packing = pack(ends, 512, "best-fit")
    assert packing.num_rows * 512 < 1.002 * ends[-1]
    assert packing.num_rows < 0.3 * pack(ends, 512, "pad").num_rows
    layout = packing.layout(np.arange(packing.num_rows))
    np.testing.assert_array_equal(np.sort(layout.places[layout.segment_ids > 0]), np.arange(ends[-1]))


def test_bad_settings_are_told():
    with pytest.raises(ValueError, match="seq_length: 0"):
        pack(np.array([3]), 0)
    with pytest.raises(ValueError, match="packing: 'tight'"):
        pack(np.array([3]), 4, "tight")


@given(LENGTHS, st.lists(st.integers(1, 9), min_size=1, max_size=15), st.integers(0, 9))
def test_costs(lengths, steps, more):
    """Pieces as long as costs are known for; a row holds those that it has room for, and no wider row is needed."""
    costs = np.concatenate([[0], np.sort(steps)])
    seq_length = int(costs[-1]) + more
    packing = pack(np.cumsum(lengths), seq_length, "best-fit", costs=costs)
    expected = [(place, costs[length]) for place, length in cut(lengths, len(steps))]
    layout, real = layout_by_token(packing, np.arange(packing.num_rows))
    np.testing.assert_array_equal(np.sort(layout.places[real]), np.arange(sum(lengths)))
    spent = []
    for segments in layout.segment_ids:
        spent.append(int(costs[np.bincount(segments)[1:]].sum()))
    assert max(spent) <= seq_length
    assert sorted(spent) == best_fit_decreasing(expected, seq_length)
    alone = pack(np.cumsum(lengths), seq_length, "pad", costs=costs)
    check_every_token_once(alone, lengths)
    assert alone.num_rows == len(expected)
    stream = pack(np.cumsum(lengths), seq_length, costs=costs)
    assert (stream.seq_length, stream.num_rows) == (len(steps), -(-sum(lengths) // len(steps)))
