"""Weights of a .tflite file in fewer bits, and the inputs of its matrix products too where that is asked for."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

Weights = Literal["float32", "float16", "int8", "int8-full", "int4"]
Calibration = Mapping[str, Iterable[Mapping[str, Any]]]


def quantized(content: bytes, weights: Weights, calibration: Calibration) -> bytes:
    """The content of a float32 file with its weights in another format; see `export_tflite`.

    Args:
        content: of a file whose tables of weights are looked up by EMBEDDING_LOOKUP.
        calibration: signature -> inputs that show the ranges of its activations, for "int8-full".
    """
    if weights == "float32":
        return content
    try:
        from ai_edge_quantizer.quantizer import Quantizer
    except ImportError:
        raise ImportError(
            f"weights in {weights} need the package ai-edge-quantizer: pip install 'lmzoo[tflite]'."
        ) from None
    with _silence():
        quantizer = Quantizer(content)
        quantizer.load_quantization_recipe(_recipe(weights))
        ranges = quantizer.calibrate({name: list(each) for name, each in calibration.items()})
        try:
            result = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
        except ValueError as error:
            if "block size" not in str(error):
                raise
            raise ValueError(
                "int4 takes weights in groups of 32, but the model has a width that is no multiple of it: take int8."
            ) from error
    return bytes(result.quantized_model)


def _recipe(weights: Weights) -> Any:
    """What is done to the matrix products and to the tables; all else stays in float32.

    Norms and softmaxes have ranges that no 8 bits cover, and so has the number that hides a place from attention.
    """
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.recipe import AlgorithmName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    manager = RecipeManager()
    half = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    for operation in (qtyping.TFLOperationName.FULLY_CONNECTED, qtyping.TFLOperationName.EMBEDDING_LOOKUP):
        if weights == "float16":
            manager.add_quantization_config(".*", operation, half, AlgorithmName.FLOAT_CASTING)
        elif weights == "int4":
            manager.add_dynamic_config(".*", operation, 4, qtyping.QuantGranularity.BLOCKWISE_32)
        elif weights == "int8-full" and operation == qtyping.TFLOperationName.FULLY_CONNECTED:
            manager.add_static_config(".*", operation, activation_num_bits=8, weight_num_bits=8)
        else:
            manager.add_dynamic_config(".*", operation, 8)
    return manager.get_quantization_recipe()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps progress bars and warnings about the quantizer's own doings from the user."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
