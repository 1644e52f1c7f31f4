"""What the functions of a model are given while it reads real text, to show the ranges of its activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Tokens = Sequence[int]
Inputs = dict[str, Any]

_NUM_STEPS = 8  # Of decoding, for each row.


def calibration_inputs(signatures: Mapping[str, Any], rows: Iterable[Tokens]) -> dict[str, list[Inputs]]:
    """Inputs of each signature, as NumPy arrays, that come up while rows of token ids are read.

    Args:
        signatures: as `model_signatures` gives them.
        rows: the first half of one is the source, where the model answers texts.

    Raises:
        ValueError: there are no rows, or one has fewer than two tokens.
    """
    rows = [list(row) for row in rows]
    if not rows or min(map(len, rows)) < 2:
        raise ValueError(
            "int8-full needs calibration: rows of two token ids or more, of text such as the model will see."
        )
    recorded: dict[str, list[Inputs]] = {name: [] for name in signatures}
    for row in rows:
        if "tokens" in signatures:
            recorded["tokens"].append(_encoder_inputs(signatures["tokens"], row))
        else:
            _read(signatures, row, recorded)
    return recorded


def _encoder_inputs(signature: Any, row: Tokens) -> Inputs:
    batch = _batch(signature, row)
    width = batch["token_ids"].shape[1]
    mask = np.arange(width) < batch["lengths"][:, None]
    return {"token_ids": batch["token_ids"], "padding_mask": mask, "token_type_ids": np.zeros_like(batch["token_ids"])}


def _read(signatures: Mapping[str, Any], row: Tokens, recorded: dict[str, list[Inputs]]) -> None:
    """Reads a row as a program around the file does: first a piece, then some tokens one by one."""
    specs = signatures["decode"].inputs
    cache = {name: tf.zeros(spec.shape, spec.dtype) for name, spec in specs.items() if name.startswith("cache_")}

    def run(name: str, tokens: Tokens) -> int:
        batch = _batch(signatures[name], tokens)
        given = {**batch, **({} if name == "encode" else cache)}
        recorded[name].append({key: np.asarray(value) for key, value in given.items()})
        outputs = signatures[name].function(**{key: tf.convert_to_tensor(value) for key, value in given.items()})
        cache.update({key: value for key, value in outputs.items() if key in cache})
        return int(batch["lengths"][0])

    reader = "encode" if "encode" in signatures else "prefill"
    num_read = run(reader, row[: len(row) // 2])
    for token in row[num_read : num_read + _NUM_STEPS]:
        run("decode", [token])


def _batch(signature: Any, row: Tokens) -> Inputs:
    """A row, cut to what the signature reads, in every row of a batch."""
    num_rows, width = signature.inputs["token_ids"].shape
    row = row[:width]
    token_ids = np.zeros((num_rows, width), np.int32)
    token_ids[:, : len(row)] = row
    return {"token_ids": token_ids, "lengths": np.full(num_rows, len(row), np.int32)}
