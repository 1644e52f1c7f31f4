"""Which tensors fit, and one error for all that do not."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy

from lmzoo import checkpoints
from lmzoo.checkpoints import CheckpointError, Entry

EXPECTED = {"wte": (4, 2), "h.0.w": (2, 2), "h.1.w": (2, 2)}


def match(directory, tensors, **options):
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return checkpoints.match_tensors(checkpoints.read_tensors(directory), EXPECTED, **options)


def make_tensors(prefix="", **changes):
    tensors = {name: np.random.default_rng(0).normal(size=shape).astype("f4") for name, shape in EXPECTED.items()}
    return {prefix + name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_with_and_without_prefix(tmp_path, prefix):
    tensors = make_tensors(prefix)
    found = match(tmp_path, tensors, prefix="transformer.")
    assert list(found) == list(EXPECTED)
    for name, read in found.items():
        np.testing.assert_array_equal(read(), tensors[prefix + name])


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    tensors = make_tensors("transformer.", wte=np.ones((4, 3), "f4"), **{"h.0.w": None, "h.1.w": np.ones((2, 2), "i8")})
    tensors |= {"transformer.h.2.w": np.ones((2, 2), "f4"), "score": np.ones((1,), "f4"), "wte": np.ones((4, 2), "f4")}
    with pytest.raises(CheckpointError) as caught:
        match(tmp_path, tensors, prefix="transformer.")
    head, *problems = str(caught.value).split("\n  ")
    assert str(tmp_path) in head
    assert problems == [
        "missing: h.0.w [2, 2]",
        "shape: transformer.wte is [4, 3], expected [4, 2]",
        "twice: transformer.wte and wte",
        "type: transformer.h.1.w is I64, expected one of F64, F32, F16, BF16",
        "unknown: score [1]",
        "unknown: transformer.h.2.w [2, 2]",
    ]


def test_ignored_names(tmp_path):
    tensors = make_tensors() | {"h.0.mask": np.ones(3, bool)}
    assert set(match(tmp_path, tensors, ignored=r"h\.\d+\.mask")) == set(EXPECTED)
    with pytest.raises(CheckpointError, match=r"unknown: h\.0\.mask \[3\]"):
        match(tmp_path, tensors, ignored=r"h\.\d+\.mas")  # The whole name has to match.


def test_a_tied_tensor_must_be_a_copy(tmp_path):
    tied = {"head": "wte"}
    tensors = make_tensors("transformer.")
    head = tensors["transformer.wte"]
    assert set(match(tmp_path, tensors | {"head": head}, prefix="transformer.", tied=tied)) == set(EXPECTED)
    for other in (head + 1, head[:3]):
        with pytest.raises(CheckpointError, match=r"not tied: head is not equal to transformer\.wte"):
            match(tmp_path, tensors | {"head": other}, prefix="transformer.", tied=tied)


def test_a_tied_copy_stands_in_for_what_is_missing(tmp_path):
    tensors = make_tensors(wte=None)
    head = np.ones((4, 2), "f4")
    found = match(tmp_path, tensors | {"head": head}, tied={"head": "wte"})
    np.testing.assert_array_equal(found["wte"](), head)


def test_optional_names_may_be_missing(tmp_path):
    tensors = make_tensors(**{"h.0.w": None})
    assert set(match(tmp_path, tensors, optional=r"h\.0\..*")) == {"wte", "h.1.w"}
    with pytest.raises(CheckpointError, match=r"missing: h\.0\.w \[2, 2\]"):
        match(tmp_path, tensors, optional=r"h\.0")  # The whole name has to match.


def test_gamma_and_beta_are_weight_and_bias(tmp_path):
    tensors = {"norm.gamma": np.ones(2, "f4"), "norm.beta": np.zeros(2, "f4"), "alphabeta": np.zeros(1, "f4")}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    expected = {"norm.weight": (2,), "norm.bias": (2,), "alphabeta": (1,)}
    found = checkpoints.match_tensors(checkpoints.read_tensors(tmp_path), expected)
    np.testing.assert_array_equal(found["norm.weight"](), [1, 1])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("shape", "matrix"), [((4, 6), True), ((6,), False)])
def test_pieces_of_a_tensor(shape, matrix, transposed):
    """Side by side along the first stored axis: the outputs of a kernel that is stored [output, input]."""
    transposed &= matrix
    entry = Entry.of("a.{q,k}.w", transposed=transposed)
    assert entry.names == ("a.q.w", "a.k.w")
    tensor = np.arange(np.prod(shape)).reshape(shape)
    pieces = [entry.piece(name, tensor) for name in entry.names]
    expected = {(4, 6, False): (2, 6), (4, 6, True): (3, 4), (6, False): (3,)}[(*shape, transposed)]
    assert entry.shapes(shape) == {"a.q.w": expected, "a.k.w": expected}
    assert [piece.shape for piece in pieces] == [expected, expected]
    np.testing.assert_array_equal(entry.join(pieces), tensor)
    if transposed:
        np.testing.assert_array_equal(pieces[1].T, tensor[:, 3:])


def test_a_tensor_in_one_piece():
    entry = Entry.of("a.w")
    assert (entry.names, entry.shapes((2, 3))) == (("a.w",), {"a.w": (2, 3)})
