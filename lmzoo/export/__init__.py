"""Writing artefacts that other runtimes load, and running and comparing them."""

from lmzoo.export.saved_model import saved_versions, write_saved_model
from lmzoo.export.tflite import export_tflite
from lmzoo.export.tflite_runtime import TFLiteGenerator, TFLiteModel

__all__ = ["TFLiteGenerator", "TFLiteModel", "export_tflite", "saved_versions", "write_saved_model"]
