"""From a checkpoint or a run to a .tflite file."""

from __future__ import annotations

import os
from pathlib import Path

from lmzoo.checkpoints import find_checkpoint
from lmzoo.data.sources import read_documents
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.export import export_tflite
from lmzoo.export.tflite_weights import Weights
from lmzoo.training.keras_artefact import load_model

# Documents that show the ranges of activations, and tokens that are taken of each.
_NUM_SHOWN, _TOKENS_SHOWN = 32, 64


def export_checkpoint_tflite(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    weights: Weights = "float32",
    length: int | None = None,
    text: str = "pydoc",
) -> Path:
    """Writes the model of a checkpoint or a run as a .tflite file; its tokenizer.json goes to the phone beside it.

    Args:
        checkpoint: directory of the checkpoint or the run.
        path, weights, length: as in `lmzoo.export.export_tflite`.
        text: a source of text, as `lmzoo.data.sources` reads it, for the calibration of "int8-full".

    Raises:
        CheckpointError, FileNotFoundError, ValueError, OSError: it cannot be read, exported or written.
    """
    directory = find_checkpoint(checkpoint)
    shown: list[list[int]] = []
    if weights == "int8-full":
        tokenizer = Tokenizer.from_pretrained(directory)
        encoded = (tokenizer.encode(document, add_special_tokens=True) for document in read_documents(text))
        long_enough = (tokens for tokens in encoded if len(tokens) > 1)
        shown = [tokens[:_TOKENS_SHOWN] for tokens, _ in zip(long_enough, range(_NUM_SHOWN), strict=False)]
    return export_tflite(load_model(directory), path, weights=weights, length=length, calibration=shown)
