"""Writing artefacts that other runtimes load. Knows no model and no pipeline, only functions and what they use."""

from lmzoo.export.saved_model import saved_versions, write_saved_model

__all__ = ["saved_versions", "write_saved_model"]
