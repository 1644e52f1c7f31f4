"""What all fine-tuning tasks share: an encoder, a head, an objective, and checkpoints that hold both."""

from __future__ import annotations

import inspect
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import keras
from keras import ops

from lmzoo import checkpoints
from lmzoo.engine.model import ReplicatedModel
from lmzoo.engine.optimizers import make_optimizer
from lmzoo.engine.recompute import check_remat
from lmzoo.engine.strategy import compiles_by_default
from lmzoo.models import LanguageModel, find_architecture
from lmzoo.models.base import stored_tensors
from lmzoo.models.describe import readme

Tensor = Any


class TaskModel(ReplicatedModel):
    """An encoder with a head for a task, trained as a whole.

    A subclass says what its head is (`build`, `call`, `head_layers`) and what it learns (`compute_sums`). The encoder
    has no output head, and a pooler only where the task reads it: a model that has more is copied without it.

    Args:
        encoder: a language model.
        dtype: a Keras dtype or policy of the head; None is the encoder's.

    Raises:
        ValueError: it is of an architecture that has no heads for tasks, such as an encoder with a decoder.
    """

    task: ClassVar[str]
    """What the names of its classes in transformers end with: "ForTokenClassification"."""
    library: ClassVar[str] = "transformers"
    """Whose layout its checkpoints have."""

    def __init__(self, encoder: LanguageModel, *, dtype: Any = None, **kwargs: Any) -> None:
        require_heads(type(encoder))
        super().__init__(dtype=encoder.dtype_policy if dtype is None else dtype, **kwargs)
        self.encoder = encoder.without_head(**_pooler(encoder.config, self.reads_pooler(type(encoder))))
        self.card: checkpoints.ModelCard | None = None
        self._num_frozen: int | None = None

    @classmethod
    def reads_pooler(cls, encoder_class: type[LanguageModel]) -> bool:
        """Whether the head stands on the pooler of such an encoder."""
        return False

    @abstractmethod
    def head_layers(self) -> dict[str, keras.layers.Dense]:
        """Name in a checkpoint -> dense layer of the head."""

    def dense_layer(self, num_outputs: int, **arguments: Any) -> keras.layers.Dense:
        """A layer for the head, whose weights start as BERT's do."""
        initializer = keras.initializers.TruncatedNormal(stddev=0.02)
        return keras.layers.Dense(num_outputs, kernel_initializer=initializer, dtype=self.dtype_policy, **arguments)

    @property
    def config(self) -> Any:
        """The encoder's config."""
        return self.encoder.config

    # -- Training.

    def compile(
        self,
        optimizer: Any = None,
        loss: Any = None,
        *,
        remat: str | None = None,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        """Configures training. Without arguments: the task's own objective, and AdamW.

        Args:
            optimizer: a Keras optimizer or its name. None is AdamW with a learning rate of 5e-5, betas 0.9 and 0.999,
                decay of 0.01 on matrices only, and clipping to a global norm of 1.
            loss: None for the task's own; a Keras loss gets what a call returns.
            remat: "block" keeps only the inputs of each block and computes the rest again going backward.
            jit_compile: compile the step with XLA. "auto" does so on GPUs only.
            kwargs: as in `ReplicatedModel.compile`.
        """
        check_remat(remat)
        self.encoder.remat = remat
        if optimizer is None:
            with self.distribute_strategy.scope():
                optimizer = make_optimizer("adamw", 5e-5, beta_2=0.999, weight_decay=0.01)
        if jit_compile == "auto":
            jit_compile = compiles_by_default()
        super().compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile, **kwargs)

    def get_compile_config(self) -> dict[str, Any]:
        """Arguments of `compile`, as `.keras` files hold them."""
        config = super().get_compile_config()
        return {**config, "remat": self.encoder.remat} if config else config

    def freeze(self, num_layers: int | Literal["all"] | None) -> None:
        """Leaves weights of the encoder as they are in training; they get no gradients and no optimizer state.

        Call it before `compile`. Dropout goes on in frozen layers.

        Args:
            num_layers: freezes the embeddings and that many blocks, from the first one; "all" freezes the encoder,
                None nothing.

        Raises:
            ValueError: the encoder has fewer blocks, or training has begun.
        """
        num_blocks = len(self.encoder.blocks)
        if num_layers == "all":
            num_layers = num_blocks + 1
        elif num_layers is not None and num_layers not in range(num_blocks + 1):
            raise ValueError(f'num_layers is {num_layers!r}, but must be "all", None or in [0, {num_blocks}].')
        if self.compiled and self.optimizer.built:
            raise ValueError("the optimizer holds the state of all weights by now: freeze before training begins.")
        for layer, depth in self._encoder_layers():
            layer.trainable = num_layers is None or depth > num_layers
        self._num_frozen = num_layers

    def layer_depths(self) -> dict[str, int]:
        """Path of each trainable weight -> its depth: 0 for embeddings, 1 to L for the blocks, L + 1 for the rest.

        L is the number of blocks with weights of their own.
        """
        depths = dict.fromkeys((each.path for each in self.trainable_variables), len(self.encoder.blocks) + 1)
        for layer, depth in self._encoder_layers():
            depths |= {variable.path: depth for variable in layer.trainable_variables}
        return depths

    def learning_rate_factors(self, decay: float) -> dict[str, float]:
        """For an optimizer: each layer learns `decay` times as fast as the one above it, the head at the full rate.

        Reference:
            Howard and Ruder 2018, "Universal Language Model Fine-tuning", section 3.2; Clark et al. 2020, "ELECTRA",
            appendix B.
        """
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay is {decay!r}, but must lie in (0, 1].")
        top = len(self.encoder.blocks) + 1
        return {_exactly(path): decay ** (top - depth) for path, depth in self.layer_depths().items()}

    def start_decay(self, factor: float) -> dict[str, float]:
        """For an optimizer: the encoder's weights decay by `factor` towards what they are when training begins."""
        if not factor >= 0.0:
            raise ValueError(f"factor is {factor!r}, but must be 0 or more.")
        return {_exactly(variable.path): factor for variable in self.encoder.trainable_variables}

    def _encoder_layers(self) -> Iterator[tuple[keras.layers.Layer, int]]:
        """The encoder's layers with their depths, in the order of the forward pass."""
        depths = {id(block): number for number, block in enumerate(self.encoder.blocks, 1)}
        depth = 0
        for layer in self.encoder.layers:
            if id(layer) in depths:
                depth = depths[id(layer)]
                yield layer, depth
            else:
                yield layer, len(self.encoder.blocks) + 1 if depth else 0

    # -- Checkpoints.

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, dtype: Any = None, **overrides: Any) -> Self:
        """A model with the weights of a checkpoint in the Hugging Face layout, of this task or of the bare encoder.

        A head that the checkpoint has not, or has for other labels, is new, with one warning that names it.

        Args:
            directory: holds config.json and model.safetensors, or shards with their index.
            dtype: a Keras dtype or policy; weights are cast to its variable dtype.
            overrides: arguments of the constructor, such as labels, which a checkpoint without this head cannot give;
                and fields of the encoder's config. `dropout_rate` is that of the encoder and of the head.

        Raises:
            CheckpointError: as `LanguageModel.from_pretrained`.
            ValueError: labels are needed and not given, or the architecture has no heads for tasks.
        """
        arguments = inspect.signature(cls.__init__).parameters
        own = {name: value for name, value in overrides.items() if name in arguments}
        fields = {name: value for name, value in overrides.items() if name not in own or name == "dropout_rate"}
        with checkpoints.unchanged(directory):
            encoder_class = find_architecture(directory)
            require_heads(encoder_class)
            values = checkpoints.read_config(directory)
            config = encoder_class.read_config(directory).replace(**fields)
            config = config.replace(**_pooler(config, cls.reads_pooler(encoder_class)))
            files = checkpoints.read_tensors(directory)
            stored = cls.stored_arguments(values, encoder_class, directory)
            own = cls.chosen_arguments(stored, own, directory)
            model = cls(encoder_class(config, output_head=False, dtype=dtype), **own)
            model._load(files, cls._is_task_of(values, encoder_class))
        return model

    @classmethod
    def stored_arguments(
        cls, values: Mapping[str, Any], encoder_class: type[LanguageModel], directory: Any
    ) -> dict[str, Any]:
        """Arguments of the constructor that a checkpoint tells, from the content of its config.json."""
        return {}

    @classmethod
    def chosen_arguments(cls, stored: Mapping[str, Any], given: Mapping[str, Any], directory: Any) -> dict[str, Any]:
        """Arguments of the constructor: those given, else those that a checkpoint tells."""
        return {**stored, **given}

    @classmethod
    def class_name(cls, encoder_class: type[LanguageModel]) -> str:
        """Name of the class in transformers that opens a checkpoint of this task."""
        return encoder_class.task_heads.classes + cls.task

    @classmethod
    def _is_task_of(cls, values: Mapping[str, Any], encoder_class: type[LanguageModel]) -> bool:
        """Whether a checkpoint is of this task, going by its config.json; if that names nothing, it may be."""
        names = values.get("architectures") or []
        return not names or cls.class_name(encoder_class) in names

    def _head_entries(self) -> dict[checkpoints.Entry, keras.Variable]:
        """The weights of the head, by how a checkpoint stores each of them."""
        kernels = {
            checkpoints.Entry((f"{name}.weight",), transposed=True): layer.kernel
            for name, layer in self.head_layers().items()
        }
        biases = {
            checkpoints.Entry((f"{name}.bias",)): layer.bias
            for name, layer in self.head_layers().items()
            if layer.use_bias
        }
        return kernels | biases

    def _load(self, files: checkpoints.TensorFiles, is_same_task: bool) -> None:
        head = self._head_entries()
        shapes = {name: shape for entry, each in head.items() for name, shape in entry.shapes(each.shape).items()}
        fits = is_same_task and all(name in files and files.shape(name) == shape for name, shape in shapes.items())
        lacking = None if fits or not shapes else "|".join(rf"{re.escape(name)}\..*" for name in self.head_layers())
        self.encoder.load_tensors(files, head, lacking=lacking)

    def checkpoint_variables(self) -> dict[str, keras.Variable]:
        """Name in a checkpoint -> variable, those of the head too; see `LanguageModel.checkpoint_variables`."""
        head = {entry.names[0]: variable for entry, variable in self._head_entries().items()}
        return {**self.encoder.checkpoint_variables(), **head}

    def load_pretrained_weights(self, directory: str | os.PathLike[str]) -> None:
        """Loads the weights of a checkpoint of this task, with the same labels, into this model."""
        self._load(checkpoints.read_tensors(directory), True)

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes encoder, head and labels in the Hugging Face layout; `from_pretrained` reads them back.

        README.md is the model's card: what `card` says, and what the model knows itself.
        """
        config, tensors = self.encoder.checkpoint_contents()
        config |= {"architectures": [self.class_name(type(self.encoder))], **self.hugging_face_values()}
        tensors |= stored_tensors(self._head_entries())
        text = readme(self, config, loader="lmzoo.tasks.load_task", library=self.library)
        checkpoints.write_checkpoint(directory, config, tensors, max_shard_bytes=max_shard_bytes, readme=text)

    def hugging_face_values(self) -> dict[str, Any]:
        """What config.json holds of the task beside the encoder's shape."""
        return {}

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor, and how much is frozen, as `.keras` files hold them."""
        encoder = keras.saving.serialize_keras_object(self.encoder)
        return {**super().get_config(), "encoder": encoder, "num_frozen": self._num_frozen}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """The inverse of `get_config`."""
        config = dict(config)
        num_frozen = config.pop("num_frozen")
        model = cls(**{**config, "encoder": keras.saving.deserialize_keras_object(config["encoder"])})
        if num_frozen is not None:
            model.freeze("all" if num_frozen > len(model.encoder.blocks) else num_frozen)
        return model


def require_heads(model_class: type[LanguageModel]) -> None:
    """Refuses architectures that have no heads for tasks."""
    if not hasattr(model_class, "task_heads"):
        raise ValueError(
            f"{model_class.__name__} has no heads for these tasks: take an encoder, or a causal LM for classification."
        )


def padding_mask(inputs: Any) -> Tensor | None:
    """Which tokens are no padding, [B, T] bool, as the inputs say it; None if they do not."""
    if not isinstance(inputs, Mapping):
        return None
    mask, segment_ids = inputs.get("padding_mask"), inputs.get("segment_ids")
    if mask is not None:
        return ops.cast(mask, "bool")
    return None if segment_ids is None else segment_ids > 0


def _pooler(config: Any, is_read: bool) -> dict[str, bool]:
    """The change to a config by which the encoder has a pooler if it is read; nothing for one that cannot have any."""
    return {} if getattr(config, "pooler", is_read) == is_read else {"pooler": is_read}


def _exactly(path: str) -> str:
    return f"^{re.escape(path)}$"
