"""Leaf layers of language models, in `keras.ops`: they take ints and floats, never a config."""

from lmzoo.layers.attention import CrossAttention as CrossAttention
from lmzoo.layers.attention import SelfAttention as SelfAttention
from lmzoo.layers.attention import attention_bias as attention_bias
from lmzoo.layers.attention import recorded_attention as recorded_attention
from lmzoo.layers.cache import KeyValueCache as KeyValueCache
from lmzoo.layers.embeddings import TokenEmbedding as TokenEmbedding
from lmzoo.layers.feedforward import FeedForward as FeedForward
from lmzoo.layers.initializers import SideBySideNormal as SideBySideNormal
from lmzoo.layers.losses import token_cross_entropy as token_cross_entropy
from lmzoo.layers.positions import LearnedPositions as LearnedPositions
from lmzoo.layers.positions import RelativePositionBias as RelativePositionBias
