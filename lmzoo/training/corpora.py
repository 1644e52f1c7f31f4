"""The tokenizer and the corpora of a pretraining run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lmzoo.data.corpus import Corpus
from lmzoo.data.masking import TokenFacts
from lmzoo.data.prepare import prepare
from lmzoo.data.sources import read_documents
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.training.settings import PretrainConfig

_TOKENIZER_KINDS = ("bpe", "wordpiece", "unigram", "char")
# The most tokens that are counted are a block times their number, 64 million.
_BLOCK_TOKENS = 2**16
_MOST_BLOCKS = 2**10


def make_tokenizer(
    tokenizer: str, sources: Sequence[str], vocab_size: int | None = None, *, masked: bool = False
) -> Tokenizer:
    """Trains a tokenizer on text, or loads one.

    Args:
        tokenizer: kind to train (bpe, wordpiece, unigram or char), or a directory or file to load.
        sources: text to train on; see `lmzoo.data.sources`.
        vocab_size: of a tokenizer that is trained.
        masked: whether it is for masked LM, which needs special tokens of its own.

    Raises:
        ValueError: it is for masked LM, and one that was loaded has no mask token.
    """
    if tokenizer in _TOKENIZER_KINDS:
        return Tokenizer.train(read_documents(sources), kind=tokenizer, vocab_size=vocab_size, masked=masked)
    loaded = Tokenizer.from_pretrained(tokenizer)
    if masked:
        TokenFacts.of(loaded)
    return loaded


def make_corpora(
    config: PretrainConfig, kind: str, vocab_size: int, *, masked: bool, known: bool, say: Callable[[str], None]
) -> None:
    """Makes the run's own tokenizer and corpus, unless those in its directory were made with the same settings.

    Args:
        config: the settings.
        kind: of a tokenizer that is trained if the settings leave it open.
        vocab_size: likewise.
        masked: whether the text is for masked LM.
        known: whether what is in the directory was made with these settings.
        say: told what is made.
    """
    if config.corpus is not None:
        return
    prepared = Path(config.directory) / "corpus"
    if known and (prepared / "tokenizer").is_dir():
        tokenizer = Tokenizer.from_pretrained(prepared / "tokenizer")
    else:
        kind = kind if config.tokenizer == "auto" else config.tokenizer
        say(f"tokenizer: {kind}; text: {', '.join(config.source)}")
        size = config.vocab_size or (None if kind == "char" else vocab_size)
        tokenizer = make_tokenizer(kind, config.source, size, masked=masked)
    prepare(
        config.source,
        tokenizer,
        prepared,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        end_documents=not masked,
        overwrite=not known,
    )


def open_corpora(config: PretrainConfig) -> tuple[Tokenizer, Corpus, Corpus]:
    """The tokenizer, and the corpora to train and to validate on."""
    prepared = config.corpus or Path(config.directory) / "corpus"
    tokenizer = Tokenizer.from_pretrained(prepared / "tokenizer")
    return tokenizer, Corpus.open(prepared / "train", tokenizer), Corpus.open(prepared / "validation", tokenizer)


def unigram_entropy(training: Corpus, validation: Corpus, excluded: Sequence[int] = ()) -> float:
    """What a model scores that knows how frequent each token is and nothing else, in nats a token.

    That is the cross-entropy of the validation tokens under the frequencies of the training tokens, one added to each
    count. Of a very large corpus, parts evenly spread over it are counted.

    Args:
        training: that the frequencies are counted in.
        validation: that is scored.
        excluded: ids that count nowhere, since the model has not to predict them.
    """
    trained, scored = (_count_tokens(corpus, training.vocab_size) for corpus in (training, validation))
    trained += 1
    for counts in (trained, scored):
        counts[list(excluded)] = 0
    kept = trained > 0
    shares = trained[kept] / trained.sum()
    return float(-(scored[kept] * np.log(shares)).sum() / scored.sum())


def _count_tokens(corpus: Corpus, vocab_size: int) -> np.ndarray:
    """How often each token occurs [V]."""
    blocks = -(-corpus.num_tokens // _BLOCK_TOKENS)
    counted = min(blocks, _MOST_BLOCKS)
    counts = np.zeros(vocab_size, np.int64)
    for number in range(counted):
        start = number * blocks // counted * _BLOCK_TOKENS
        tokens = corpus.take(np.arange(start, min(start + _BLOCK_TOKENS, corpus.num_tokens)))
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts
