"""Text generation: from logits to token ids, and the loop around a model's decoding step. Knows no model."""

from lmzoo.generation.decode import Decoder, DecodeResult, StreamedTokens
from lmzoo.generation.sampling import SamplingOptions

__all__ = ["DecodeResult", "Decoder", "SamplingOptions", "StreamedTokens"]
