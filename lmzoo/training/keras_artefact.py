"""A checkpoint as an artefact, so that those that were made of it can be compared with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from lmzoo.checkpoints import find_checkpoint
from lmzoo.export.artefacts import Artefact, Stopwatch, Tokens
from lmzoo.models import CausalLM, Seq2SeqLM, find_architecture, load_pretrained
from lmzoo.pipelines import load_pipeline


def load_model(directory: Path) -> Any:
    """The model of a checkpoint, with its head."""
    if issubclass(find_architecture(directory), CausalLM | Seq2SeqLM):
        return load_pretrained(directory, dtype="float32")
    return load_pipeline(directory, dtype="float32").model


class KerasArtefact(Artefact):
    """A checkpoint, run by the model's own graph."""

    kind = "Keras"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = find_checkpoint(path)
        self._model = load_model(self.path)
        self._run = tf.function(
            lambda inputs: self._model(inputs, training=False), autograph=False, reduce_retracing=True
        )

    def output(self, token_ids: Tokens, token_type_ids: Tokens) -> np.ndarray:
        """What the model gives."""
        ids = np.array([token_ids], np.int32)
        types = np.array([token_type_ids], np.int32)
        return self._run({"token_ids": ids, "padding_mask": np.ones_like(ids, bool), "token_type_ids": types})[
            0
        ].numpy()

    def logits(self, source: Tokens, tokens: Tokens) -> np.ndarray:
        """What the model gives."""
        given = np.array([tokens[:-1]], np.int32)
        inputs = (
            {"token_ids": np.array([source], np.int32), "decoder_token_ids": given} if source else {"token_ids": given}
        )
        return self._run(inputs)[0].numpy()

    def seconds(self, source: Tokens, tokens: Tokens, num_new: int) -> tuple[float, float]:
        """Of `stream`."""

        def generate() -> tuple[float, float]:
            watch = Stopwatch()
            stream = self._model.stream([source or tokens], num_new, temperature=0.0, min_new_tokens=num_new)
            next(stream)
            first, rest = watch.lap(), sum(1 for _ in stream)
            return first, watch.lap() / rest

        generate()
        return generate()
