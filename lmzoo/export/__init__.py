"""Writing artefacts that other runtimes load. Knows no model and no pipeline, only functions and what they use."""

from lmzoo.export.bundle import write_bundle
from lmzoo.export.saved_model import read_signatures, saved_versions, write_saved_model

__all__ = ["read_signatures", "saved_versions", "write_bundle", "write_saved_model"]
