"""Text generation: from logits to token ids, and the loops around a model's decoding step. Knows no model."""

from lmzoo.generation.beam import BeamOptions, BeamResult, BeamSearch
from lmzoo.generation.decode import Decoder, DecodeResult, StreamedTokens
from lmzoo.generation.sampling import SamplingOptions

__all__ = ["BeamOptions", "BeamResult", "BeamSearch", "DecodeResult", "Decoder", "SamplingOptions", "StreamedTokens"]
