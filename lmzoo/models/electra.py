"""ELECTRA: an encoder that learns which tokens of a text a small masked LM has replaced.

Reference:
    Clark et al. 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", section 3, and
    the released code.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import keras
from keras import ops

from lmzoo import checkpoints
from lmzoo.config import ActivationBytes
from lmzoo.engine.metrics import GlobalMean, Perplexity
from lmzoo.layers.feedforward import activation_function
from lmzoo.models.base import token_weights, weight_and_bias
from lmzoo.models.encoder import EncoderConfig, EncoderModel, initializers
from lmzoo.models.heads import TaskHeads
from lmzoo.models.masked import MaskedLM

Tensor = Any

# Factor of replaced-token detection in the loss: its cross-entropy of two classes is small beside that of masked LM.
_DETECTION_WEIGHT = 50.0
# Where a checkpoint of both holds that of the generator.
_GENERATOR = "generator"

_HEADS_OF_TASKS = r"(classifier|qa_outputs|sequence_summary)\..*|embeddings\.position_ids"
_BASE = {"num_heads": 12, "model_dim": 768, "embedding_dim": 768}
_LARGE = {"num_layers": 24, "num_heads": 16, "model_dim": 1024, "embedding_dim": 1024}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElectraGeneratorConfig(EncoderConfig):
    """Shape of an ELECTRA's generator: that of `EncoderConfig`, and this.

    Args:
        embedding_dim: E, width of the embeddings; a projection widens them where it is not D.
    """

    model_type: ClassVar[str] = "electra"

    num_heads: int = 4
    model_dim: int = 256
    pooler: bool = False
    embedding_dim: int = 128

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "electra-small-generator": {},
        "electra-base-generator": {"embedding_dim": 768},
        "electra-large-generator": {"num_layers": 24, "embedding_dim": 1024},
    }
    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        **{field: name for field, name in EncoderConfig.HUGGING_FACE_NAMES.items() if field != "pooler"},
        "embedding_dim": "embedding_size",
    }
    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]] = ("ElectraForMaskedLM",)

    def _check_kind(self) -> None:
        self._require_positive("num_token_types", "embedding_dim")
        if self.pooler is not False:
            self._refuse("pooler", "must be False: ELECTRA learns no sentence labels")

    @property
    def head_activation(self) -> str:
        """Activation inside the masked-LM head, whatever that of the blocks is."""
        return "gelu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElectraConfig(ElectraGeneratorConfig):
    """Shape of an ELECTRA, that is of its discriminator, and of the generator it learns with.

    Args:
        generator_size: width of the generator as a share of `model_dim`, in (0, 1], rounded to whole heads of the
            discriminator's width, one at least; it is as deep as the discriminator. None if there is no generator.
    """

    generator_size: float | None = None

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "electra-small": {"generator_size": 1.0},
        "electra-base": {**_BASE, "generator_size": 1 / 3},
        "electra-large": {**_LARGE, "generator_size": 0.25},
        "electra-small-discriminator": {},
        "electra-base-discriminator": _BASE,
        "electra-large-discriminator": _LARGE,
    }
    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        **ElectraGeneratorConfig.HUGGING_FACE_NAMES,
        "generator_size": "generator_hidden_size",
    }
    HUGGING_FACE_CLASSES: ClassVar[tuple[str, ...]] = ("ElectraForPreTraining",)

    def _check_kind(self) -> None:
        super()._check_kind()
        size = self.generator_size
        if size is not None and not (isinstance(size, int | float) and 0.0 < size <= 1.0):
            self._refuse("generator_size", "must be None or lie in (0, 1]")

    @property
    def generator(self) -> ElectraGeneratorConfig | None:
        """Shape of the generator."""
        if self.generator_size is None:
            return None
        num_heads = max(1, round(self.generator_size * self.num_heads))
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(ElectraGeneratorConfig)}
        return ElectraGeneratorConfig(
            **{
                **fields,
                "num_heads": num_heads,
                "model_dim": self.model_dim // self.num_heads * num_heads,
                "feedforward_dim": max(1, self.inner_dim * num_heads // self.num_heads),
            }
        )

    @property
    def head_params(self) -> int:
        """Parameters of the head that detects replaced tokens, and of all of the generator but the embeddings."""
        width, generator = self.model_dim, self.generator
        detection = width * width + width + width + 1
        if generator is None:
            return detection
        rows = self.vocab_size + self.context_length + self.num_token_types + 2
        return detection + generator.count_params() + generator.head_params - rows * self.embedding_dim

    def training_flops_per_token(self, seq_length: int) -> float:
        """As `EncoderConfig` says, with a head that sees every token; the generator's come on top."""
        width = self.model_dim
        projection = self.embedding_dim * width if self.projects else 0
        multiplied = self.num_layers * self.count_block_params() + projection + width * (width + 1)
        own = 6.0 * multiplied + 12.0 * self.num_layers * width * seq_length
        return own + (self.generator.training_flops_per_token(seq_length) if self.generator else 0.0)

    def activation_bytes(self, rows: int, seq_length: int, compute_bytes: int) -> ActivationBytes:
        """Those of both stacks, one as deep as the other; what the generator keeps waits while the other goes back."""
        own = super().activation_bytes(rows, seq_length, compute_bytes)
        if self.generator is None:
            return own
        other = self.generator.activation_bytes(rows, seq_length, compute_bytes)
        both = {name: getattr(own, name) + getattr(other, name) for name in ("block", "block_input", "shared", "ends")}
        return dataclasses.replace(own, **both, block_backward=own.block_backward + other.block)


@keras.saving.register_keras_serializable("lmzoo")
class ElectraGenerator(MaskedLM):
    """The masked LM of an ELECTRA, from token ids to the scores of hidden tokens; see `MaskedLM`.

    Args:
        config: shape of the model.
        embeddings_of: the discriminator whose embeddings it shares, None for embeddings of its own.
        dtype: a Keras dtype or policy.
    """

    config_class: ClassVar[type[ElectraGeneratorConfig]] = ElectraGeneratorConfig
    config: ElectraGeneratorConfig
    tokenizer_kind = "wordpiece"
    task_heads = TaskHeads(
        classes="Electra", pools="first", dense="classifier.dense", activation="gelu", output="classifier.out_proj"
    )
    checkpoint_prefix = "electra."
    checkpoint_heads = ("generator_",)
    checkpoint_optional = r"generator_.*"
    checkpoint_ignored = rf"discriminator_predictions\..*|{_HEADS_OF_TASKS}"
    checkpoint_tied: ClassVar[Mapping[str, str]] = {"generator_lm_head.weight": "embeddings.word_embeddings.weight"}
    checkpoint_head_parts = ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")

    def sums_and_samples(
        self, inputs: Any, labels: Tensor, weights: Tensor, training: bool, seed: Any
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """The sums of masked LM, and a token drawn for each label [B, M] from what the model takes to be likely.

        Drawing adds Gumbel noise to the scores and takes the largest; no gradient goes through it.

        Args:
            inputs, labels, weights, training: as in `compute_sums`.
            seed: a Keras seed generator or an integer.
        """
        hidden = self._transformed(self._scored(self.features(inputs, training=training), inputs))  # [B, M, E]
        sums = self._token_sums(hidden, labels, weights, training)
        table, bias = self.head()
        scores = ops.cast(ops.matmul(ops.stop_gradient(hidden), ops.transpose(table)), "float32") + bias  # [B, M, V]
        uniform = keras.random.uniform(ops.shape(scores), minval=1e-20, dtype="float32", seed=seed)
        return sums, ops.argmax(scores - ops.log(-ops.log(uniform)), axis=-1)


@keras.saving.register_keras_serializable("lmzoo")
class ElectraModel(EncoderModel):
    """ELECTRA's discriminator, from token ids to the scores of "this token has been replaced".

    Where its config has a `generator_size`, it holds a generator and learns with it, from batches of masked LM: the
    generator draws a token for each hidden one, and the discriminator tells, of every token that is no padding,
    whether it is the original; a token drawn that happens to be the original one is an original. The loss is that of
    masked LM plus 50 times that of replaced-token detection. A row counts in the second with its mean over its tokens,
    by the weights of its hidden tokens, so that the sum of both is one mean over the global batch, however rows are
    shared out; the released code takes the mean over the tokens of the whole batch. Both halves share their
    embeddings, the norm after them included, as that code has it.

    In training, each step draws anew. Evaluation draws from the same random numbers each time.

    Example:
        model = ElectraModel.from_preset("electra-small")
        model.compile()
        model.fit(dataset)
        replaced = model({"token_ids": ids, "padding_mask": ids != 0}) > 0.0

    Shapes:
        inputs: as `EncoderModel` takes them; returns logits [B, T] float32, above 0 where a token seems replaced.

    Args:
        config: shape of the model.
        dtype: a Keras dtype or policy.
    """

    config_class: ClassVar[type[ElectraConfig]] = ElectraConfig
    config: ElectraConfig
    generator: ElectraGenerator | None
    detection_dense: Any  # A layer or None, as the next one.
    detection: Any
    task_heads = ElectraGenerator.task_heads
    tokenizer_kind = "wordpiece"
    checkpoint_prefix = "electra."
    checkpoint_heads = ("discriminator_predictions.",)
    checkpoint_optional = r"discriminator_predictions\..*"
    checkpoint_ignored = rf"generator_.*|{_HEADS_OF_TASKS}"

    def __init__(self, config: ElectraConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.generator = self.detection_dense = self.detection = None
        if self.output_head:
            dense = functools.partial(initializers, self.dtype_policy, "kernel_initializer")
            activation = activation_function(config.activation)
            self.detection_dense = keras.layers.Dense(
                config.model_dim, activation=activation, **dense(), name="detection_dense"
            )
            self.detection = keras.layers.Dense(1, **dense(), name="detection")
            if config.generator is not None:
                self.generator = ElectraGenerator(
                    config.generator, embeddings_of=self, dtype=self.dtype_policy, name="generator"
                )
                self.sampling_seed = keras.random.SeedGenerator()
        self.build((None, None))

    def build(self, input_shape: Any) -> None:
        """Creates all weights; token ids of any shape will do."""
        super().build(input_shape)
        for layer in (self.detection_dense, self.detection):
            if layer is not None:
                layer.build((None, None, self.config.model_dim))

    # -- The forward pass.

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of "this token has been replaced": [..., D] -> [...] float32."""
        if self.detection is None:
            raise ValueError(f"this {type(self).__name__} was made with output_head=False: it has features() alone.")
        return ops.cast(ops.squeeze(self.detection(self.detection_dense(hidden)), -1), "float32")

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Refused: a discriminator does not score the tokens of the vocabulary.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "an ElectraModel tells replaced tokens from original ones and guesses none: take its generator, an "
            "ElectraGenerator, which is a masked LM."
        )

    # -- Training.

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `LanguageModel.compile`; label smoothing, z-loss and rematerialisation are for the generator too."""
        super().compile(*args, **kwargs)
        if self.generator is not None:
            self.generator.remat = self.remat
            self.generator._label_smoothing, self.generator._z_loss = self._label_smoothing, self._z_loss

    def sum_metrics(self) -> dict[str, GlobalMean | Sequence[GlobalMean]]:
        """Loss; loss, perplexity and accuracy of the generator's masked LM; loss and accuracy of the detection."""
        return {
            "loss": GlobalMean(name="loss"),
            "masked_lm_loss": [GlobalMean(name="masked_lm_loss"), Perplexity()],
            "accuracy": GlobalMean(name="accuracy"),
            "replaced_token_loss": GlobalMean(name="replaced_token_loss"),
            "replaced_token_accuracy": GlobalMean(name="replaced_token_accuracy"),
        }

    def compute_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of both objectives, for a batch of masked LM."""
        if self.generator is None:
            raise ValueError(
                "this ElectraModel has no generator (generator_size=None), so nothing replaces the tokens that it "
                "could detect: pretrain a preset such as electra-small, or fine-tune this one."
            )
        if labels is None:
            raise ValueError("masked LM needs labels: give (inputs, labels, weights), as a masked-LM objective makes.")
        batch = inputs if isinstance(inputs, Mapping) else {"token_ids": inputs}
        weights = token_weights(weights, labels)
        seed = self.sampling_seed if training else 0
        sums, samples = self.generator.sums_and_samples(batch, labels, weights, training, seed)
        token_ids, is_replaced = replaced_tokens(batch, labels, weights, samples)
        read = {**batch, "token_ids": token_ids}
        detection_loss, correct = self.detection_sums(read, is_replaced, ops.sum(weights, axis=1), training)
        masked_lm_loss, weight = sums["loss"]
        return {
            **sums,
            "loss": (masked_lm_loss + _DETECTION_WEIGHT * detection_loss, weight),
            "masked_lm_loss": (masked_lm_loss, weight),
            "replaced_token_loss": (detection_loss, weight),
            "replaced_token_accuracy": (correct, weight),
        }

    def detection_sums(
        self, inputs: Any, is_replaced: Tensor, row_weights: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """Sums over rows of weight times mean loss, and of weight times share of tokens told right.

        Shapes:
            inputs: as `features` takes them; is_replaced [B, T] float32, 1 where a token has been replaced; row_weights
            [B] float32.
        """
        logits = self.logits(self.features(inputs, training=training))
        losses = ops.softplus(logits) - is_replaced * logits  # Sigmoid cross-entropy.
        correct = ops.cast(ops.equal(logits > 0.0, is_replaced > 0.0), "float32")
        counts = _counted_tokens(inputs)
        shares = counts * ops.expand_dims(row_weights / ops.maximum(ops.sum(counts, axis=1), 1.0), 1)  # [B, T]
        return ops.sum(shares * losses), ops.sum(shares * correct)

    # -- Checkpoints.

    def checkpoint_variables(self) -> dict[str, keras.Variable]:
        """Those of the discriminator; the generator has a checkpoint of its own beside it."""
        names = super().checkpoint_variables()
        if self.detection is not None:
            names |= weight_and_bias("discriminator_predictions.dense", self.detection_dense)
            names |= weight_and_bias("discriminator_predictions.dense_prediction", self.detection)
        return names

    def inner_checkpoints(self) -> dict[str, checkpoints.Contents]:
        """The generator's checkpoint, by the directory that it has inside the discriminator's."""
        return {} if self.generator is None else {_GENERATOR: self.generator.checkpoint_contents()}

    @classmethod
    def read_config(cls, directory: str | os.PathLike[str]) -> Any:
        """The config of a checkpoint, with a generator if there is one beside it."""
        config = super().read_config(directory)
        return config if (Path(directory) / _GENERATOR).is_dir() else config.replace(generator_size=None)

    def load_pretrained_weights(self, directory: str | os.PathLike[str]) -> None:
        """As that of `LanguageModel`; the generator's come from the directory inside, with a warning if it lacks."""
        inner = Path(directory) / _GENERATOR
        if self.generator is not None and inner.is_dir():
            self.generator.load_pretrained_weights(inner)
        elif self.generator is not None:
            warnings.warn(f"{inner} is missing: the generator's weights stay as they are.", stacklevel=2)
        super().load_pretrained_weights(directory)


def replaced_tokens(
    batch: Mapping[str, Tensor], labels: Tensor, weights: Tensor, samples: Tensor
) -> tuple[Tensor, Tensor]:
    """What the discriminator reads, and what it has to tell.

    Shapes:
        batch: `token_ids` [B, T] and, unless labels are [B, T] too, `mask_positions` [B, M]; labels, weights and
        samples [B, M]. Returns token ids [B, T] with the samples in the places of labels whose weight is not 0, and
        float32 [B, T], 1 where one of these is not the label.
    """
    token_ids = batch["token_ids"]
    slots = ops.arange(ops.shape(token_ids)[1], dtype="int32")
    places = batch.get("mask_positions")
    places = ops.expand_dims(slots, 0) if places is None else ops.cast(places, "int32")  # [B or 1, M]
    # By comparison, since batches fill their lists of places up with places that have no weight.
    here = ops.logical_and(
        ops.equal(ops.expand_dims(places, 2), slots), ops.expand_dims(ops.not_equal(weights, 0.0), 2)
    )  # [B, M, T]

    def in_place(values: Tensor) -> Tensor:
        return ops.sum(ops.where(here, ops.expand_dims(values, 2), ops.zeros((), values.dtype)), axis=1)  # [B, T]

    samples = ops.cast(samples, token_ids.dtype)
    is_replaced = ops.cast(ops.not_equal(samples, ops.cast(labels, samples.dtype)), "float32")
    return ops.where(ops.any(here, axis=1), in_place(samples), token_ids), in_place(is_replaced)


def _counted_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """1 for tokens [B, T], 0 for padding, float32."""
    if batch.get("padding_mask") is not None:
        return ops.cast(batch["padding_mask"], "float32")
    if batch.get("segment_ids") is not None:
        return ops.cast(ops.greater(batch["segment_ids"], 0), "float32")
    return ops.ones_like(batch["token_ids"], dtype="float32")
