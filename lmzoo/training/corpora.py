"""The tokenizer and the corpora of a pretraining run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lmzoo.config import ModelConfig
from lmzoo.data.corpus import Corpus
from lmzoo.data.prepare import prepare
from lmzoo.data.sources import read_documents
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.training.settings import PretrainConfig

_TOKENIZER_KINDS = ("bpe", "wordpiece", "unigram", "char")


def make_tokenizer(tokenizer: str, sources: Sequence[str], vocab_size: int | None = None) -> Tokenizer:
    """Trains a tokenizer on text, or loads one.

    Args:
        tokenizer: kind to train (bpe, wordpiece, unigram or char), or a directory or file to load.
        sources: text to train on; see `lmzoo.data.sources`.
        vocab_size: of a tokenizer that is trained.
    """
    if tokenizer in _TOKENIZER_KINDS:
        return Tokenizer.train(read_documents(sources), kind=tokenizer, vocab_size=vocab_size)
    return Tokenizer.from_pretrained(tokenizer)


def make_corpora(config: PretrainConfig, shape: ModelConfig, known: bool, say: Callable[[str], None]) -> None:
    """Makes the run's own tokenizer and corpus, unless those in its directory were made with the same settings."""
    if config.corpus is not None:
        return
    prepared = Path(config.directory) / "corpus"
    if known and (prepared / "tokenizer").is_dir():
        tokenizer = Tokenizer.from_pretrained(prepared / "tokenizer")
    else:
        say(f"tokenizer: {config.tokenizer}; text: {', '.join(config.source)}")
        size = config.vocab_size or (None if config.tokenizer == "char" else shape.vocab_size)
        tokenizer = make_tokenizer(config.tokenizer, config.source, size)
    prepare(
        config.source,
        tokenizer,
        prepared,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        overwrite=not known,
    )


def open_corpora(config: PretrainConfig) -> tuple[Tokenizer, Corpus, Corpus]:
    """The tokenizer, and the corpora to train and to validate on."""
    prepared = config.corpus or Path(config.directory) / "corpus"
    tokenizer = Tokenizer.from_pretrained(prepared / "tokenizer")
    return tokenizer, Corpus.open(prepared / "train", tokenizer), Corpus.open(prepared / "validation", tokenizer)
