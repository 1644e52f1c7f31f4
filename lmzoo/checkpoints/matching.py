"""Matches the tensors of a checkpoint with those that a model expects: all of them, or one error that names all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from lmzoo.checkpoints.files import CheckpointError, TensorFiles


def match_tensors(
    files: TensorFiles,
    expected: Mapping[str, tuple[int, ...]],
    *,
    prefix: str = "",
    ignored: str | None = None,
) -> dict[str, Callable[[], np.ndarray]]:
    """Finds each expected tensor, whether its name carries the prefix or not.

    Args:
        files: an opened checkpoint.
        expected: name without prefix -> shape.
        prefix: what a model with a head writes before the names of its backbone, such as "transformer.".
        ignored: regular expression of names (without prefix) that a checkpoint may hold beside the expected ones.

    Returns:
        name without prefix -> function that reads the tensor.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; all of them are named.
    """
    found = {name.removeprefix(prefix): name for name in files}
    problems = [f"missing: {name} {list(shape)}" for name, shape in sorted(expected.items()) if name not in found]
    for name, stored in sorted(found.items()):
        if name not in expected:
            if ignored is None or not re.fullmatch(ignored, name):
                problems.append(f"unknown: {stored} {list(files.shape(stored))}")
        elif files.shape(stored) != tuple(expected[name]):
            problems.append(f"shape: {stored} is {list(files.shape(stored))}, expected {list(expected[name])}")
    if problems:
        raise CheckpointError(
            f"the tensors in {files.directory} are not those of the model that its config.json describes:\n  "
            + "\n  ".join(problems)
        )
    return {name: files[found[name]] for name in expected}
