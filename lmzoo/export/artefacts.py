"""Artefacts of a model behind one face, whatever runtime they are for, so that all can be asked the same questions."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Tokens = Sequence[int]


class Artefact(ABC):
    """A model that can be run.

    Attributes:
        kind: what it is, such as "TFLite int8".
        path: where it lies.
    """

    kind: str
    path: Path

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        files = [self.path] if self.path.is_file() else [file for file in self.path.rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)

    @abstractmethod
    def output(self, token_ids: Tokens, token_type_ids: Tokens) -> np.ndarray:
        """What a model that reads texts gives for one, without a batch axis, and without what is of padding."""

    @abstractmethod
    def logits(self, source: Tokens, tokens: Tokens) -> np.ndarray:
        """What a model that writes texts thinks of one: logits [T - 1, V] of its tokens after the first.

        Args:
            source: of the text, where the model answers one; empty where it continues texts.
            tokens: T of them.
        """

    @abstractmethod
    def seconds(self, source: Tokens, tokens: Tokens, num_new: int) -> tuple[float, float | None]:
        """Seconds to the first new token after `tokens`, and for each that follows; None where it has no step."""


def open_artefact(path: str | os.PathLike[str]) -> Artefact:
    """A .tflite file, or a SavedModel or the newest of several in a directory.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path)
    if is_tflite(path):
        return TFLiteArtefact(path)
    found = find_saved_model(path)
    if found is None:
        raise ValueError(f"{path} is neither a .tflite file nor a SavedModel nor a directory with versions of one.")
    return SavedModelArtefact(found)


def is_tflite(path: Path) -> bool:
    """Whether it is a .tflite file."""
    return path.suffix == ".tflite" and path.is_file()


def find_saved_model(path: Path) -> Path | None:
    """The SavedModel itself, or the newest version in a directory of them; None if there is none."""
    if (path / "saved_model.pb").is_file():
        return path
    versions = [child for child in path.glob("*") if child.name.isdecimal() and (child / "saved_model.pb").is_file()]
    return max(versions, key=lambda child: int(child.name), default=None)


class TFLiteArtefact(Artefact):
    """A .tflite file as `export_tflite` writes it."""

    def __init__(self, path: Path) -> None:
        from lmzoo.export.tflite_runtime import TFLiteGenerator, TFLiteModel

        self.path = path
        self._model: Any = TFLiteModel(path)
        self.kind = f"TFLite {self._model.notes['weights']}"
        if "decode" in self._model.inputs:
            self._generator = TFLiteGenerator(self._model)

    def output(self, token_ids: Tokens, token_type_ids: Tokens) -> np.ndarray:
        """What the signature `tokens` gives."""
        shape, count = self._model.inputs["tokens"]["token_ids"]["shape"], len(token_ids)
        if count > shape[1]:
            raise ValueError(f"a text has {count} tokens, but {self.path} reads {shape[1]}: ask for a smaller length.")
        inputs = {name: np.zeros(shape, np.int32) for name in ("token_ids", "token_type_ids", "padding_mask")}
        for name, values in (("token_ids", token_ids), ("token_type_ids", token_type_ids), ("padding_mask", 1)):
            inputs[name][0, :count] = values
        return without_padding(self._model.run("tokens", **inputs)["output"][0], shape[1], count)

    def logits(self, source: Tokens, tokens: Tokens) -> np.ndarray:
        """One token after the other, as it is used."""
        generator = self._generator
        first = generator.read([source] if generator.answers else [tokens[:1]])
        return np.concatenate([first, *(generator.step([token]) for token in tokens[1:-1])])

    def seconds(self, source: Tokens, tokens: Tokens, num_new: int) -> tuple[float, float]:
        """Of `prefill` or `encode`, and of `decode`."""
        generator = self._generator

        def run() -> tuple[float, float]:
            watch = Stopwatch()
            logits = generator.read([source if generator.answers else tokens])
            first = watch.lap()
            for _ in range(num_new - 1):
                logits = generator.step([int(np.argmax(logits[0]))])
            return first, watch.lap() / (num_new - 1)

        run()
        return run()


class SavedModelArtefact(Artefact):
    """A SavedModel as a pipeline exports it, by its signatures on ids: `tokens`, and `prefill` and `decode`."""

    kind = "SavedModel"

    def __init__(self, path: Path) -> None:
        import tensorflow as tf

        self.path = path
        self._signatures = tf.saved_model.load(str(path)).signatures

    def output(self, token_ids: Tokens, token_type_ids: Tokens) -> np.ndarray:
        """What the signature `tokens` gives."""
        (output,) = self._call("tokens", token_ids=token_ids, token_type_ids=token_type_ids).values()
        return output[0].numpy()

    def logits(self, source: Tokens, tokens: Tokens) -> np.ndarray:
        """What the signature `tokens` gives."""
        given = tokens[:-1]
        inputs = {"token_ids": source, "decoder_token_ids": given} if source else {"token_ids": given}
        return self._call("tokens", **inputs)["logits"][0].numpy()

    def seconds(self, source: Tokens, tokens: Tokens, num_new: int) -> tuple[float, float | None]:
        """Of the signatures `prefill` and `decode`, or of `tokens` alone where there are none."""
        import tensorflow as tf

        def run() -> tuple[float, float | None]:
            watch = Stopwatch()
            if "decode" not in self._signatures:
                self.logits(source, [*tokens, 0])
                return watch.lap(), None
            outputs = self._call("prefill", token_ids=source or tokens)
            first = watch.lap()
            for _ in range(num_new - 1):
                token = int(np.argmax(outputs.pop("logits")[0]))
                outputs = self._signatures["decode"](token_ids=tf.constant([[token]]), **outputs)
            return first, watch.lap() / (num_new - 1)

        run()
        return run()

    def _call(self, name: str, **inputs: Tokens) -> dict[str, Any]:
        """The outputs of a signature for a batch of one row, of the inputs that it has."""
        import tensorflow as tf

        count = len(inputs["token_ids"])
        given = {**inputs, "padding_mask": [1] * count, "lengths": count}
        specs = self._signatures[name].structured_input_signature[1]
        rows = {key: np.array([given[key]], spec.dtype.as_numpy_dtype) for key, spec in specs.items()}
        return self._signatures[name](**{key: tf.constant(row) for key, row in rows.items()})


class Stopwatch:
    """Seconds since the last look at it."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """The seconds since it was made, or since the last lap."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last


def without_padding(array: np.ndarray, width: int, count: int) -> np.ndarray:
    """Of an output with a place for each of `width` tokens, those of the first `count`."""
    return array[:count] if array.ndim and array.shape[0] == width else array
