"""Corpora for the tests of denoising, and how to put what was made of a text together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lmzoo.data.corpus import Corpus, CorpusWriter
from lmzoo.data.corruption import SentinelFacts

V, NUM_SENTINELS = 400, 100
PAD, EOS, START = 0, 1, 2
SENTINELS = tuple(range(V - 1, V - 1 - NUM_SENTINELS, -1))
FACTS = SentinelFacts(EOS, SENTINELS, PAD, START)
FIRST = 10  # ordinary tokens are [FIRST, V - NUM_SENTINELS)


def write_corpus(directory: Path, lengths: Any, seed: int = 0) -> Corpus:
    """Documents of random ordinary tokens."""
    tokens = np.random.default_rng(seed).integers(FIRST, V - NUM_SENTINELS, sum(lengths))
    with CorpusWriter.create(directory, vocab_size=V, tokenizer_fingerprint="x") as writer:
        writer.add(tokens, lengths, num_bytes=100)
    return Corpus.open(directory)


def texts_of(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Source and target of each text of a batch, without their ends, by what a model is told of it."""
    inputs, labels, weights = batch
    texts = []
    for row, targets in enumerate(labels):
        sources, decoder = inputs["token_ids"][row], inputs["decoder_token_ids"][row]
        if "segment_ids" in inputs:
            source_segments, segments = inputs["segment_ids"][row], inputs["decoder_segment_ids"][row]
        else:
            source_segments = inputs["padding_mask"][row].astype(int)
            segments = (weights[row] > 0).astype(int)
        np.testing.assert_array_equal(segments > 0, weights[row] > 0)
        for ids, numbers in ((sources, source_segments), (decoder, segments)):
            assert (ids[numbers == 0] == PAD).all()
            real = int((numbers > 0).sum())
            assert (np.diff(numbers[:real]) >= 0).all()
            assert not numbers[real:].any()
        assert source_segments.max() == segments.max()
        for number in range(1, segments.max() + 1):
            source, target = sources[source_segments == number].tolist(), targets[segments == number].tolist()
            assert (source.pop(), target.pop()) == (EOS, EOS)
            assert decoder[segments == number].tolist() == [START, *target]
            texts.append((source, target))
    return texts


def put_back(source: list[int], target: list[int]) -> list[int]:
    """The text that sentinels were put into."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            assert token == SENTINELS[len(spans)]
            spans[token] = []
        else:
            spans[SENTINELS[len(spans) - 1]].append(token)
    used = [token for token in source if token in SENTINELS]
    assert used == list(spans)[: len(used)]
    restored = []
    for token in source:
        restored += spans.get(token, [token])
    return restored


def pieces_of(corpus: Corpus, longest: int) -> list[tuple[int, ...]]:
    """What of each document lies in a row that has room for so many tokens, sorted."""
    documents = [corpus.document(number).tolist() for number in range(corpus.num_documents)]
    return sorted(tuple(text[at : at + longest]) for text in documents for at in range(0, len(text), longest))
