"""What every language model can do: its contract with training, decoding and checkpoints."""

from __future__ import annotations

import functools
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import keras
import numpy as np
import tensorflow as tf

from lmzoo import checkpoints
from lmzoo.config import ModelConfig
from lmzoo.engine.metrics import GlobalMean, Perplexity
from lmzoo.engine.model import ReplicatedModel
from lmzoo.engine.optimizers import make_optimizer
from lmzoo.engine.recompute import recomputed
from lmzoo.generation.decode import Decoder, StreamedTokens
from lmzoo.generation.sampling import SamplingOptions
from lmzoo.layers import KeyValueCache, token_cross_entropy

Tensor = Any
Prompts = Any

# Prompts are padded to a multiple of this, so that prompts of similar lengths share one compiled function.
_PROMPT_MULTIPLE = 32


class LanguageModel(ReplicatedModel):
    """A model from token ids to logits, with its objective, its decoding step and its checkpoint layout.

    A subclass says what it is in five methods: `features`, `head`, `init_cache`, `checkpoint_variables` and, on its
    config, `from_hugging_face` / `to_hugging_face`. All weights exist when the constructor returns.

    Args:
        config: shape of the model.
        dtype: a Keras dtype or policy: "float32", "mixed_bfloat16", "mixed_float16", or "bfloat16" for inference.
    """

    config_class: ClassVar[type[ModelConfig]]
    checkpoint_prefix: ClassVar[str] = ""
    checkpoint_tied: ClassVar[Mapping[str, str]] = {}
    checkpoint_ignored: ClassVar[str | None] = None

    def __init__(self, config: ModelConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self._label_smoothing = self._z_loss = 0.0
        self._remat: str | None = None

    # -- What an architecture implements.

    @abstractmethod
    def features(
        self, inputs: Any, training: bool | None = None, cache: KeyValueCache | None = None
    ) -> Tensor | tuple[Tensor, KeyValueCache]:
        """Final hidden states, before the output head.

        Shapes:
            inputs: token ids [B, T] or a dict of the batch contract; returns [B, T, D] in the compute dtype, and with
            a `cache` the updated cache too.
        """

    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output head: table [V, D] in the compute dtype, and a bias [V] or None."""

    @abstractmethod
    def init_cache(self, batch_size: Any, cache_length: Any) -> KeyValueCache:
        """An empty cache for `batch_size` rows of `cache_length` tokens; either may be a scalar tensor."""

    @abstractmethod
    def checkpoint_variables(self) -> dict[str, keras.Variable]:
        """Name in a checkpoint of the Hugging Face layout (without prefix) -> variable of the same shape."""

    # -- Making one.

    @classmethod
    def from_preset(cls, name: str, *, dtype: Any = None, **overrides: Any) -> Self:
        """A model of the published shape `name` with random weights.

        Args:
            name: a key of the config's `PRESETS`.
            dtype: as in the constructor.
            overrides: config fields to replace.

        Raises:
            ValueError: unknown preset or field.
        """
        return cls(cls.config_class.preset(name, **overrides), dtype=dtype)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, dtype: Any = None, **overrides: Any) -> Self:
        """A model with the weights of a checkpoint in the Hugging Face layout.

        Args:
            directory: holds config.json and model.safetensors, or shards with their index.
            dtype: as in the constructor; weights are cast to its variable dtype.
            overrides: config fields to replace that change no shape, such as a dropout rate.

        Raises:
            CheckpointError: a file is missing or damaged, the checkpoint is of another architecture, or its tensors
                are not those of the model; all that do not fit are named.
        """
        with checkpoints.unchanged(directory):
            config = cls._config_from(checkpoints.read_config(directory), directory).replace(**overrides)
            model = cls(config, dtype=dtype)
            model.load_pretrained_weights(directory)
        return model

    def load_pretrained_weights(self, directory: str | os.PathLike[str]) -> None:
        """Loads the weights of a checkpoint in the Hugging Face layout into this model.

        Raises:
            CheckpointError: as `from_pretrained`; no weight has been changed then.
        """
        variables = self.checkpoint_variables()
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        readers = checkpoints.match_tensors(
            checkpoints.read_tensors(directory),
            shapes,
            prefix=self.checkpoint_prefix,
            ignored=self.checkpoint_ignored,
            tied=self.checkpoint_tied,
        )
        for name, variable in variables.items():
            variable.assign(readers[name]().astype(variable.dtype))

    @classmethod
    def _config_from(cls, values: Mapping[str, Any], directory: Any) -> Any:
        model_type = values.get("model_type")
        if model_type != cls.config_class.model_type:
            raise checkpoints.CheckpointError(
                f"{directory} holds a checkpoint of model_type {model_type!r}, but {cls.__name__} reads "
                f"{cls.config_class.model_type!r}."
            )
        try:
            return cls.config_class.from_hugging_face(values)
        except ValueError as error:
            raise checkpoints.CheckpointError(f"{cls.__name__} cannot be made from {directory}: {error}") from None

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes the weights and the config in the Hugging Face layout; `from_pretrained` reads them back.

        An older checkpoint in the same directory stays readable until this one is complete.
        """
        config = {**self.config.to_hugging_face(), "dtype": self.variable_dtype}
        tensors = {
            self.checkpoint_prefix + name: functools.partial(keras.ops.convert_to_numpy, variable)
            for name, variable in self.checkpoint_variables().items()
        }
        checkpoints.write_checkpoint(directory, config, tensors, max_shard_bytes=max_shard_bytes)

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, as `.keras` files hold them."""
        return {**super().get_config(), "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """The inverse of `get_config`."""
        return cls(**{**config, "config": cls.config_class.from_dict(config["config"])})

    # -- Training.

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Logits [B, T, V] float32, for inputs as `features` takes them."""
        return self.logits(self.features(inputs, training=training))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens: [..., D] -> [..., V] float32."""
        table, bias = self.head()
        logits = keras.ops.cast(keras.ops.matmul(hidden, keras.ops.transpose(table)), "float32")
        return logits if bias is None else logits + keras.ops.cast(bias, "float32")

    def compile(
        self,
        optimizer: Any = None,
        loss: Any = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        remat: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        """Configures training. Without arguments: the architecture's own objective, and AdamW.

        Args:
            optimizer: a Keras optimizer or its name. None is AdamW with a learning rate of 3e-4, betas 0.9 and 0.95,
                decay of 0.1 on matrices only, and clipping to a global norm of 1.
            loss: None for token cross-entropy without logits in memory; a Keras loss gets the logits.
            label_smoothing: epsilon of the own objective, in [0, 1).
            z_loss: factor of the own objective's log(Z) ** 2.
            remat: "block" keeps only the inputs of each block and computes the rest again going backward.
            jit_compile: compile the step with XLA. "auto" does so on GPUs only (Keras's does on CPUs too).
            kwargs: as in `ReplicatedModel.compile`.
        """
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing!r}, but must lie in [0, 1).")
        if z_loss < 0.0:
            raise ValueError(f"z_loss is {z_loss!r}, but must be 0 or more.")
        if remat not in (None, "block"):
            raise ValueError(f'remat is {remat!r}, but must be "block" or None.')
        self._label_smoothing, self._z_loss, self._remat = label_smoothing, z_loss, remat
        if optimizer is None:
            with self.distribute_strategy.scope():
                optimizer = make_optimizer("adamw", 3e-4, beta_2=0.95)
        if jit_compile == "auto":
            jit_compile = bool(tf.config.list_physical_devices("GPU"))
        super().compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile, **kwargs)

    def get_compile_config(self) -> dict[str, Any]:
        """Arguments of `compile`, as `.keras` files hold them."""
        config = super().get_compile_config()
        own = {"label_smoothing": self._label_smoothing, "z_loss": self._z_loss, "remat": self._remat}
        return {**config, **own} if config else config

    def sum_metrics(self) -> dict[str, GlobalMean | Sequence[GlobalMean]]:
        """Loss, perplexity and token accuracy."""
        return {"loss": [GlobalMean(name="loss"), Perplexity()], "accuracy": GlobalMean(name="accuracy")}

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of token cross-entropy over the labels that count; see `ReplicatedModel.compute_sums`."""
        hidden = self.features(inputs, training=training)
        weights = token_weights(weights, labels)
        table, bias = self.head()
        sums = token_cross_entropy(
            hidden,
            table,
            labels,
            weights,
            bias=bias,
            label_smoothing=self._label_smoothing,
            z_loss=self._z_loss,
            training=training,
        )
        return {"loss": (sums.loss, sums.weight), "accuracy": (sums.correct, sums.weight)}

    def run_block(self, block: keras.layers.Layer, /, *tensors: Any, training: bool | None = None, **more: Any) -> Any:
        """`block(*tensors, training=training, **more)`, for `features`: with what `compile(remat=...)` says.

        All that has a gradient is in `tensors`, which may hold None.
        """
        run = functools.partial(recomputed, block) if training and self._remat else block
        return run(*tensors, training=training, **more)

    # -- Decoding.

    def decode_step(
        self, token_ids: Tensor, cache: KeyValueCache, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """Reads T more tokens a row and scores the next one: prefill with T of a prompt, decode with T = 1.

        Shapes:
            token_ids [B, T]; padding_mask [B, T] bool, True on the left part of each row; returns logits [B, V]
            float32 at the last real token of each row, and the cache.
        """
        inputs = {"token_ids": token_ids}
        if padding_mask is not None:
            inputs["padding_mask"] = padding_mask
        hidden, cache = self.features(inputs, training=False, cache=cache)
        if token_ids.shape[1] == 1 or padding_mask is None:
            last = hidden[:, -1]  # [B, D]
        else:
            lengths = tf.reduce_sum(tf.cast(padding_mask, tf.int32), axis=1)
            last = tf.gather(hidden, tf.maximum(lengths - 1, 0), axis=1, batch_dims=1)  # [B, D]
        return self.logits(last), cache

    def generate(
        self,
        token_ids: Prompts,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: Any = None,
        **options: Any,
    ) -> Tensor:
        """Continues prompts, one token at a time from a cache, in one compiled graph.

        Shapes:
            token_ids: prompts [B, T], a ragged tensor or lists of different lengths, or a dict with `token_ids` and
            `padding_mask` (padding on either side). Returns [B, max_new_tokens] int32: new tokens only, padded after
            the end.

        Args:
            max_new_tokens: the most new tokens a row, >= 1.
            temperature, top_k, top_p: as in `SamplingOptions`; temperature 0 is greedy.
            seed: int for all rows, or one a row; None draws one. A row gives the same tokens alone or in a batch.
            options: the other fields of `SamplingOptions`: min_p, repetition_penalty, stop_sequences and so on.

        Raises:
            ValueError: an id outside the vocabulary, an empty prompt where the model has no end token to start from,
                or a prompt that leaves no room for `max_new_tokens` in the context.
        """
        sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, **options)
        prompts, lengths = self.pad_prompts(token_ids, max_new_tokens)
        _, run = self._kept_decoder(max_new_tokens, sampling)
        seeds = None if seed is None else tf.constant(np.asarray(seed, np.int64))
        return run(tf.constant(prompts), tf.constant(lengths), seeds)

    def stream(
        self,
        token_ids: Prompts,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: Any = None,
        **options: Any,
    ) -> Iterator[StreamedTokens]:
        """Yields the tokens of `generate` with the same arguments, one a row at a time (`StreamedTokens`)."""
        sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, **options)
        prompts, lengths = self.pad_prompts(token_ids, max_new_tokens)
        decoder, _ = self._kept_decoder(max_new_tokens, sampling)
        return decoder.stream(prompts, lengths, seeds=seed)

    def decoder(self, max_new_tokens: int, options: SamplingOptions, **kwargs: Any) -> Decoder:
        """The decoding loop of this model, to be called inside a graph of one's own."""
        eos_token_id, pad_token_id = self.config.eos_token_id, self.config.pad_token_id
        return Decoder(
            self.decode_step,
            self.init_cache,
            max_new_tokens=max_new_tokens,
            options=options,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id if pad_token_id is not None else eos_token_id or 0,
            **kwargs,
        )

    def pad_prompts(self, token_ids: Prompts, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts of any form as rows padded on the right [B, P], and their lengths [B]; checks that they fit."""
        rows = _prompt_rows(token_ids, self.config.vocab_size)
        start = self.config.eos_token_id
        if start is None and any(len(row) == 0 for row in rows):
            raise ValueError("a prompt is empty, and this model has no eos_token_id to start from: give it a token.")
        rows = [row if len(row) else np.array([start], np.int32) for row in rows]
        lengths = np.array([len(row) for row in rows], np.int32)
        longest, context = int(lengths.max(initial=1)), self.config.context_length
        if longest + max_new_tokens > context:
            raise ValueError(
                f"the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, but together they "
                f"may be {context} at most (context_length). Shorten the prompt or ask for fewer tokens."
            )
        width = min(-(-longest // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE, context - max_new_tokens)
        padded = np.zeros((len(rows), width), np.int32)
        for place, row in enumerate(rows):
            padded[place, : len(row)] = row
        return padded, lengths

    def _kept_decoder(self, max_new_tokens: int, options: SamplingOptions) -> tuple[Decoder, Any]:
        """The loop for these settings and its compiled call; the last few are kept, as compiling takes seconds."""
        kept: dict[Any, tuple[Decoder, Any]] = self.__dict__.setdefault("_kept_decoders", {})
        key = (max_new_tokens, options)
        if key not in kept:
            decoder = self.decoder(max_new_tokens, options)

            def run(prompts: Tensor, lengths: Tensor, seed: Tensor | None) -> Tensor:
                return decoder(prompts, lengths, seeds=seed).token_ids

            kept[key] = decoder, tf.function(run, autograph=False, reduce_retracing=True)
            if len(kept) > 8:
                kept.pop(next(iter(kept)))
        return kept[key]


def token_weights(weights: Tensor | None, labels: Tensor) -> Tensor:
    """Weights in the shape of `labels` [B, T], float32: 1 for None, and one a row [B] counts for all its tokens."""
    ones = keras.ops.ones_like(labels, dtype="float32")
    if weights is None:
        return ones
    weights = keras.ops.cast(weights, "float32")
    return (weights if len(weights.shape) > 1 else keras.ops.expand_dims(weights, 1)) * ones


def _prompt_rows(token_ids: Prompts, vocab_size: int) -> list[np.ndarray]:
    """The real tokens of each prompt, which must be ids of the vocabulary."""
    mask = None
    if isinstance(token_ids, Mapping):
        mask = token_ids.get("padding_mask")
        token_ids = token_ids["token_ids"]
    if isinstance(token_ids, tf.RaggedTensor):
        token_ids = token_ids.to_list()
    rows = [np.asarray(row) for row in (token_ids if isinstance(token_ids, (list, tuple)) else np.asarray(token_ids))]
    if any(row.ndim != 1 for row in rows):
        raise ValueError("prompts must be rows of token ids [B, T]; for one prompt, give a list that holds it.")
    if mask is not None:
        rows = [row[np.asarray(keep, bool)] for row, keep in zip(rows, np.asarray(mask), strict=True)]
    for row in rows:
        if row.size and not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"token ids must be integers, but a prompt is of type {row.dtype}.")
        if row.size and not 0 <= row.min() <= row.max() < vocab_size:
            raise ValueError(f"token ids must lie in [0, {vocab_size}), but a prompt has {row.min()} to {row.max()}.")
    return rows


__all__ = ["LanguageModel", "StreamedTokens"]
