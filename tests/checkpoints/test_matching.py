"""Which tensors fit, and one error for all that do not."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy

from lmzoo import checkpoints
from lmzoo.checkpoints import CheckpointError

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
