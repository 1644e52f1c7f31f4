"""Running .tflite files with ai-edge-litert: single signatures, and the loop that writes texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lmzoo.export.flatbuffers import read_notes

Arrays = dict[str, np.ndarray]


class TFLiteModel:
    """The signatures of a .tflite file, run by XNNPACK.

    It keeps the tensors whose names begin with "cache_" from one call to the next: they start as zeros, and what a call
    gives takes the place of what it was given. Keys and values, of rank 4, are changed where they lie.

    Args:
        path: of the file.
        num_threads: of the arithmetic; None is one for each core.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .tflite file, or a damaged one.
        ImportError: ai-edge-litert is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], num_threads: int | None = None) -> None:
        try:
            from ai_edge_litert.compiled_model import CompiledModel
            from ai_edge_litert.cpu_options import CpuOptions
            from ai_edge_litert.hardware_accelerator import HardwareAccelerator
            from ai_edge_litert.options import Options
        except ImportError:
            raise ImportError(
                "running a .tflite file needs the package ai-edge-litert: pip install 'lmzoo[tflite]'."
            ) from None
        self.notes = read_notes(path)
        """What the exporter has written down about the model; see `export_tflite`."""
        options = Options(
            hardware_accelerators=HardwareAccelerator.CPU,
            cpu_options=CpuOptions(num_threads=num_threads or os.cpu_count() or 1),
        )
        self.inputs: dict[str, dict[str, Any]] = {}
        """Name of a signature -> name of an input -> its shape and type."""
        self.outputs: dict[str, dict[str, Any]] = {}
        self._buffers: dict[str, Any] = {}
        self._given: dict[str, dict[str, Any]] = {}
        self._taken: dict[str, dict[str, Any]] = {}
        try:
            self._model = CompiledModel.from_file(os.fspath(path), options=options)
            for name in self._model.get_signature_list():
                self._add(name)
        except RuntimeError as error:
            raise ValueError(f"{path} is damaged, or has operators that LiteRT has not: {error}") from error
        self.reset()

    def reset(self) -> None:
        """Makes the cache empty."""
        for details in self.inputs.values():
            for name, detail in details.items():
                if name in self._buffers:
                    self._buffers[name].write(np.zeros(detail["shape"], detail["dtype"]))

    def run(self, signature: str, **inputs: Any) -> Arrays:
        """The outputs of a signature that are no cache, for its inputs that are none.

        Raises:
            ValueError: an input is missing or unknown, or has another shape.
        """
        details, given, taken = self.inputs[signature], self._given[signature], self._taken[signature]
        wanted = {name for name in details if name not in self._buffers}
        if wanted != inputs.keys():
            raise ValueError(
                f"{signature} takes {', '.join(sorted(wanted))}, but was given {', '.join(sorted(inputs))}."
            )
        for name, value in inputs.items():
            array, shape = np.asarray(value, details[name]["dtype"]), details[name]["shape"]
            if list(array.shape) != list(shape):
                raise ValueError(f"{name} has shape {list(array.shape)}, but {signature} takes {list(shape)}.")
            given[name].write(array)
        self._model.run_by_name(signature, given, taken)
        outputs = {
            name: _read(buffer, self.outputs[signature][name])
            for name, buffer in taken.items()
            if buffer is not self._buffers.get(name)
        }
        for name in outputs.keys() & self._buffers.keys():
            self._buffers[name].write(outputs.pop(name))
        return outputs

    def _add(self, signature: str) -> None:
        """Takes memory for a signature."""
        inputs = self.inputs[signature] = self._model.get_input_tensor_details(signature)
        outputs = self.outputs[signature] = self._model.get_output_tensor_details(signature)
        self._given[signature] = {name: self._buffer(signature, name, details) for name, details in inputs.items()}
        self._taken[signature] = {name: self._output(signature, name, details) for name, details in outputs.items()}

    def _buffer(self, signature: str, name: str, details: Mapping[str, Any]) -> Any:
        if not name.startswith("cache_"):
            return self._model.create_input_buffer_by_name(signature, name)
        if name not in self._buffers:
            self._buffers[name] = self._model.create_input_buffer_by_name(signature, name)
        return self._buffers[name]

    def _output(self, signature: str, name: str, details: Mapping[str, Any]) -> Any:
        """Memory for an output: that of the input of its name where the graph reads it once, to write it."""
        if name.startswith("cache_") and len(details["shape"]) == 4:
            return self._buffer(signature, name, details)
        return self._model.create_output_buffer_by_name(signature, name)


def _read(buffer: Any, details: Mapping[str, Any]) -> np.ndarray:
    shape = details["shape"]
    return buffer.read(int(np.prod(shape)), np.dtype(details["dtype"])).reshape(shape)


class TFLiteGenerator:
    """Continues or answers rows of token ids with a .tflite file; the tokenizer stays outside.

    ```python
    tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")
    generator = TFLiteGenerator("gpt.tflite")
    for token_ids in generator.stream([tokenizer.encode("Once upon a time").ids], temperature=0.8, top_k=40):
        print(tokenizer.decode(token_ids), end="", flush=True)
    ```

    A program in another language does the same: `examples/tflite_generate.cc` is the loop in C++, on LiteRT's C API.

    Args:
        model: a file, or one that is opened already.
        num_threads: as in `TFLiteModel`.

    Raises:
        ValueError: the file holds no model that writes texts.
    """

    def __init__(self, model: TFLiteModel | str | os.PathLike[str], num_threads: int | None = None) -> None:
        self.model = model if isinstance(model, TFLiteModel) else TFLiteModel(model, num_threads)
        if "decode" not in self.model.inputs:
            raise ValueError(
                f"the file has the signatures {', '.join(self.model.inputs)}, but a model that writes texts "
                "has one named decode."
            )
        notes, inputs = self.model.notes, self.model.inputs
        self.answers = "encode" in inputs
        self.batch_size = inputs["decode"]["token_ids"]["shape"][0]
        mask = "cache_tokens_mask" if self.answers else "cache_mask"
        self.cache_length = inputs["decode"][mask]["shape"][1]
        self._end, self._start = notes["eos_token_id"], notes.get("start_token_id", notes["eos_token_id"])
        padding = notes["pad_token_id"]
        self._padding = padding if padding is not None else self._end or 0
        self._num_taken = 0

    def generate(
        self,
        token_ids: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
        """New tokens [B, max_new_tokens] int32 for rows of token ids, padded after the end.

        Args:
            token_ids: texts to continue or to answer, B of them at the most.
            max_new_tokens: the most new tokens a row.
            temperature: divides the logits before the draw; 0 takes the most likely token.
            top_k: draw from the k most likely tokens only.
            top_p: draw from the smallest set of tokens whose probabilities sum to this.
            seed: of the draws in every row; None draws one.

        Raises:
            ValueError: too many rows, an id outside the vocabulary, or a text that leaves no room for the new tokens.
        """
        steps = list(self.stream(token_ids, max_new_tokens, temperature, top_k, top_p, seed))
        new = np.full((len(token_ids), max_new_tokens), self._padding, np.int32)
        for place, tokens in enumerate(steps):
            new[:, place] = tokens
        return new

    def stream(
        self,
        token_ids: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[list[int]]:
        """Yields the tokens of `generate`, one a row at a time, until all rows have ended."""
        rows = self._checked(token_ids, max_new_tokens)
        generators = [np.random.default_rng(seed) for _ in rows]
        has_ended = np.zeros(len(rows), bool)
        logits = self.read(rows)
        for step in range(max_new_tokens):
            tokens = [
                self._padding if ended else choose(scores, temperature, top_k, top_p, generator)
                for scores, ended, generator in zip(logits, has_ended, generators, strict=True)
            ]
            yield tokens
            has_ended |= np.array(tokens) == self._end if self._end is not None else False
            if has_ended.all() or step == max_new_tokens - 1:
                return
            logits = self.step(tokens, ~has_ended)

    def read(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits [rows, V] after texts, with which a new cache begins."""
        self.model.reset()
        self._num_taken = 0
        if not self.answers:
            return self._prefill(rows)
        length = self.model.inputs["encode"]["token_ids"]["shape"][1]
        self.model.run("encode", **self._batch(rows, length))
        return self.step([self._start] * len(rows))

    def step(self, tokens: Sequence[int], is_real: Any = None) -> np.ndarray:
        """Logits [rows, V] after one more token a row.

        Args:
            tokens: one a row.
            is_real: [rows] bool, False where a row has ended; its logits mean nothing then.
        """
        rows = [[token] if real else [] for token, real in zip(tokens, _all(tokens, is_real), strict=True)]
        return self._run("decode", rows, 1)

    def _prefill(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Reads texts in pieces, the last tokens one by one where a piece would reach beyond the cache."""
        width = self.model.inputs["prefill"]["token_ids"]["shape"][1]
        longest = max(len(row) for row in rows)
        logits = np.zeros((len(rows), self.model.outputs["decode"]["logits"]["shape"][1]), np.float32)
        while self._num_taken < longest:
            start, fits = self._num_taken, self._num_taken + width <= self.cache_length
            pieces = [row[start : start + (width if fits else 1)] for row in rows]
            scores = self._run("prefill", pieces, width) if fits else self._run("decode", pieces, 1)
            for place, piece in enumerate(pieces):
                if piece:
                    logits[place] = scores[place]
        return logits

    def _run(self, signature: str, rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
        logits = self.model.run(signature, **self._batch(rows, width))["logits"]
        self._num_taken += max(len(row) for row in rows)
        return logits[: len(rows)]

    def _batch(self, rows: Sequence[Sequence[int]], width: int) -> Arrays:
        token_ids = np.zeros((self.batch_size, width), np.int32)
        lengths = np.zeros(self.batch_size, np.int32)
        for place, row in enumerate(rows):
            token_ids[place, : len(row)], lengths[place] = row, len(row)
        return {"token_ids": token_ids, "lengths": lengths}

    def _checked(self, token_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The rows as lists; a start stands for an empty one."""
        if not 1 <= len(token_ids) <= self.batch_size:
            raise ValueError(f"there are {len(token_ids)} texts, but the file takes 1 to {self.batch_size} at a time.")
        rows = [[int(token) for token in row] or [self._end or 0] for row in token_ids]
        vocab_size = self.model.notes["vocab_size"]
        ids = [token for row in rows for token in row]
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(f"token ids must lie in [0, {vocab_size}), but a text has {min(ids)} to {max(ids)}.")
        longest = max(len(row) for row in rows)
        if self.answers:
            width = self.model.inputs["encode"]["token_ids"]["shape"][1]
            if longest > width or max_new_tokens > self.cache_length:
                raise ValueError(
                    f"the longest text has {longest} tokens and max_new_tokens is {max_new_tokens}, but this file "
                    f"reads {width} and writes {self.cache_length} at most."
                )
        elif longest + max_new_tokens - 1 > self.cache_length:
            raise ValueError(
                f"the longest text has {longest} tokens and max_new_tokens is {max_new_tokens}, but together they may "
                f"be {self.cache_length + 1} at most in this file."
            )
        return rows


def _all(tokens: Sequence[int], is_real: Any) -> Any:
    return [True] * len(tokens) if is_real is None else is_real


def choose(
    logits: np.ndarray,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: np.random.Generator | None = None,
) -> int:
    """The next token of a row, from its logits [V]; the other arguments are those of `TFLiteGenerator.generate`."""
    if temperature == 0:
        return int(np.argmax(logits))
    scores = logits.astype(np.float64) / temperature
    order = np.argsort(-scores, kind="stable")[:top_k]
    probabilities = np.exp(scores[order] - scores[order[0]])
    if top_p is not None:
        before = np.cumsum(probabilities) - probabilities
        probabilities[before >= top_p * probabilities.sum()] = 0.0
    generator = np.random.default_rng() if generator is None else generator
    return int(generator.choice(order, p=probabilities / probabilities.sum()))
