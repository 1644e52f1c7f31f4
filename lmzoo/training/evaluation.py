"""How well a model predicts a corpus."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from lmzoo.checkpoints import find_checkpoint
from lmzoo.data.corpus import Corpus
from lmzoo.data.denoising import DecoderLM
from lmzoo.data.labelled import LabelledBatches
from lmzoo.data.masking import Unit
from lmzoo.data.objectives import Causal, Objective
from lmzoo.data.packing import Method
from lmzoo.data.pipeline import Batches
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import LanguageModel, load_pretrained
from lmzoo.training.objectives import choose_objective, facts_of, make_objective

# The order of rows and the masks of every evaluation.
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model scores on a corpus.

    Args:
        loss: mean cross-entropy, nats a token that is predicted: of masked LM, a hidden one; of a decoder, one that it
            is to write, sentinels and ends included.
        perplexity: exp(loss).
        accuracy: share of these tokens whose label has the highest logit.
        bits_per_byte: what coding the text with the model would cost, in bits for each byte of UTF-8. It does not
            depend on the tokenizer. The first token of each document, which nothing predicts, counts as log2(V) bits.
            None if only a part of the corpus was evaluated, and for what codes no text but only parts of it.
        num_tokens: tokens predicted.
        total_loss: of all that is learnt together, by which the best checkpoint is chosen.
        other: scores of what is learnt beside tokens, by name: `next_sentence_loss`, `next_sentence_accuracy`.
    """

    loss: float
    perplexity: float
    accuracy: float
    bits_per_byte: float | None
    num_tokens: int
    total_loss: float
    other: dict[str, float] = dataclasses.field(default_factory=dict)

    def as_record(self) -> dict[str, float | None]:
        """All scores by name."""
        values = dataclasses.asdict(self)
        other = values.pop("other")
        return {**values, **other}


def share_out(
    batches: Batches | LabelledBatches, strategy: tf.distribute.Strategy, on_made: Callable[[int], None] | None = None
) -> Any:
    """The batches as a dataset for a strategy: on several devices, each machine makes its own part of every batch.

    Args:
        batches: their size must be a multiple of the number of replicas.
        strategy: of the model.
        on_made: see `Batches.dataset`.
    """
    if strategy.num_replicas_in_sync == 1:
        return batches.dataset(on_made=on_made)
    return strategy.distribute_datasets_from_function(functools.partial(batches.dataset_fn, on_made=on_made))


def evaluate_model(
    model: LanguageModel, batches: Batches, *, max_batches: int | None = None, verbose: Any = 0
) -> Evaluation:
    """Scores a compiled model on the batches of one pass over a corpus.

    Args:
        model: compiled without a loss of one's own.
        batches: one epoch, not shuffled.
        max_batches: stop after so many; None takes all.
        verbose: of Keras's progress bar.
    """
    total = batches.num_batches
    if total is None:
        raise ValueError("the batches never end: give Batches epochs=1 to evaluate on them.")
    steps = total if max_batches is None else min(max_batches, total)
    dataset = share_out(batches, model.distribute_strategy)
    logs = model.evaluate(dataset, steps=steps, return_dict=True, verbose=verbose)
    total_loss = float(logs.pop("loss"))
    loss = float(logs.pop("masked_lm_loss", total_loss))
    accuracy = float(logs.pop("accuracy"))
    logs.pop("perplexity", None)
    num_tokens, bits_per_byte = None, None
    if steps == total and isinstance(batches.objective, Causal):
        corpus = batches.corpus
        unpredicted = corpus.num_documents if batches.objective.separate_documents else 1
        num_tokens = corpus.num_tokens - unpredicted
        bits = (num_tokens * loss + unpredicted * math.log(model.config.vocab_size)) / math.log(2)
        bits_per_byte = bits / corpus.num_bytes
    if num_tokens is None:
        num_tokens = int(sum(batches.batch_at(step)[2].sum() for step in range(steps)))
    if steps == total and isinstance(batches.objective, DecoderLM):  # Which writes all of it.
        bits_per_byte = num_tokens * loss / math.log(2) / batches.corpus.num_bytes
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        accuracy=accuracy,
        bits_per_byte=bits_per_byte,
        num_tokens=num_tokens,
        total_loss=total_loss,
        other={name: float(value) for name, value in logs.items()},
    )


def held_out_batches(corpus: Corpus, objective: Objective, **rows: Any) -> Batches:
    """One pass over a corpus, with the same masks at every evaluation; `rows` are arguments of `Batches`."""
    return Batches(corpus, objective, seed=_SEED, shuffle=False, epochs=1, **rows)


def evaluate(
    model: str | os.PathLike[str],
    corpus: str | os.PathLike[str],
    *,
    objective: str = "auto",
    mask_rate: float = 0.15,
    mask_unit: Unit = "token",
    noise_density: float = 0.15,
    mean_span_length: float | None = None,
    mode_tokens: bool = False,
    packing: Method | None = None,
    seq_length: int | None = None,
    batch_size: int = 16,
    separate_documents: bool = True,
    max_batches: int | None = None,
    dtype: str = "float32",
    verbose: Any = "auto",
) -> Evaluation:
    """Scores a checkpoint on a prepared corpus.

    Args:
        model: directory of a checkpoint with its tokenizer, or of a run (its best checkpoint is taken).
        corpus: directory written by `lmzoo prepare` (its validation part is taken), or one part of it.
        objective: what is scored, one of `ObjectiveName`; "auto" is the architecture's own. What is hidden is the same
            each time.
        mask_rate, mask_unit, noise_density, mean_span_length, mode_tokens, packing: as in `PretrainConfig`.
        seq_length: tokens a row; None is the model's context length.
        batch_size: rows a batch.
        separate_documents: whether attention keeps to a document, as in training by default.
        max_batches: evaluate on so many batches only.
        dtype: Keras dtype or policy of the computation.
        verbose: of Keras's progress bar.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the corpus cannot be read, or they do not belong together.
    """
    directory = find_checkpoint(model)
    corpus = Path(corpus)
    part = corpus / "validation" if (corpus / "validation").is_dir() else corpus
    tokenizer = Tokenizer.from_pretrained(directory)
    opened = Corpus.open(part, tokenizer)
    loaded = load_pretrained(directory, dtype=dtype)
    name = choose_objective(objective, type(loaded), loaded.config)
    chosen = make_objective(
        name,
        facts_of(name, tokenizer),
        tokenizer_kind=tokenizer.kind,
        mask_rate=mask_rate,
        mask_unit=mask_unit,
        noise_density=noise_density,
        mean_span_length=mean_span_length,
        mode_tokens=mode_tokens,
        separate_documents=separate_documents,
    )
    loaded.compile()
    batches = held_out_batches(
        opened,
        chosen,
        seq_length=seq_length or loaded.config.context_length,
        batch_size=batch_size,
        packing=packing,
    )
    return evaluate_model(loaded, batches, max_batches=max_batches, verbose=verbose)
