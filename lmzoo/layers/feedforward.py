"""Position-wise feed-forward networks."""

from __future__ import annotations

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
        kernel_initializer: of the first projection.
        output_initializer: of the second projection.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.3.
    """

    def __init__(
        self,
        feedforward_dim: int,
        *,
        activation: Any = "gelu",
        kernel_initializer: Any = "glorot_uniform",
        output_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.feedforward_dim = feedforward_dim
        self.activation = activation_function(activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights for inputs [..., D]."""
        self.up = keras.layers.Dense(
            self.feedforward_dim, kernel_initializer=self.kernel_initializer, dtype=self.dtype_policy, name="up"
        )
        self.down = keras.layers.Dense(
            input_shape[-1], kernel_initializer=self.output_initializer, dtype=self.dtype_policy, name="down"
        )
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.feedforward_dim))

    def call(self, inputs: Tensor) -> Tensor:
        """Projects up, activates, projects down."""
        return self.down(self.activation(self.up(inputs)))

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            **super().get_config(),
            "feedforward_dim": self.feedforward_dim,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
        }
