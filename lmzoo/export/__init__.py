"""Writing artefacts that other runtimes load, running them, and comparing what they give.

Names are imported when they are first used: what runs a .tflite file needs no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmzoo.export.bundle import write_bundle as write_bundle
    from lmzoo.export.saved_model import read_signatures as read_signatures
    from lmzoo.export.saved_model import saved_versions as saved_versions
    from lmzoo.export.saved_model import write_saved_model as write_saved_model
    from lmzoo.export.tflite import export_tflite as export_tflite
    from lmzoo.export.tflite_runtime import TFLiteGenerator as TFLiteGenerator
    from lmzoo.export.tflite_runtime import TFLiteModel as TFLiteModel

_ROOMS = {
    "read_signatures": "saved_model",
    "saved_versions": "saved_model",
    "write_bundle": "bundle",
    "write_saved_model": "saved_model",
    "export_tflite": "tflite",
    "TFLiteGenerator": "tflite_runtime",
    "TFLiteModel": "tflite_runtime",
}

__all__ = sorted(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'lmzoo.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lmzoo.export.{_ROOMS[name]}"), name)
