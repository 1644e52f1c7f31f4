"""The tokenizer and the corpora of a pretraining run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lmzoo.data.corpus import Corpus
from lmzoo.data.corruption import MODE_TOKENS, SentinelFacts
from lmzoo.data.masking import TokenFacts
from lmzoo.data.pipeline import Batches
from lmzoo.data.prepare import prepare
from lmzoo.data.sources import read_documents
from lmzoo.data.tokenizer_training import SPECIAL_TOKENS
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.training.objectives import USUAL_SENTINELS, Facts, is_denoising, is_masked
from lmzoo.training.settings import PretrainConfig

_TOKENIZER_KINDS = ("bpe", "wordpiece", "unigram", "char", "byte")
# The most tokens that are counted are a block times their number, 64 million.
_BLOCK_TOKENS = 2**16
_MOST_BLOCKS = 2**10
# The most targets of a decoder that are counted, in rows evenly spread over a corpus, and the rows made at a time.
_MOST_TARGETS = 2**21
_ROWS_AT_ONCE = 256


def make_tokenizer(
    tokenizer: str,
    sources: Sequence[str],
    vocab_size: int | None = None,
    *,
    masked: bool = False,
    num_sentinels: int = 0,
    mode_tokens: bool = False,
) -> Tokenizer:
    """Trains a tokenizer on text, or loads one.

    Args:
        tokenizer: kind to train (bpe, wordpiece, unigram, char or byte), or a directory or file to load.
        sources: text to train on; see `lmzoo.data.sources`.
        vocab_size: of a tokenizer that is trained.
        masked: whether it is for masked LM, which needs special tokens of its own.
        num_sentinels: tokens that mark spans, for a decoder to write what they stand for.
        mode_tokens: whether there are UL2's mode tokens too, in a tokenizer of another kind than byte.

    Raises:
        ValueError: it is for masked LM, and one that was loaded has no mask token; or a kind lacks what is asked for.
    """
    if tokenizer in _TOKENIZER_KINDS:
        return Tokenizer.train(
            read_documents(sources),
            kind=tokenizer,
            vocab_size=vocab_size,
            special_tokens=(*SPECIAL_TOKENS[tokenizer], *MODE_TOKENS) if mode_tokens else None,
            masked=masked,
            num_sentinels=num_sentinels,
        )
    loaded = Tokenizer.from_pretrained(tokenizer)
    if masked:
        TokenFacts.of(loaded)
    return loaded


def make_corpora(
    config: PretrainConfig,
    kind: str,
    vocab_size: int,
    objective: str,
    *,
    known: bool,
    say: Callable[[str], None],
    check: Callable[[Tokenizer], object],
) -> None:
    """Makes the run's own tokenizer and corpus, unless those in its directory were made with the same settings.

    Args:
        config: the settings.
        kind: of a tokenizer that is trained if the settings leave it open.
        vocab_size: likewise.
        objective: name of what is learnt from the text.
        known: whether what is in the directory was made with these settings.
        say: told what is made.
        check: given the tokenizer before the text is encoded; raises if it will not do.
    """
    if config.corpus is not None:
        return
    prepared = Path(config.directory) / "corpus"
    if known and (prepared / "tokenizer").is_dir():
        tokenizer = Tokenizer.from_pretrained(prepared / "tokenizer")
    else:
        kind = kind if config.tokenizer == "auto" else config.tokenizer
        say(f"tokenizer: {kind}; text: {', '.join(config.source)}")
        size = config.vocab_size or (None if kind in ("char", "byte") else vocab_size)
        sentinels = USUAL_SENTINELS.get(kind, 0) if config.num_sentinels is None else config.num_sentinels
        denoising = is_denoising(objective)
        tokenizer = make_tokenizer(
            kind,
            config.source,
            size,
            masked=is_masked(objective),
            num_sentinels=sentinels if denoising else 0,
            mode_tokens=config.mode_tokens and denoising,
        )
        check(tokenizer)
    prepare(
        config.source,
        tokenizer,
        prepared,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        end_documents=objective == "causal",  # The others put ends themselves.
        overwrite=not known,
    )


def open_corpora(config: PretrainConfig) -> tuple[Tokenizer, Corpus, Corpus]:
    """The tokenizer, and the corpora to train and to validate on."""
    prepared = Path(config.corpus or Path(config.directory) / "corpus")
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
    return _cross_entropy(scored, trained)


def predicted_entropy(training: Batches, validation: Batches, facts: Facts) -> float:
    """The same for what a model is to predict: no special tokens; or of a decoder, all that it is to write.

    That is missing text, sentinels and ends; of very many, those in rows evenly spread over the corpus are counted.

    Args:
        training: that the frequencies are counted in.
        validation: that is scored.
        facts: of their objective.
    """
    if not isinstance(facts, SentinelFacts):
        excluded = () if facts is None else facts.special_token_ids
        return unigram_entropy(training.corpus, validation.corpus, excluded)
    trained, scored = (_count_targets(batches) for batches in (training, validation))
    return _cross_entropy(scored, trained + 1)


def _cross_entropy(scored: np.ndarray, trained: np.ndarray) -> float:
    """Of tokens by their counts [V] under the frequencies of others; what has none of these counts nowhere."""
    kept = trained > 0
    shares = trained[kept] / trained.sum()
    return float(-(scored[kept] * np.log(shares)).sum() / scored.sum())


def _count_targets(batches: Batches) -> np.ndarray:
    """How often each token is to be written [V]."""
    counts = np.zeros(batches.corpus.vocab_size, np.int64)
    indices = batches.spread(_MOST_TARGETS // batches.lengths[-1])
    for start in range(0, len(indices), _ROWS_AT_ONCE):
        _, labels, weights = batches.examples(indices[start : start + _ROWS_AT_ONCE])
        counts += np.bincount(labels[weights > 0], minlength=len(counts))
    return counts


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
