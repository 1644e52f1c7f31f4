"""The objectives of pretraining by name."""

from __future__ import annotations

from collections.abc import Callable

from lmzoo.config import ModelConfig
from lmzoo.data.masking import MaskedLM, TokenFacts, Unit
from lmzoo.data.objectives import Causal, Objective
from lmzoo.data.sentence_pairs import NextSentence, SentenceOrder
from lmzoo.models import LanguageModel

_PAIRS: dict[str, Callable[[MaskedLM], Objective]] = {"mlm+nsp": NextSentence, "mlm+sop": SentenceOrder}


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


def make_objective(
    name: str,
    facts: TokenFacts | None,
    *,
    mask_rate: float = 0.15,
    mask_unit: Unit = "token",
    separate_documents: bool = True,
) -> Objective:
    """An objective by name.

    Args:
        name: "causal", "mlm", "mlm+nsp" or "mlm+sop".
        facts: of the tokenizer's tokens; "causal" needs none.
        mask_rate, mask_unit: of masked LM.
        separate_documents: whether attention keeps to a document; if not, a corpus is one long text.

    Raises:
        ValueError: masked LM is to read a corpus as one long text.
    """
    if name == "causal":
        return Causal(separate_documents=separate_documents)
    if not separate_documents:
        raise ValueError(f"separate_documents is False, but objective {name!r} keeps documents apart: leave it True.")
    if facts is None:
        raise ValueError(f"objective {name!r} needs to know the tokenizer's special tokens.")
    masked = MaskedLM(facts, mask_rate=mask_rate, unit=mask_unit)
    return masked if name == "mlm" else _PAIRS[name](masked)
