"""What every language model can do: its contract with training and checkpoints."""

from __future__ import annotations

import functools
import os
import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import keras
import numpy as np

from lmzoo import checkpoints
from lmzoo.config import ModelConfig
from lmzoo.engine.metrics import GlobalMean, Perplexity
from lmzoo.engine.model import ReplicatedModel
from lmzoo.engine.optimizers import make_optimizer
from lmzoo.engine.recompute import check_remat, recomputed
from lmzoo.engine.strategy import compiles_by_default
from lmzoo.layers import token_cross_entropy
from lmzoo.models.describe import readme
from lmzoo.models.heads import TaskHeads

Tensor = Any


class LanguageModel(ReplicatedModel):
    """A model from token ids to logits, with its objective and its checkpoint layout.

    A subclass says what it is in four methods: `features`, `head`, `checkpoint_variables` and, on its config,
    `from_hugging_face` / `to_hugging_face`. All weights exist when the constructor returns. How a checkpoint differs
    from the names and shapes of `checkpoint_variables` is said by class variables:

        checkpoint_prefix: stands before the names of a backbone, such as "transformer.".
        checkpoint_heads: beginnings of the names that never carry the prefix.
        checkpoint_transposed: whether kernels are stored as torch's linear layers are, [output, input].
        checkpoint_optional: regular expression of the names that a checkpoint may lack, as that of another task does.
        checkpoint_ignored: regular expression of the names that a checkpoint may hold beside the model's.
        checkpoint_tied: name that a checkpoint may hold beside the model's, or in place of it -> the one it must equal.

        task_heads: what stands on the model in a fine-tuning task, and is called there.
        tokenizer_kind: of the tokenizer that is trained for a new model, whatever its shape.

    Args:
        config: shape of the model.
        output_head: whether to make the weights of the heads that pretraining alone needs. Without them the model is an
            encoder: it has features, and no logits.
        dtype: a Keras dtype or policy: "float32", "mixed_bfloat16", "mixed_float16", or "bfloat16" for inference.
    """

    config_class: ClassVar[type[ModelConfig]]
    blocks: list[keras.layers.Layer]
    checkpoint_prefix: ClassVar[str] = ""
    checkpoint_heads: ClassVar[tuple[str, ...]] = ()
    checkpoint_transposed: ClassVar[bool] = False
    checkpoint_optional: ClassVar[str | None] = None
    checkpoint_ignored: ClassVar[str | None] = None
    checkpoint_tied: ClassVar[Mapping[str, str]] = {}
    task_heads: ClassVar[TaskHeads]
    tokenizer_kind: ClassVar[str] = "bpe"

    def __init__(self, config: ModelConfig, *, output_head: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.output_head = output_head
        self.card: checkpoints.ModelCard | None = None
        self.remat: str | None = None
        self._label_smoothing = self._z_loss = 0.0

    # -- What an architecture implements.

    @abstractmethod
    def features(self, inputs: Any, training: bool | None = None) -> Tensor:
        """Final hidden states, before the output head.

        Shapes:
            inputs: token ids [B, T] or a dict of the batch contract; returns [B, T, D] in the compute dtype.
        """

    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output head: table [V, D] in the compute dtype, and a bias [V] or None."""

    @abstractmethod
    def checkpoint_variables(self) -> dict[str, keras.Variable]:
        """Name in a checkpoint of the Hugging Face layout (without prefix) -> variable.

        A variable that a checkpoint holds in several pieces, side by side along the first axis as they are stored,
        has one name for all of them: "attention.{query,key,value}.bias".
        """

    @classmethod
    def pretraining_objectives(cls, config: Any) -> tuple[str, ...]:
        """What a model of this shape can learn from text, its own objective first: "causal", "mlm" and so on."""
        raise NotImplementedError(f"{cls.__name__} does not say what it learns from text.")

    @classmethod
    def usual_tokenizer(cls, config: Any) -> str:
        """The kind of tokenizer that is trained for a new model of this shape."""
        return cls.tokenizer_kind

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
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, output_head: bool = True, dtype: Any = None, **overrides: Any
    ) -> Self:
        """A model with the weights of a checkpoint in the Hugging Face layout.

        Args:
            directory: holds config.json and model.safetensors, or shards with their index.
            output_head: as in the constructor.
            dtype: as in the constructor; weights are cast to its variable dtype.
            overrides: config fields to replace that change no shape, such as a dropout rate.

        Raises:
            CheckpointError: a file is missing or damaged, the checkpoint is of another architecture, or its tensors
                are not those of the model; all that do not fit are named.
        """
        with checkpoints.unchanged(directory):
            config = cls.read_config(directory).replace(**overrides)
            model = cls(config, output_head=output_head, dtype=dtype)
            model.load_pretrained_weights(directory)
        return model

    def load_pretrained_weights(self, directory: str | os.PathLike[str]) -> None:
        """Loads the weights of a checkpoint in the Hugging Face layout into this model.

        Weights of heads that it lacks stay as they are, with one warning that names them.

        Raises:
            CheckpointError: as `from_pretrained`; no weight has been changed then.
        """
        self.load_tensors(checkpoints.read_tensors(directory))

    def load_tensors(
        self,
        files: checkpoints.TensorFiles,
        more: Mapping[checkpoints.Entry, keras.Variable] | None = None,
        lacking: str | None = None,
    ) -> None:
        """Loads the weights of an opened checkpoint into this model, and into what stands on it.

        Args:
            files: the checkpoint.
            more: variables of a head of its own, by how the checkpoint stores them.
            lacking: regular expression of names in `more` that the checkpoint is known to lack; what it holds under
                such names is another head's, and is left alone.
        """
        variables = {**self.checkpoint_entries(), **(more or {})}
        shapes = {
            name: shape
            for entry, variable in variables.items()
            for name, shape in entry.shapes(variable.shape).items()
            if not (lacking and re.fullmatch(lacking, name))
        }
        heads = () if self.output_head else (f"{re.escape(head)}.*" for head in self.checkpoint_heads)
        ignored = "|".join(pattern for pattern in (self.checkpoint_ignored, lacking, *heads) if pattern)
        readers = checkpoints.match_tensors(
            files,
            shapes,
            prefix=self.checkpoint_prefix,
            ignored=ignored or None,
            tied=self.checkpoint_tied,
            optional=self.checkpoint_optional,
        )
        absent = [name for entry in variables for name in entry.names if name not in readers]
        if absent:
            warnings.warn(
                f"{files.directory} has no {', '.join(absent)}: these weights stay as they are, which is random in a "
                "new model.",
                stacklevel=4,
            )
        for entry, variable in variables.items():
            if all(name in readers for name in entry.names):
                variable.assign(entry.join([readers[name]() for name in entry.names]).astype(variable.dtype))

    def checkpoint_entries(self) -> dict[checkpoints.Entry, keras.Variable]:
        """`checkpoint_variables`, by how a checkpoint stores each of them."""
        return {
            checkpoints.Entry.of(name, transposed=self.checkpoint_transposed and variable.name == "kernel"): variable
            for name, variable in self.checkpoint_variables().items()
        }

    @classmethod
    def read_config(cls, directory: str | os.PathLike[str]) -> Any:
        """The config of a checkpoint; see `from_pretrained`."""
        return cls._config_from(checkpoints.read_config(directory), directory)

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

        An older checkpoint in the same directory stays readable until this one is complete. README.md is the model's
        card: what `card` says, and what the model knows itself.
        """
        contents = self.checkpoint_contents()
        inner, text = self.inner_checkpoints(), readme(self, contents[0])
        checkpoints.write_checkpoint(directory, *contents, max_shard_bytes=max_shard_bytes, inner=inner, readme=text)

    def inner_checkpoints(self) -> dict[str, checkpoints.Contents]:
        """Checkpoints of further models that are saved with this one: directory inside its own -> contents."""
        return {}

    def checkpoint_contents(self) -> tuple[dict[str, Any], dict[str, Callable[[], np.ndarray]]]:
        """Content of config.json, and name -> function that gives the tensor, as `save_pretrained` writes them."""
        config = {**self.config.to_hugging_face(), "dtype": self.variable_dtype}
        if not self.output_head:
            config["architectures"] = [f"{self.task_heads.classes}Model"]
        bare = self.checkpoint_heads if self.output_head else ()
        return config, {
            ("" if name.startswith(bare) else self.checkpoint_prefix) + name: read
            for name, read in stored_tensors(self.checkpoint_entries()).items()
        }

    def without_head(self, **changes: Any) -> Self:
        """This model as an encoder alone: itself if it is one, else a copy of its weights without the output head.

        Args:
            changes: config fields to replace, such as whether there is a pooler; weights that the copy has and this
                model has not are random, with a warning.
        """
        config = self.config.replace(**changes)
        if not self.output_head and config == self.config:
            return self
        twin = type(self)(config, output_head=False, dtype=self.dtype_policy, name=self.name)
        own, variables = self.checkpoint_variables(), twin.checkpoint_variables()
        for name in variables.keys() & own.keys():
            variables[name].assign(own[name])
        absent = [name for name in variables if name not in own]
        if absent:
            warnings.warn(f"{type(self).__name__} has no {', '.join(absent)}: these weights are random.", stacklevel=4)
        return twin

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, as `.keras` files hold them."""
        return {**super().get_config(), "config": self.config.to_dict(), "output_head": self.output_head}

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
        check_remat(remat)
        self._label_smoothing, self._z_loss, self.remat = label_smoothing, z_loss, remat
        if optimizer is None:
            with self.distribute_strategy.scope():
                optimizer = make_optimizer("adamw", 3e-4, beta_2=0.95)
        if jit_compile == "auto":
            jit_compile = compiles_by_default()
        super().compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile, **kwargs)

    def get_compile_config(self) -> dict[str, Any]:
        """Arguments of `compile`, as `.keras` files hold them."""
        config = super().get_compile_config()
        own = {"label_smoothing": self._label_smoothing, "z_loss": self._z_loss, "remat": self.remat}
        return {**config, **own} if config else config

    def sum_metrics(self) -> dict[str, GlobalMean | Sequence[GlobalMean]]:
        """Loss, perplexity and token accuracy."""
        return {"loss": [GlobalMean(name="loss"), Perplexity()], "accuracy": GlobalMean(name="accuracy")}

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of token cross-entropy over the labels that count; see `ReplicatedModel.compute_sums`."""
        return self._token_sums(self.features(inputs, training=training), labels, weights, training)

    def _token_sums(
        self, hidden: Tensor, labels: Tensor, weights: Any, training: bool
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of the cross-entropy between the head's scores of `hidden` and the labels; never all logits at once."""
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

    def _check_places(self, num_tokens: Any, segment_ids: Tensor | None, mask: Tensor | None) -> None:
        """Refuses a batch without `positions` where a token's place in its row is not its position."""
        context_length = self.config.context_length
        if segment_ids is not None:
            raise ValueError("inputs have segment_ids but no positions: give each token's place in its own document.")
        # Padding takes no position, so padded rows may be wider than the context: streamed prompts are.
        if mask is None and isinstance(num_tokens, int) and num_tokens > context_length:
            raise ValueError(
                f"rows have {num_tokens} tokens, but this model reads {context_length} at most (context_length)."
            )

    def run_block(self, block: keras.layers.Layer, /, *tensors: Any, training: bool | None = None, **more: Any) -> Any:
        """`block(*tensors, training=training, **more)`, for `features`: with what `compile(remat=...)` says.

        All that has a gradient is in `tensors`, which may hold None.
        """
        run = functools.partial(recomputed, block) if training and self.remat else block
        return run(*tensors, training=training, **more)


def token_weights(weights: Tensor | None, labels: Tensor) -> Tensor:
    """Weights in the shape of `labels` [B, T], float32: 1 for None, and one a row [B] counts for all its tokens."""
    ones = keras.ops.ones_like(labels, dtype="float32")
    if weights is None:
        return ones
    weights = keras.ops.cast(weights, "float32")
    return (weights if len(weights.shape) > 1 else keras.ops.expand_dims(weights, 1)) * ones


def weight_and_bias(name: str, layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """The two variables of a layer by their names in a checkpoint: those of a normalisation, or kernel and bias."""
    if isinstance(layer, keras.layers.LayerNormalization):
        return {f"{name}.weight": layer.gamma, f"{name}.bias": layer.beta}
    return {f"{name}.weight": layer.kernel, f"{name}.bias": layer.bias}


def stored_tensors(entries: Mapping[checkpoints.Entry, keras.Variable]) -> dict[str, Callable[[], np.ndarray]]:
    """Name in a checkpoint (without prefix) -> function that gives the tensor as it is stored."""

    def read(entry: checkpoints.Entry, name: str, variable: keras.Variable) -> np.ndarray:
        return entry.piece(name, keras.ops.convert_to_numpy(variable))

    return {
        name: functools.partial(read, entry, name, variable)
        for entry, variable in entries.items()
        for name in entry.names
    }
