"""Weights of a .tflite file in fewer bits, and activations too where that is asked for."""

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
        result = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps progress bars and warnings about the quantizer's own doings from the user."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _recipe(weights: Weights) -> Any:
    from ai_edge_quantizer import qtyping, recipe, recipe_manager

    if weights != "float16":
        recipes = {
            "int8": recipe.dynamic_wi8_afp32,
            "int8-full": recipe.static_wi8_ai8,
            "int4": recipe.dynamic_wi4b32_afp32,
        }
        return recipes[weights]()
    half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=half, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
    )
    manager = recipe_manager.RecipeManager()
    for operation in (qtyping.TFLOperationName.FULLY_CONNECTED, qtyping.TFLOperationName.EMBEDDING_LOOKUP):
        manager.add_quantization_config(".*", operation, config, recipe.AlgorithmName.FLOAT_CASTING)
    return manager.get_quantization_recipe()
