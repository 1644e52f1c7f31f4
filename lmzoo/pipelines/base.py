"""What all pipelines share: how they are made, called on strings, and exported."""

from __future__ import annotations

import functools
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import tensorflow as tf

from lmzoo.checkpoints import find_checkpoint
from lmzoo.data.tokenizer_training import without_surrogates
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.export import write_bundle
from lmzoo.models import load_pretrained
from lmzoo.pipelines.attention import MAX_TOKENS, attention_function
from lmzoo.pipelines.guards import checked_ids, with_room

Tensor = Any
Outputs = dict[str, Tensor]

# Words of the texts that a server warms up with, up to those that fill the context.
_WARMUP_LENGTHS = (8, 32, 128, 512, 2048)


class Pipeline(tf.Module):
    """A model and its tokenizer, called on strings. What is called in Python is the graph that is exported.

    Args:
        model: any model with a `config`.
        tokenizer: the one whose ids the model was trained on. It must have an in-graph twin.

    Raises:
        ValueError: the tokenizer has more tokens than the model, or no in-graph twin.
    """

    # The texts of one input, by the names they have in the graph.
    _inputs: tuple[str, ...] = ("text",)

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__()
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens (tokenizer.vocab_size), but the model has embeddings "
                f"for {model.config.vocab_size} (config.vocab_size): take the tokenizer that the model was trained "
                "with."
            )
        self.model = model
        self.tokenizer = tokenizer
        self._graph_tokenizer = tokenizer.graph

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, dtype: Any = None, **settings: Any) -> Self:
        """The pipeline of a checkpoint with its tokenizer beside it, or of a run, whose best checkpoint is taken.

        Args:
            directory: of the checkpoint or the run.
            dtype: Keras dtype or policy of the model.
            settings: arguments of the constructor.

        Raises:
            CheckpointError, FileNotFoundError, ValueError: it cannot be read, or model and tokenizer do not match.
        """
        directory = find_checkpoint(directory)
        settings = {**cls._checkpoint_settings(directory), **settings}
        return cls(cls._load_model(directory, dtype), Tokenizer.from_pretrained(directory), **settings)

    @classmethod
    def _load_model(cls, directory: Path, dtype: Any) -> Any:
        return load_pretrained(directory, dtype=dtype)

    @classmethod
    def _checkpoint_settings(cls, directory: Path) -> dict[str, Any]:
        """Arguments of the constructor that a checkpoint brings along."""
        return {}

    def attention(self, *texts: str) -> tuple[list[str], np.ndarray]:
        """How much the tokens of a text attend to one another.

        Args:
            texts: the text; for what is asked with several texts, such as question and context, each of them.

        Returns:
            T tokens, as they read, and the attention [L, N, T, T] float32 of each layer, each head and each token to
            each token: a row sums to 1. As in `export`, T is 64 at most.

        Raises:
            TypeError: a text is not a str.
        """
        outputs = self._attention(*(tf.constant([as_text(text)]) for text in texts))
        return [token.decode() for token in outputs["tokens"][0].numpy()], outputs["attention"][0].numpy()

    def export(self, directory: str | os.PathLike[str], version: int | None = None, *, attention: bool = False) -> Path:
        """Writes `<directory>/<version>/`, a SavedModel for TF Serving that needs neither lmzoo nor Keras.

        Its signatures are those that the class names. In Python, `tf.saved_model.load(path)` also has each of them but
        `serving_default` as a method. With tensorflow-serving-api there are requests for the server to warm up with.
        Beside the versions, README.md says how to serve and to call them.

        Args:
            directory: of all versions.
            version: must be higher than the versions there are. None is the next number.
            attention: whether there is a signature `attention` too, of which the page of `lmzoo demo` makes pictures:
                the texts that `serving_default` takes [B] -> tokens [B, T], as they read and "" for padding, and
                attention [B, L, N, T, T] float32 of layers, heads, tokens that look, and tokens that are looked at, 0
                for padding. Of an encoder-decoder it is the encoder's. A text loses what the model would not read of
                it, and what is more than 64 tokens: so the answer to one, from a model of 12 layers with 12 heads, is
                less than the 4 MiB that gRPC takes.

        Returns:
            The directory of the version.

        Raises:
            FileExistsError, ValueError, OSError: as `lmzoo.export.write_bundle`.
        """
        module = tf.Module()
        module.weights = [weight.value for weight in self.model.weights]
        module.tokenizer = self._graph_tokenizer
        signatures = self._signatures() | ({"attention": self._attention} if attention else {})
        for name, function in signatures.items():
            if name != "serving_default":
                setattr(module, name, function)
        lengths = (size for size in _WARMUP_LENGTHS if size < self.model.config.context_length)
        texts = [self._sample_text(length) for length in (*lengths, self.model.config.context_length)]
        return write_bundle(directory, module, signatures, version=version, texts=texts, title=type(self).__name__)

    def _sample_text(self, num_words: int) -> str:
        """A text of so many words, for a server to warm up with."""
        return " ".join(["a"] * num_words)

    @abstractmethod
    def _signatures(self) -> dict[str, Any]:
        """Name -> `tf.function` with an input signature."""

    @functools.cached_property
    def _attention(self) -> Any:
        return attention_function(self._attend, self._inputs, self.tokenizer)

    @abstractmethod
    def _attend(self, *texts: Tensor) -> tuple[Tensor, Tensor]:
        """Has the model read columns of texts, tf.string [B], for a record of its attention.

        Returns:
            The tokens that attend to one another, [B, T] int32, `MAX_TOKENS` at most, and which of them are no padding.
        """


class EncoderPipeline(Pipeline):
    """A pipeline that reads whole texts, or pairs of texts, and gives one result for each.

    A subclass says what its graph is in `_outputs`, and what it gives for a row of that graph's outputs in `_result`.

    Args:
        model, tokenizer: as in `Pipeline`.
        max_length: tokens, special ones included; what is longer loses its end. None is the model's context length.

    Raises:
        ValueError: as `Pipeline`, or `max_length` is more than the model reads or less than the special tokens take.
    """

    # What the model gives, in the signature `tokens`.
    _model_output = "logits"

    def __init__(self, model: Any, tokenizer: Tokenizer, max_length: int | None = None) -> None:
        super().__init__(model, tokenizer)
        context_length = model.config.context_length
        if max_length is None:
            max_length = context_length
        if isinstance(max_length, bool) or not isinstance(max_length, int) or not 1 <= max_length <= context_length:
            raise ValueError(
                f"max_length is {max_length!r}, but must be an integer from 1 to {context_length}, the model's "
                "context_length."
            )
        self.max_length = max_length
        pads = (model.config.pad_token_id, tokenizer.pad_token_id, 0)
        self._pad_token_id = next(token for token in pads if token is not None)
        self._run = self._function(*self._inputs)

    # ---- calling

    def _call(self, function: Any, columns: Mapping[str, Any], batch_size: int) -> Any:
        """The result of one input, a list of those of several, or the graph's own outputs for tensors.

        Args:
            function: a graph of as many tf.string tensors [B] as there are columns.
            columns: name of an argument -> a str, an iterable of str, or a tf.string tensor [B]; all of one kind.
            batch_size: rows that go through the graph at a time, those of similar lengths together.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}, but must be 1 or more.")
        if any(tf.is_tensor(values) for values in columns.values()):
            for name, values in columns.items():
                if not tf.is_tensor(values) or values.shape.rank != 1 or values.dtype != tf.string:
                    raise TypeError(f"{name} is {_kind(values)}, but must be tf.string [B].")
            return function(*columns.values())
        single = {isinstance(values, str) for values in columns.values()}
        if len(single) > 1:
            raise TypeError(f"{' and '.join(columns)} must both be a str, or both be lists of str.")
        if single == {True}:
            columns = {name: [values] for name, values in columns.items()}
        lists = [[as_text(item) for item in values] for values in columns.values()]
        if len({len(texts) for texts in lists}) > 1:
            sizes = " and ".join(f"{len(texts)} of {name}" for name, texts in zip(columns, lists, strict=True))
            raise ValueError(f"there are {sizes}: give as many of each.")
        results = self._results(function, list(zip(*lists, strict=True)), batch_size)
        return results[0] if single == {True} else results

    def _results(self, function: Any, rows: list[tuple[str, ...]], batch_size: int) -> Any:
        results: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])), reverse=True)
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            columns = zip(*(rows[index] for index in batch), strict=True)
            outputs = {name: value.numpy() for name, value in function(*map(tf.constant, columns)).items()}
            for place, index in enumerate(batch):
                results[index] = self._result({name: values[place] for name, values in outputs.items()}, rows[index])
        return results

    @abstractmethod
    def _result(self, row: dict[str, Any], texts: tuple[str, ...]) -> Any:
        """What a call gives for one input.

        Args:
            row: one row of the outputs of `_outputs`, as NumPy values.
            texts: the input.
        """

    # ---- the graph

    @abstractmethod
    def _outputs(self, *texts: Tensor) -> Outputs:
        """Outputs by name, each [B, ...], for columns of texts, each tf.string [B] in valid UTF-8."""

    def _function(self, *names: str) -> Any:
        """The graph on columns of texts with these names."""

        def run(*texts: Tensor) -> Outputs:
            with tf.device("CPU:0"):
                whole = [tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace") for text in texts]
            return self._outputs(*whole)

        specs = [tf.TensorSpec([None], tf.string, name) for name in names]
        return tf.function(run, input_signature=specs, autograph=False)

    def _batch(self, token_ids: Any, token_type_ids: Any) -> dict[str, Tensor]:
        """Ragged token ids and types [B, None] as the model reads them, one token wide at least."""
        width = tf.maximum(token_ids.bounding_shape(axis=1), 1)
        return {
            "token_ids": padded(token_ids, self._pad_token_id, width),
            "padding_mask": tf.sequence_mask(token_ids.row_lengths(), width),
            "token_type_ids": padded(token_type_ids, 0, width),
        }

    def _attend(self, *texts: Tensor) -> tuple[Tensor, Tensor]:
        encodings = self._graph_tokenizer.encode_pairs(*texts, max_length=min(self.max_length, MAX_TOKENS))
        batch = self._batch(encodings.token_ids, encodings.token_type_ids)
        self.model(batch, training=False)
        return batch["token_ids"], batch["padding_mask"]

    def _signatures(self) -> dict[str, Any]:
        inputs = {"token_ids": tf.int32, "padding_mask": tf.bool, "token_type_ids": tf.int32}

        config = self.model.config

        def tokens(*values: Tensor) -> Outputs:
            batch = dict(zip(inputs, values, strict=True))
            token_ids = checked_ids(batch["token_ids"], config.vocab_size)
            batch["token_ids"] = with_room(token_ids, tf.shape(token_ids)[1], config.context_length)
            if getattr(config, "num_token_types", 0) > 1:
                batch["token_type_ids"] = checked_ids(batch["token_type_ids"], config.num_token_types)
            return {self._model_output: self.model(batch, training=False)}

        specs = [tf.TensorSpec([None, None], dtype, name) for name, dtype in inputs.items()]
        return {
            "serving_default": self._run,
            "tokens": tf.function(tokens, input_signature=specs, autograph=False),
        }


def check_task(pipeline: Pipeline, model: Any, model_class: type) -> None:
    """Raises a ValueError unless the model is of the task."""
    if not isinstance(model, model_class):
        raise ValueError(
            f"{type(pipeline).__name__} needs a {model_class.__name__}, but the model is a {type(model).__name__}."
        )


def as_text(text: Any) -> str:
    """A str with which UTF-8 can be written.

    Raises:
        TypeError: it is no str.
    """
    if not isinstance(text, str):
        raise TypeError(f"a text is {type(text).__name__}, not str: decode bytes first.")
    return without_surrogates(text)


def padded(ragged: Any, missing: Any, width: Tensor) -> Tensor:
    """Ragged [B, None, ...] as a tensor [B, width, ...], where `missing` fills the rest of a row."""
    dense = ragged.to_tensor(missing)
    rest = width - tf.shape(dense, width.dtype)[1]
    return tf.pad(dense, [[0, 0], [0, rest], *[[0, 0]] * (dense.shape.rank - 2)], constant_values=missing)


def by_row(values: Tensor, row: Tensor, num_rows: Tensor) -> Any:
    """Values [N, ...] of rows [N], ascending, as ragged [B, None, ...]."""
    return tf.RaggedTensor.from_value_rowids(values, row, num_rows, validate=False)


def _kind(value: Any) -> str:
    return f"a {value.dtype.name} tensor of shape {value.shape}" if tf.is_tensor(value) else f"a {type(value).__name__}"
