"""Matches the tensors of a checkpoint with those that a model expects: all of them, or one error that names all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from lmzoo.checkpoints.files import CheckpointError, TensorFiles

_FLOATING = ("F64", "F32", "F16", "BF16")


def match_tensors(
    files: TensorFiles,
    expected: Mapping[str, tuple[int, ...]],
    *,
    prefix: str = "",
    ignored: str | None = None,
    tied: Mapping[str, str] | None = None,
    optional: str | None = None,
) -> dict[str, Callable[[], np.ndarray]]:
    """Finds each expected tensor, whether its name carries the prefix or not.

    Args:
        files: an opened checkpoint.
        expected: name without prefix -> shape.
        prefix: what a model with a head writes before the names of its backbone, such as "transformer.".
        ignored: regular expression of names (without prefix) that a checkpoint may hold beside the expected ones.
        tied: name (without prefix) that a checkpoint may hold beside an expected one, or in place of it -> that one,
            which it must equal.
        optional: regular expression of expected names that a checkpoint may lack.

    Returns:
        name without prefix -> function that reads the tensor; without what is lacking.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape or not of a floating-point type, or a tied one
            is not equal; all of them are named.
    """
    tied = tied or {}
    found: dict[str, str] = {}
    problems = []
    for stored in sorted(files):
        first = found.setdefault(_current(stored.removeprefix(prefix)), stored)
        if first != stored:
            problems.append(f"twice: {first} and {stored}")
    for copy, name in tied.items():
        if copy in found and name in expected:
            found.setdefault(name, found[copy])
    problems += [
        f"missing: {name} {list(shape)}"
        for name, shape in expected.items()
        if name not in found and not (optional and re.fullmatch(optional, name))
    ]
    for name, stored in found.items():
        if name in expected:
            if files.shape(stored) != tuple(expected[name]):
                problems.append(f"shape: {stored} is {list(files.shape(stored))}, expected {list(expected[name])}")
            if files.dtype(stored) not in _FLOATING:
                problems.append(f"type: {stored} is {files.dtype(stored)}, expected one of {', '.join(_FLOATING)}")
        elif name in tied:
            if tied[name] in found and not np.array_equal(files[stored](), files[found[tied[name]]]()):
                problems.append(f"not tied: {stored} is not equal to {found[tied[name]]}")
        elif ignored is None or not re.fullmatch(ignored, name):
            problems.append(f"unknown: {stored} {list(files.shape(stored))}")
    if problems:
        raise CheckpointError(
            f"the tensors in {files.directory} are not those of the model that its config.json describes:\n  "
            + "\n  ".join(sorted(problems))
        )
    return {name: files[found[name]] for name in expected if name in found}


def _current(name: str) -> str:
    """Normalisations of checkpoints from TensorFlow, and of the first ones in torch, have gamma and beta."""
    return re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", name))
