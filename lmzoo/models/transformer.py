"""What the configs of transformers share: the shape of a stack of blocks, its memory, and the way to config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from lmzoo.config import ActivationBytes, ModelConfig

# Names of activations in config.json -> in `FeedForward`; the first name of each is the one that is written.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
# Tensors [B, T, F] that the backward pass of an activation reads, its own outputs among them.
_ACTIVATIONS_KEPT = {"gelu_tanh": 5, "gelu": 4, "silu": 2, "relu": 1, "tanh": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """Shape of a stack of blocks of attention and a feed-forward network, each with a norm and a residual connection.

    Args:
        num_layers: number of blocks.
        num_heads: N, which must divide `model_dim`.
        model_dim: D.
        feedforward_dim: F; None is 4 * D.
        dropout_rate: of embeddings, attention weights and both outputs of a block.
        norm_epsilon: added to the variance in layer normalisation.
        activation: "gelu" (exact), "gelu_tanh", "relu", "silu" or "tanh".
    """

    HUGGING_FACE_NAMES: ClassVar[Mapping[str, str]] = {
        "vocab_size": "vocab_size",
        "pad_token_id": "pad_token_id",
        "eos_token_id": "eos_token_id",
    }
    """Field -> its name in config.json; a subclass adds the names of its other fields."""
    HUGGING_FACE_DROPOUT_RATES: ClassVar[tuple[str, ...]] = ()
    """The names there of the other dropout rates, which are the same here."""
    HUGGING_FACE_FIXED: ClassVar[Mapping[str, Any]] = {}
    """What config.json may ask for that the released models do not have -> what they have."""

    num_layers: int = 12
    num_heads: int = 12
    model_dim: int = 768
    feedforward_dim: int | None = None
    dropout_rate: float = 0.1
    norm_epsilon: float = 1e-5
    activation: str = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("num_layers", "num_heads", "model_dim")
        if self.feedforward_dim is not None:
            self._require_positive("feedforward_dim")
        self._require_rate("dropout_rate")
        self._require_above_zero("norm_epsilon")
        if self.model_dim % self.num_heads:
            self._refuse("num_heads", f"must divide model_dim, which is {self.model_dim}")
        if self.activation not in _ACTIVATIONS.values():
            self._refuse("activation", f"must be one of {', '.join(sorted(set(_ACTIVATIONS.values())))}")

    def _refuse(self, field: str, rule: str) -> None:
        raise ValueError(f"{type(self).__name__}.{field} is {getattr(self, field)!r}, but {rule}.")

    @property
    def inner_dim(self) -> int:
        """F, the width inside the feed-forward network."""
        return self.feedforward_dim or 4 * self.model_dim

    @property
    def position_offset(self) -> int:
        """Row of the table of positions that a document's first token has."""
        return 0

    def count_block_params(self) -> int:
        """Number of parameters of one block: two norms, four projections of width D, two of width F, and biases."""
        width, inner = self.model_dim, self.inner_dim
        return 2 * 2 * width + 4 * (width * width + width) + 2 * width * inner + inner + width

    def count_head_tokens(self, rows: int, seq_length: int) -> int:
        """Number of tokens that a step of the architecture's own objective sends through the output head."""
        return rows * seq_length

    def activation_bytes(self, rows: int, seq_length: int, compute_bytes: int) -> ActivationBytes:
        """The tensors that the backward pass of a block reads, one by one; layer norms and softmax are float32."""
        size = compute_bytes
        hidden = rows * seq_length * self.model_dim
        inner = rows * seq_length * self.inner_dim
        scores = rows * self.num_heads * seq_length * seq_length
        is_mixed, drops = size < 4, self.dropout_rate > 0.0
        norm = (4 + 4 + size) * hidden  # Its inputs, their factors (gamma / deviation, for each number), its outputs.
        heads = (3 + 1 + 1) * size * hidden  # Queries, keys and values; scaled queries; outputs of the heads.
        feedforward = _ACTIVATIONS_KEPT[self.activation] * size * inner
        mask = scores if drops else 0
        attention = (4 + (size if is_mixed or drops else 0)) * scores + mask  # Softmax; as cast, or after dropout.
        block = 2 * norm + heads + feedforward + attention + (2 * hidden if drops else 0)
        # Going backward, the feed-forward network comes first. At best its activations are gone when the attention's
        # gradients come: of the probabilities, their product with those, and of the scores. At worst they are still
        # there, since an executor may leave the gradients of kernels, which nothing waits for, until the end.
        by_feedforward = (2 * 4 + (size if is_mixed else 0)) * inner + 2 * 4 * hidden
        by_attention = (16 + size if is_mixed else 12) * scores + mask - attention + 3 * 4 * hidden
        best = block + max(by_feedforward, by_attention - feedforward - norm)
        worst = block + by_feedforward + by_attention
        return ActivationBytes(
            num_blocks=self.num_layers,
            block=block,
            block_backward=(best + worst) // 2,
            block_input=size * hidden,
            shared=rows * seq_length * seq_length * size,  # The attention bias, [B, 1, T, T].
            ends=norm + 4 * hidden + (hidden if drops else 0),
            head_tokens=self.count_head_tokens(rows, seq_length),
            head_dim=self.model_dim,
        )

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> Self:
        """The config of a checkpoint's config.json. Its dropout rate of hidden states is taken for all three.

        Raises:
            ValueError: it asks for something that the released models do not have, all of which is named; or a field
                breaks its rule.
        """
        model = cls.__name__.replace("Config", "Model")
        problems = [
            f"{name} is {values[name]!r}, but {model} has only {usual!r}"
            for name, usual in cls.HUGGING_FACE_FIXED.items()
            if values.get(name, usual) != usual
        ]
        fields = {field: values[name] for field, name in cls.HUGGING_FACE_NAMES.items() if name in values}
        activation = fields.get("activation")
        if "activation" in fields and activation not in list(_ACTIVATIONS):
            name = cls.HUGGING_FACE_NAMES["activation"]
            problems.append(f"{name} is {activation!r}, but {model} has only {', '.join(_ACTIVATIONS)}")
        if problems:
            raise ValueError(f"{'; '.join(problems)}.")
        if activation is not None:
            fields["activation"] = _ACTIVATIONS[activation]
        special = {name: fields.pop(name) for name in ("eos_token_id", "pad_token_id") if name in fields}
        config = cls(**fields)
        for name, value in special.items():  # Checkpoints of small vocabularies often keep the ids of the large one.
            if isinstance(value, int) and not 0 <= value < config.vocab_size:
                special[name] = None
        config = config.replace(**special)
        return config.replace(context_length=config.context_length - config.position_offset)

    def to_hugging_face(self) -> dict[str, Any]:
        """Content of config.json, as `transformers` reads it."""
        names = {activation: name for name, activation in reversed(_ACTIVATIONS.items())}
        values = {name: getattr(self, field) for field, name in self.HUGGING_FACE_NAMES.items()}
        values[self.HUGGING_FACE_NAMES["activation"]] = names[self.activation]
        values[self.HUGGING_FACE_NAMES["context_length"]] = self.position_offset + self.context_length
        return {
            "model_type": self.model_type,
            **values,
            **dict.fromkeys(self.HUGGING_FACE_DROPOUT_RATES, self.dropout_rate),
        }
