"""The objectives of pretraining by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np

from lmzoo.config import ModelConfig
from lmzoo.data.corruption import MODE_TOKENS, SentinelFacts
from lmzoo.data.denoising import UL2, DecoderLM, PrefixLM, SpanCorruption
from lmzoo.data.masking import MaskedLM, TokenFacts, Unit
from lmzoo.data.objectives import Batch, Causal, Objective, Rows
from lmzoo.data.sentence_pairs import NextSentence, SentenceOrder
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import LanguageModel

ObjectiveName: TypeAlias = Literal["auto", "causal", "mlm", "mlm+nsp", "mlm+sop", "span", "prefix", "ul2", "decoder"]
Facts: TypeAlias = TokenFacts | SentinelFacts | None

_PAIRS: dict[str, Callable[[MaskedLM], Objective]] = {"mlm+nsp": NextSentence, "mlm+sop": SentenceOrder}
_DENOISING = ("span", "prefix", "ul2", "decoder")
USUAL_SENTINELS = {"unigram": 100, "byte": 125}
"""Kind of tokenizer -> sentinels of T5, and of ByT5."""
_SPAN_LENGTHS = {"byte": 20.0}  # Of ByT5, and of T5 otherwise.
_SPAN_LENGTH = 3.0
# Fields of a recipe's settings that say what its objective is like.
_OPTIONS = ("mask_rate", "mask_unit", "noise_density", "mean_span_length", "mode_tokens", "separate_documents")


def choose_objective(name: str, model_class: type[LanguageModel], shape: ModelConfig) -> str:
    """The name of the objective: "auto" is the architecture's own.

    Raises:
        ValueError: the model cannot learn it.
    """
    known = model_class.pretraining_objectives(shape)
    if name == "auto":
        return known[0]
    if name not in known:
        why = " without a pooler" if not getattr(shape, "pooler", True) else ""
        raise ValueError(
            f"objective is {name!r}, but a {model_class.__name__}{why} learns {' or '.join(known)}: take that, or "
            "another preset."
        )
    return name


def is_masked(name: str) -> bool:
    """Whether an objective hides tokens of a text that an encoder is to guess."""
    return name.startswith("mlm")


def is_denoising(name: str) -> bool:
    """Whether an objective makes two sides of a text, for an encoder and a decoder."""
    return name in _DENOISING


def facts_of(name: str, tokenizer: Tokenizer) -> Facts:
    """What an objective must know of a tokenizer's tokens; "causal" needs nothing.

    Raises:
        ValueError: the tokenizer lacks a token that it needs.
    """
    if is_masked(name):
        return TokenFacts.of(tokenizer)
    return SentinelFacts.of(tokenizer) if is_denoising(name) else None


def objective_options(config: Any) -> dict[str, Any]:
    """Arguments of `make_objective` from the settings of a recipe, as far as these have them."""
    return {name: getattr(config, name) for name in _OPTIONS if hasattr(config, name)}


def make_objective(
    name: str,
    facts: Facts,
    *,
    tokenizer_kind: str = "unigram",
    mask_rate: float = 0.15,
    mask_unit: Unit = "token",
    noise_density: float = 0.15,
    mean_span_length: float | None = None,
    mode_tokens: bool = False,
    separate_documents: bool = True,
) -> Objective:
    """An objective by name.

    Args:
        name: one of `ObjectiveName`, but "auto".
        facts: of the tokenizer's tokens, as `facts_of` gives them.
        tokenizer_kind: says how long spans are by default.
        mask_rate, mask_unit: of masked LM.
        noise_density, mean_span_length: of span corruption; None is 3 tokens, or 20 bytes.
        mode_tokens: whether UL2 says by a token which of its denoisers a text is for.
        separate_documents: whether attention keeps to a document; if not, a corpus is one long text.

    Raises:
        ValueError: masked LM is to read a corpus as one long text, the objective has no modes, or the tokenizer lacks
            tokens.
    """
    if mode_tokens and name != "ul2":
        raise ValueError(f"mode_tokens is True, but objective {name!r} has no modes, only ul2 has: leave it False.")
    if name == "causal":
        return Causal(separate_documents=separate_documents)
    if isinstance(facts, TokenFacts):
        if not separate_documents:
            raise ValueError(
                f"separate_documents is False, but objective {name!r} keeps documents apart: leave it True."
            )
        masked = MaskedLM(facts, mask_rate=mask_rate, unit=mask_unit)
        return masked if name == "mlm" else _PAIRS[name](masked)
    if facts is None:
        raise ValueError(f"objective {name!r} needs to know the tokenizer's special tokens.")
    if name == "span":
        length = mean_span_length or _SPAN_LENGTHS.get(tokenizer_kind, _SPAN_LENGTH)
        return SpanCorruption(facts, noise_density, length, separate_documents=separate_documents)
    if name == "ul2":
        return UL2(facts, modes=mode_tokens, separate_documents=separate_documents)
    return (PrefixLM if name == "prefix" else DecoderLM)(facts, separate_documents=separate_documents)


def objective_before_text(config: Any, model_class: type[LanguageModel], shape: ModelConfig) -> Objective:
    """The objective of a recipe without a tokenizer: batches have the shapes that they have with any.

    Args:
        config: settings of the recipe.
        model_class, shape: of its preset.

    Raises:
        ValueError: the model cannot learn it.
    """
    name = choose_objective(config.objective, model_class, shape)
    given = getattr(config, "tokenizer", "auto")
    kind = given if given in USUAL_SENTINELS else model_class.usual_tokenizer(shape)
    facts: Facts = None
    if is_masked(name):
        none = np.zeros(shape.vocab_size, bool)
        facts = TokenFacts(shape.vocab_size, 0, 0, 0, (), none, none)
    elif is_denoising(name):
        sentinels = getattr(config, "num_sentinels", None) or USUAL_SENTINELS[kind]
        facts = SentinelFacts(0, (0,) * sentinels, mode_ids=tuple((mode.strip("[]"), 0) for mode in MODE_TOKENS))
    return make_objective(name, facts, tokenizer_kind=kind, **objective_options(config))


def empty_batch(objective: Objective, rows: int, seq_length: int) -> Batch:
    """What an objective makes of rows without text: the shapes and types are what counts."""
    zeros = np.zeros((rows, seq_length), np.int32)
    empty = Rows(zeros, zeros, zeros.astype(bool), zeros, zeros, np.zeros(rows, np.uint64), seq_length=seq_length)
    return objective(empty._replace(other=empty))
