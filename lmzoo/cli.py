"""The `lmzoo` command: parses, calls one function, prints. Flags are generated from the functions' arguments."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Before TensorFlow is loaded: its start-up notes are not ours.

import tyro

from lmzoo.engine.launch import launch
from lmzoo.export.tflite_weights import Weights
from lmzoo.generation import BeamOptions, SamplingOptions
from lmzoo.serving import demo, serve
from lmzoo.training import FinetuneConfig, ObjectiveName, PlanConfig, PretrainConfig

FlatPretrainConfig = Annotated[PretrainConfig, tyro.conf.OmitArgPrefixes]
FlatFinetuneConfig = Annotated[FinetuneConfig, tyro.conf.OmitArgPrefixes]
FlatPlanConfig = Annotated[PlanConfig, tyro.conf.OmitArgPrefixes]
FlatSamplingOptions = Annotated[SamplingOptions, tyro.conf.OmitArgPrefixes]
FlatBeamOptions = Annotated[BeamOptions, tyro.conf.OmitArgPrefixes]

# What reads well in a terminal; the library's own default draws from the model's whole distribution.
_SAMPLING = SamplingOptions(temperature=0.8, top_k=40)
_BEAMS = BeamOptions(num_beams=1)


def prepare(
    source: tyro.conf.Positional[tuple[str, ...]],
    directory: Path = Path("corpus"),
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    masked: bool = False,
    num_sentinels: int = 0,
    mode_tokens: bool = False,
    validation_fraction: float = 0.05,
    num_processes: int = 1,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Turn text into a token corpus on disk, with a tokenizer trained on it or given.

    Args:
        source: Text: files, globs, *.jsonl, *.parquet, tfds:NAME, or pydoc.
        directory: Where train/, validation/ and tokenizer/ go.
        tokenizer: Kind to train (bpe, wordpiece, unigram, char or byte), or a directory or file to load.
        vocab_size: Size of a tokenizer that is trained.
        masked: For masked LM: the tokenizer has a mask token, and no token ends a document.
        num_sentinels: For T5: tokens that mark spans, such as 100, and no token ends a document.
        mode_tokens: For UL2: a token for each mode of its denoisers.
        validation_fraction: Share of the documents that is held out.
        num_processes: Processes that encode; one uses all cores where the tokenizer can.
        seed: Of the split.
        overwrite: Replace another corpus in the directory.
    """
    from lmzoo.data.prepare import prepare as run
    from lmzoo.training import make_tokenizer

    made = make_tokenizer(
        tokenizer, source, vocab_size, masked=masked, num_sentinels=num_sentinels, mode_tokens=mode_tokens
    )
    prepared = run(
        source,
        made,
        directory,
        validation_fraction=validation_fraction,
        num_processes=num_processes,
        seed=seed,
        end_documents=not (masked or num_sentinels),
        overwrite=overwrite,
    )
    for part in (prepared.train, prepared.validation):
        print(part)


def pretrain(config: FlatPretrainConfig) -> None:
    """Train a model on text; the same command again goes on where it was stopped."""
    from lmzoo.training import pretrain as run

    run(config)


def finetune(config: FlatFinetuneConfig) -> None:
    """Train a checkpoint for a task on labelled examples; the same command again goes on where it was stopped."""
    from lmzoo.training import finetune as run

    run(config)


def plan(config: FlatPlanConfig) -> None:
    """Reckon what a run needs of memory, arithmetic and time, before it is started."""
    from lmzoo.training import plan as run

    print(run(config))


def evaluate(
    model: tyro.conf.Positional[Path],
    data: tyro.conf.Positional[tuple[str, ...]],
    objective: ObjectiveName = "auto",
    mask_rate: float = 0.15,
    mask_unit: Literal["token", "word", "span"] = "token",
    noise_density: float = 0.15,
    mean_span_length: float | None = None,
    mode_tokens: bool = False,
    packing: Literal["stream", "pad", "best-fit"] | None = None,
    seq_length: int | None = None,
    batch_size: int = 16,
    separate_documents: bool = True,
    max_batches: int | None = None,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    prefix: str = "",
    max_target_length: int = 128,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    dtype: str = "float32",
) -> None:
    """Score a checkpoint on a prepared corpus, or a fine-tuned one on labelled examples.

    Args:
        model: Directory of a checkpoint or of a run.
        data: Directory written by `lmzoo prepare`; for a fine-tuned model, files of examples or tfds:NAME@SPLIT.
        objective: What is scored, as in training; auto is the architecture's own.
        mask_rate: Share of the tokens that masked LM hides, the same ones each time.
        mask_unit: What is hidden at a time.
        noise_density: Share of the tokens that span corruption takes out, the same ones each time.
        mean_span_length: Tokens that it takes out in a row, on average; by default 3, or 20 bytes.
        mode_tokens: Whether UL2 says what its denoisers are for.
        packing: How documents become rows; by default as in training.
        seq_length: Tokens a row; by default the model's context length.
        batch_size: Rows a batch.
        separate_documents: Whether attention keeps to a document.
        max_batches: Evaluate on so many batches only.
        text: Field of the text of an example; by default as in `lmzoo finetune`, as the next two.
        pair: Field of its second text.
        label: Field of its label.
        prefix: Stands in front of each text, for a model that answers texts with texts; as in training.
        max_target_length: The most tokens that such a model writes.
        num_beams: How many texts a beam search follows as it writes.
        length_penalty: Of the beam search.
        dtype: Precision of the computation.
    """
    from lmzoo.training import evaluate as run
    from lmzoo.training import evaluate_task

    if not (len(data) == 1 and Path(data[0]).is_dir()):
        task_scores = evaluate_task(
            model,
            data,
            text=text,
            pair=pair,
            label=label,
            batch_size=batch_size,
            dtype=dtype,
            prefix=(prefix,),
            max_target_length=max_target_length,
            num_beams=num_beams,
            length_penalty=length_penalty,
        )
        print(json.dumps(task_scores))
        return
    scores = run(
        model,
        data[0],
        objective=objective,
        mask_rate=mask_rate,
        mask_unit=mask_unit,
        noise_density=noise_density,
        mean_span_length=mean_span_length,
        mode_tokens=mode_tokens,
        packing=packing,
        seq_length=seq_length,
        batch_size=batch_size,
        separate_documents=separate_documents,
        max_batches=max_batches,
        dtype=dtype,
    )
    print(json.dumps(scores.as_record()))


def generate(
    model: tyro.conf.Positional[Path],
    prompt: tyro.conf.Positional[str],
    max_new_tokens: int | None = None,
    seed: int | None = None,
    prefix: str | None = None,
    options: FlatSamplingOptions = _SAMPLING,
    beams: FlatBeamOptions = _BEAMS,
) -> None:
    """Continue a prompt, or answer it, and print the text as it comes.

    Args:
        model: Directory of a checkpoint or of a run.
        prompt: Text to go on from, or to answer.
        max_new_tokens: The most tokens to generate; by default 64, or what the checkpoint says.
        seed: The same seed gives the same text.
        prefix: What stands in front of a text that is answered; by default what the checkpoint says.
        options: How tokens are chosen, if not as a checkpoint that answers texts says.
        beams: How a beam search goes, with more than one beam and temperature 0.
    """
    from lmzoo.pipelines import TextToText, find_pipeline

    pipeline_class = find_pipeline(model)
    settings = _writing_settings(model, pipeline_class, max_new_tokens, prefix, options, beams)
    pipeline = pipeline_class.from_pretrained(model, **settings)
    if pipeline_class is not TextToText:
        print(prompt, end="", flush=True)
    for piece in pipeline.stream(prompt, seed=seed) if pipeline.beams.num_beams == 1 else [pipeline(prompt)]:
        print(piece, end="", flush=True)
    print()


def _writing_settings(
    model: Path,
    pipeline_class: type,
    max_new_tokens: int | None,
    prefix: str | None,
    options: SamplingOptions,
    beams: BeamOptions,
) -> dict[str, Any]:
    """Arguments of a pipeline that writes texts, from flags; a checkpoint that answers texts may say what they do not.

    Raises:
        ValueError: a flag is set that the pipeline does not know.
    """
    from lmzoo.pipelines import TextGenerator, TextToText

    given = {
        name: value for name, value in (("max_new_tokens", max_new_tokens), ("prefix", prefix)) if value is not None
    }
    if options != _SAMPLING or pipeline_class is TextGenerator:
        given |= dataclasses.asdict(options)
    if beams != _BEAMS:
        given |= dataclasses.asdict(beams)
    if pipeline_class is TextGenerator and prefix is not None:
        raise ValueError(f"{model} continues texts, which takes no --prefix: put it in front of the prompt.")
    if given and pipeline_class not in (TextGenerator, TextToText):
        raise ValueError(
            f"{model} is served by {pipeline_class.__name__}, which generates no tokens: leave out the flags that say "
            "how."
        )
    return given


def predict(
    model: tyro.conf.Positional[Path],
    text: tyro.conf.Positional[tuple[str, ...]],
    question: str | None = None,
) -> None:
    """Label, tag, embed or complete texts, or answer a question from them: a line of JSON for each.

    Args:
        model: Directory of a checkpoint or of a run, with what it was trained for.
        text: The texts.
        question: What a model of question answering is to find in each text.
    """
    from lmzoo.pipelines import QuestionAnswerer, load_pipeline

    pipeline = load_pipeline(model)
    answers = isinstance(pipeline, QuestionAnswerer)
    if answers == (question is None):
        needs = "needs a --question" if answers else "takes no --question"
        raise ValueError(f"{model} is served by {type(pipeline).__name__}, which {needs}.")
    for result in pipeline([question] * len(text), text) if answers else pipeline(text):
        print(json.dumps(result, ensure_ascii=False, default=lambda vector: vector.tolist()))


def export(
    model: tyro.conf.Positional[Path],
    directory: tyro.conf.Positional[Path],
    version: int | None = None,
    max_new_tokens: int | None = None,
    prefix: str | None = None,
    weights: Weights | None = None,
    length: int | None = None,
    text: str = "pydoc",
    attention: bool = False,
    options: FlatSamplingOptions = _SAMPLING,
    beams: FlatBeamOptions = _BEAMS,
) -> None:
    """Write a SavedModel for TF Serving, strings in; texts, labels, spans or vectors out; or a .tflite file for phones.

    Args:
        model: Directory of a checkpoint or of a run. What it was trained for says what is served.
        directory: Where the versions go, such as saved_models/gpt; or a file, such as gpt.tflite.
        version: Number of the version; by default the one after the newest.
        max_new_tokens: The most tokens to generate for each string, if the model writes texts; by default 64, or what
            the checkpoint says.
        prefix: What stands in front of a text that is answered; by default what the checkpoint says.
        weights: Format of the weights in a .tflite file; by default float32.
        length: Tokens that a .tflite file reads, or keeps in its cache; by default the model's context length.
        text: Source of text that shows the ranges of activations, for int8-full.
        attention: Whether a SavedModel gives attention, of which `lmzoo demo` makes pictures.
        options: How tokens are chosen, if the model writes texts.
        beams: How a beam search goes, with more than one beam and temperature 0.
    """
    from lmzoo.pipelines import find_pipeline
    from lmzoo.training import export_checkpoint_tflite

    if directory.suffix == ".tflite":
        if (version, max_new_tokens, prefix, attention, options, beams) != (None, None, None, False, _SAMPLING, _BEAMS):
            raise ValueError(
                f"{directory} has neither version nor attention, and the program around it says how tokens are chosen."
            )
        print(export_checkpoint_tflite(model, directory, weights=weights or "float32", length=length, text=text))
        return
    if weights is not None or length is not None:
        raise ValueError(f"weights and length are for files that end in .tflite, but {directory} does not.")
    pipeline_class = find_pipeline(model)
    settings = _writing_settings(model, pipeline_class, max_new_tokens, prefix, options, beams)
    pipeline = pipeline_class.from_pretrained(model, **settings)
    print(pipeline.export(directory, version=version, attention=attention))


def verify(
    artefact: tyro.conf.Positional[tuple[Path, ...]],
    against: Path,
    text: str = "pydoc",
    tokens: int = 512,
    length: int = 64,
    max_difference: float | None = None,
    min_agreement: float | None = None,
    max_perplexity_change: float | None = None,
    json_file: Path | None = None,
) -> int:
    """Compare exported models with their checkpoint: outputs, perplexity, speed, size, memory. Status 1 if one is off.

    Args:
        artefact: SavedModels, .tflite files or checkpoints.
        against: Directory of the checkpoint or of the run that they were made of.
        text: Source of text to compare on: files, globs, *.jsonl, *.parquet, tfds:NAME, or pydoc.
        tokens: How many tokens of the text.
        length: Tokens a row.
        max_difference: The most that an output may differ; by default 0.001 in float32, and any with fewer bits.
        min_agreement: Least share of tokens or labels that are the same; by default 0.999, with fewer bits less.
        max_perplexity_change: The most that perplexity may grow, as a share; by default 0.01 in int8.
        json_file: Where the figures go, beside the table.
    """
    from lmzoo.training import UsageError, print_report, write_report
    from lmzoo.training import verify as run

    try:
        results = run(
            artefact,
            against,
            text=text,
            num_tokens=tokens,
            length=length,
            max_difference=max_difference,
            min_agreement=min_agreement,
            max_perplexity_change=max_perplexity_change,
        )
    except UsageError as error:
        print(f"lmzoo: {error}", file=sys.stderr)
        return 2
    print_report(results)
    if json_file is not None:
        write_report(results, json_file)
    return int(any(result["problems"] for result in results))


_COMMANDS: dict[str, Callable[..., int | None]] = {
    "prepare": prepare,
    "pretrain": pretrain,
    "finetune": finetune,
    "evaluate": evaluate,
    "generate": generate,
    "predict": predict,
    "export": export,
    "serve": serve,
    "demo": demo,
    "verify": verify,
    "plan": plan,
    "launch": launch,
}


def main(args: list[str] | None = None) -> None:
    """Runs a command. Exit status 2 for bad usage, 1 for a failure, which is told in one line."""
    try:
        sys.exit(
            tyro.extras.subcommand_cli_from_dict(
                _COMMANDS, prog="lmzoo", args=args, config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)
            )
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"lmzoo: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
