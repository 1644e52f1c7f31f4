"""Position-wise feed-forward networks."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops

Tensor = Any


@keras.saving.register_keras_serializable("lmzoo")
def gelu_tanh(inputs: Tensor) -> Tensor:
    """GELU by its tanh approximation, which Keras has no name for ("gelu" is the exact one).

    Reference:
        Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
    """
    return ops.gelu(inputs, approximate=True)


def activation_function(activation: Any) -> Any:
    """The function of a Keras activation's name, of "gelu_tanh", or of a callable."""
    return gelu_tanh if activation == "gelu_tanh" else keras.activations.get(activation)


class FeedForward(keras.layers.Layer):
    """Two projections with an activation between them.

    Shapes:
        inputs [..., D]; returns [..., D].

    Args:
        feedforward_dim: F, width between the projections.
        activation: name of a Keras activation, "gelu_tanh", or a callable.
        gated: whether the activated projection is multiplied with a second one, which has no activation.
        use_bias: whether the projections have biases.
        dropout_rate: probability of dropping a number between the projections in training.
        output_dtype: that the second projection is computed in, and returned; None is the compute dtype.
        kernel_initializer: of the first projection.
        output_initializer: of the second projection.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.3; Shazeer 2020, "GLU Variants Improve Transformer",
        section 2 (gated). Both projections of the gated form come from one matrix [D, 2 F], the activated one first.
    """

    def __init__(
        self,
        feedforward_dim: int,
        *,
        activation: Any = "gelu",
        gated: bool = False,
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        output_dtype: Any = None,
        kernel_initializer: Any = "glorot_uniform",
        output_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.feedforward_dim = feedforward_dim
        self.activation = activation_function(activation)
        self.gated = gated
        self.use_bias = use_bias
        self.dropout_rate = dropout_rate
        self.output_dtype = output_dtype
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy) if dropout_rate else None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for inputs [..., D]."""
        dense = functools.partial(keras.layers.Dense, use_bias=self.use_bias)
        self.up = dense(
            self.feedforward_dim * (1 + self.gated),
            kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
            name="up",
        )
        self.down = dense(
            input_shape[-1],
            kernel_initializer=self.output_initializer,
            dtype=self.dtype_policy,
            autocast=self.output_dtype is None,
            name="down",
        )
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.feedforward_dim))

    def call(self, inputs: Tensor) -> Tensor:
        """Projects up, activates, projects down."""
        inner = self.up(inputs)
        if self.gated:
            activated, linear = ops.split(inner, 2, axis=-1)
            inner = self.activation(activated) * linear
        else:
            inner = self.activation(inner)
        if self.dropout is not None:
            inner = self.dropout(inner)
        return self.down(inner if self.output_dtype is None else ops.cast(inner, self.output_dtype))

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "feedforward_dim": self.feedforward_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "dropout_rate": self.dropout_rate,
            "output_dtype": self.output_dtype,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
        }
