"""The `lmzoo` command: parses, calls one function, prints. Flags are generated from the functions' arguments."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Before TensorFlow is loaded: its start-up notes are not ours.

import tyro

from lmzoo.engine.launch import launch
from lmzoo.generation.sampling import SamplingOptions
from lmzoo.training import PlanConfig, PretrainConfig

FlatPretrainConfig = Annotated[PretrainConfig, tyro.conf.OmitArgPrefixes]
FlatPlanConfig = Annotated[PlanConfig, tyro.conf.OmitArgPrefixes]
FlatSamplingOptions = Annotated[SamplingOptions, tyro.conf.OmitArgPrefixes]

# What reads well in a terminal; the library's own default draws from the model's whole distribution.
_SAMPLING = SamplingOptions(temperature=0.8, top_k=40)


def prepare(
    source: tyro.conf.Positional[tuple[str, ...]],
    directory: Path = Path("corpus"),
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    validation_fraction: float = 0.05,
    num_processes: int = 1,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Turn text into a token corpus on disk, with a tokenizer trained on it or given.

    Args:
        source: Text: files, globs, *.jsonl, *.parquet, tfds:NAME, or pydoc.
        directory: Where train/, validation/ and tokenizer/ go.
        tokenizer: Kind to train (bpe, wordpiece, unigram or char), or a directory or file to load.
        vocab_size: Size of a tokenizer that is trained.
        validation_fraction: Share of the documents that is held out.
        num_processes: Processes that encode; one uses all cores where the tokenizer can.
        seed: Of the split.
        overwrite: Replace another corpus in the directory.
    """
    from lmzoo.data.prepare import prepare as run
    from lmzoo.training import make_tokenizer

    made = make_tokenizer(tokenizer, source, vocab_size)
    prepared = run(
        source,
        made,
        directory,
        validation_fraction=validation_fraction,
        num_processes=num_processes,
        seed=seed,
        overwrite=overwrite,
    )
    for part in (prepared.train, prepared.validation):
        print(part)


def pretrain(config: FlatPretrainConfig) -> None:
    """Train a model on text; the same command again goes on where it was stopped."""
    from lmzoo.training import pretrain as run

    run(config)


def plan(config: FlatPlanConfig) -> None:
    """Reckon what a run needs of memory, arithmetic and time, before it is started."""
    from lmzoo.training import plan as run

    print(run(config))


def evaluate(
    model: tyro.conf.Positional[Path],
    corpus: tyro.conf.Positional[Path],
    seq_length: int | None = None,
    batch_size: int = 16,
    separate_documents: bool = True,
    max_batches: int | None = None,
    dtype: str = "float32",
) -> None:
    """Score a checkpoint on a prepared corpus: loss, perplexity, accuracy, bits per byte.

    Args:
        model: Directory of a checkpoint or of a run.
        corpus: Directory written by `lmzoo prepare`.
        seq_length: Tokens a row; by default the model's context length.
        batch_size: Rows a batch.
        separate_documents: Whether attention keeps to a document.
        max_batches: Evaluate on so many batches only.
        dtype: Precision of the computation.
    """
    from lmzoo.training import evaluate as run

    scores = run(
        model,
        corpus,
        seq_length=seq_length,
        batch_size=batch_size,
        separate_documents=separate_documents,
        max_batches=max_batches,
        dtype=dtype,
    )
    print(json.dumps(dataclasses.asdict(scores)))


def generate(
    model: tyro.conf.Positional[Path],
    prompt: tyro.conf.Positional[str],
    max_new_tokens: int = 64,
    seed: int | None = None,
    options: FlatSamplingOptions = _SAMPLING,
) -> None:
    """Continue a prompt, and print the text as it comes.

    Args:
        model: Directory of a checkpoint or of a run.
        prompt: Text to go on from.
        max_new_tokens: The most tokens to generate.
        seed: The same seed gives the same text.
        options: How tokens are chosen.
    """
    from lmzoo.pipelines import TextGenerator

    generator = TextGenerator.from_pretrained(model, max_new_tokens=max_new_tokens, **dataclasses.asdict(options))
    print(prompt, end="", flush=True)
    for piece in generator.stream(prompt, seed=seed):
        print(piece, end="", flush=True)
    print()


def export(
    model: tyro.conf.Positional[Path],
    directory: tyro.conf.Positional[Path],
    version: int | None = None,
    max_new_tokens: int = 64,
    options: FlatSamplingOptions = _SAMPLING,
) -> None:
    """Write a SavedModel for TF Serving: strings in, strings out.

    Args:
        model: Directory of a checkpoint or of a run.
        directory: Where the versions go, such as saved_models/gpt.
        version: Number of the version; by default the one after the newest.
        max_new_tokens: The most tokens to generate for each string.
        options: How tokens are chosen.
    """
    from lmzoo.pipelines import TextGenerator

    generator = TextGenerator.from_pretrained(model, max_new_tokens=max_new_tokens, **dataclasses.asdict(options))
    print(generator.export(directory, version=version))


_COMMANDS: dict[str, Callable[..., int | None]] = {
    "prepare": prepare,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "generate": generate,
    "export": export,
    "plan": plan,
    "launch": launch,
}


def main(args: list[str] | None = None) -> None:
    """Runs a command. Exit status 2 for bad usage, 1 for a failure, which is told in one line."""
    try:
        sys.exit(
            tyro.extras.subcommand_cli_from_dict(
                _COMMANDS, prog="lmzoo", args=args, config=(tyro.conf.FlagConversionOff,)
            )
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"lmzoo: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
