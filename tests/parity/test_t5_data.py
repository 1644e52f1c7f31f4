"""Span corruption against the released code of T5, `t5.data.preprocessors`, where it is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from denoised import EOS, FACTS, V
from hypothesis import given
from hypothesis import strategies as st

from lmzoo.data.corruption import Pieces, put_together, random_spans, replace_spans, span_counts
from lmzoo.data.denoising import SpanCorruption

pytestmark = pytest.mark.parity
VOCABULARY = SimpleNamespace(vocab_size=V)


@pytest.fixture(scope="module")
def t5() -> Any:
    """The released code, which is no part of the parity extra."""
    return pytest.importorskip("t5.data.preprocessors", reason="needs the packages t5 and seqio", exc_type=ImportError)


def ours(tokens, noise):
    """What is read and what is written, by us, without the padding."""
    pieces = Pieces.of(np.ones((1, len(tokens)), np.int32))
    for hidden in (noise, ~noise):
        side = put_together(*replace_spans(tokens, hidden, pieces, FACTS), pieces, len(tokens) + 2, FACTS, None)
        yield side.token_ids[0][side.segment_ids[0] > 0]


def theirs(t5, tokens, noise):
    """The same by them, who leave the ends to be added later."""
    for replace in (t5.noise_span_to_unique_sentinel, t5.nonnoise_span_to_unique_sentinel):
        yield np.append(replace(tokens, noise, VOCABULARY, seeds=None).numpy(), EOS)


@given(st.lists(st.booleans(), min_size=1, max_size=90))
def test_any_mask_gives_the_same_spans(t5, mask):
    tokens, noise = np.arange(10, 10 + len(mask), dtype=np.int32), np.array(mask)
    for mine, reference in zip(ours(tokens, noise), theirs(t5, tokens, noise), strict=True):
        np.testing.assert_array_equal(mine, reference)


@given(
    st.integers(1, 600), st.sampled_from([(0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.3, 10.0)]), st.integers(0, 10_000)
)
def test_noise_is_of_the_same_kind(t5, length, kind, seed):
    """As many tokens of noise in as many spans, whatever the length; which ones is left to chance."""
    import tensorflow as tf

    density, mean = kind
    reference = t5.random_spans_noise_mask(tf.constant(length), density, [(seed, 1), (seed, 2)], mean).numpy()
    pieces = Pieces.of(np.ones((1, length), np.int32))
    noise = random_spans(pieces, *span_counts(pieces.lengths, density, mean), np.array([seed], np.uint64))
    assert noise.sum() == reference.sum()
    begins = [np.diff(mask.astype(np.int8), prepend=0) == 1 for mask in (noise, reference)]
    assert begins[0].sum() == begins[1].sum()
    assert (noise[0], noise[-1]) == (reference[0], reference[-1])


@pytest.mark.parametrize("seq_length", [64, 100, 114, 128, 256, 512])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.15, 6.0), (0.25, 5.0), (0.45, 5.0)])
def test_rows_are_of_the_same_lengths(t5, seq_length, density, mean):
    """For shorter rows theirs reckon with no span at all, which their masks never have."""
    objective = SpanCorruption(FACTS, density, mean)
    raw, target = t5.random_spans_helper(seq_length, density, mean, 1, 1)
    assert (len(objective.costs(seq_length)) - 1, objective.target_length(seq_length)) == (raw, target)
