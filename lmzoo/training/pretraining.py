"""Pretraining: from text to a trained checkpoint, in one call that can be stopped and started again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import keras

from lmzoo.config import ModelConfig
from lmzoo.data.corpus import Corpus
from lmzoo.data.objectives import Causal
from lmzoo.data.pipeline import Batches
from lmzoo.data.prepare import prepare
from lmzoo.data.sources import read_documents
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.engine.optimizers import make_optimizer
from lmzoo.engine.schedules import make_schedule
from lmzoo.engine.strategy import BatchPlan, make_strategy
from lmzoo.models import LanguageModel, find_preset
from lmzoo.training.callbacks import MetricsLog, measure_peak_flops
from lmzoo.training.checkpointing import CheckpointStore, Progress
from lmzoo.training.evaluation import Evaluation, evaluate_model

_TOKENIZER_KINDS = ("bpe", "wordpiece", "unigram", "char")
_SETTINGS = "pretrain.json"
# What may change between a run and its continuation without changing what is learnt.
_FREE = ("directory", "strategy", "log_every", "keep", "steps_per_execution", "verbose")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All that a pretraining run depends on; also the flags of `lmzoo pretrain`."""

    directory: Path = Path("runs/pretrain")
    """Where the run lies: corpus, checkpoints and logs. Started again with the same settings, it goes on."""
    source: tuple[str, ...] = ("pydoc",)
    """Text: files, globs, *.jsonl, *.parquet, tfds:NAME, or pydoc (the help and docstrings of Python itself)."""
    corpus: Path | None = None
    """Directory written by `lmzoo prepare`, instead of a source."""
    tokenizer: str = "bpe"
    """Kind to train on the source (bpe, wordpiece, unigram or char), or a directory or file to load."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""

    preset: str = "gpt2-nano"
    """Shape of the model."""
    vocab_size: int | None = None
    """Size of a tokenizer that is trained; by default that of the preset."""
    context_length: int | None = None
    """Positions of the model, and tokens a row; by default those of the preset."""
    num_layers: int | None = None
    """Instead of the preset's."""
    num_heads: int | None = None
    """Instead of the preset's."""
    model_dim: int | None = None
    """Instead of the preset's."""
    dropout_rate: float = 0.0
    """In training; 0 suits a text that is read only a few times."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Rows in a global batch, over all devices and micro-batches."""
    micro_batches: int = 1
    """Parts that each device splits its batch into, to save memory."""
    separate_documents: bool = True
    """Whether attention keeps to a document. If not, the corpus is one long text."""
    optimizer: Literal["adamw", "adafactor", "lamb", "lion", "muon"] = "adamw"
    """How gradients become updates."""
    learning_rate: float = 1e-3
    """At its peak."""
    schedule: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    final_learning_rate: float = 0.1
    """At the end, as a share of the peak."""
    weight_decay: float = 0.1
    """Of matrices; biases and norms never decay."""
    beta_2: float = 0.95
    """Of AdamW and LAMB: memory of the squared gradients."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradients."""
    label_smoothing: float = 0.0
    """Share of the target spread over the vocabulary."""
    z_loss: float = 0.0
    """Factor of log(Z) ** 2."""
    dtype: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Precision of the computation; weights are float32."""
    seed: int = 0
    """Of the weights, the order of the rows and dropout."""

    strategy: Literal["auto", "one", "mirrored"] = "auto"
    """Devices: one, or all GPUs of this machine; auto takes all there are."""
    jit_compile: bool = False
    """Compile the step with XLA: faster on GPUs, and on CPUs for very small models."""
    steps_per_execution: int = 1
    """Steps that run between two looks of Python at them."""
    evaluate_every: int = 250
    """Steps between evaluations; a checkpoint is written each time."""
    evaluation_batches: int | None = 100
    """The most batches of each of them; none is all of the validation part. The last one takes all."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    keep: int = 2
    """How many of the newest checkpoints are kept, beside the best."""
    verbose: Literal["auto", "0", "1", "2"] = "auto"
    """Keras's progress: 0 none, 1 a bar, 2 a line for each evaluation."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "micro_batches",
            "steps_per_execution",
            "evaluate_every",
            "log_every",
            "keep",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PretrainConfig.{name} is {value!r}, but must be an integer of 1 or more.")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"PretrainConfig.validation_fraction is {self.validation_fraction}, but must lie in (0, 1)."
            )
        if not self.source and self.corpus is None:
            raise ValueError("PretrainConfig.source is empty: name a text, or a prepared corpus.")


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """What a run leaves behind.

    Args:
        directory: of the run.
        checkpoint: the best one by validation loss, in the Hugging Face layout with its tokenizer.
        steps: optimizer steps done, earlier processes included.
        validation: scores of the last weights on all of the validation part.
        model: the model after the last step.
        tokenizer: its tokenizer.
    """

    directory: Path
    checkpoint: Path
    steps: int
    validation: Evaluation
    model: LanguageModel
    tokenizer: Tokenizer


def pretrain(
    config: PretrainConfig | None = None, *, say: Callable[[str], None] = print, **fields: Any
) -> PretrainResult:
    """Trains a model on text, evaluates it as it goes, and keeps its best and its newest checkpoints.

    Stopped at any moment and called again with the same settings, it goes on from the newest checkpoint that is whole,
    with the examples that come next, as if it had never been stopped.

    Args:
        config: the settings; or give its fields as keywords.
        say: told what happens, a line at a time.
        fields: fields of `PretrainConfig`.

    Raises:
        ValueError: a setting is out of range, or the directory holds a run with other settings.
        FileNotFoundError: a source or a corpus is missing.
        FloatingPointError: the loss is not finite; the error names the step and the last good checkpoint.
        OSError: a file could not be written. The checkpoints that are there are whole.
    """
    config = dataclasses.replace(config, **fields) if config is not None else PretrainConfig(**fields)
    model_class, shape = find_preset(config.preset)
    directory = Path(config.directory)
    store = CheckpointStore(directory / "checkpoints", keep=config.keep)
    is_known = _is_known(config, directory, has_checkpoints=bool(store.steps()))
    tokenizer, training, validation = _data(config, shape, directory, is_known, say)
    _write_settings(config, directory)  # After the data: settings that are written down are those it was made with.
    store.extras = tokenizer.save_pretrained
    shape = _shape(config, shape, tokenizer)
    strategy = make_strategy(config.strategy)
    plan = BatchPlan.of_global(config.batch_size, strategy, config.micro_batches)
    with strategy.scope():
        model = _model(config, model_class, shape)
    progress = store.restore(model) or Progress()
    objective = Causal(separate_documents=config.separate_documents)

    def batches(corpus: Corpus, **limits: Any) -> Batches:
        return Batches(
            corpus, objective, seq_length=shape.context_length, batch_size=config.batch_size, seed=config.seed, **limits
        )

    held_out = batches(validation, shuffle=False, epochs=1)
    tokens_per_step = config.batch_size * shape.context_length
    peak = measure_peak_flops("bfloat16" if config.dtype == "mixed_bfloat16" else "float32") * plan.replicas
    flops = shape.training_flops_per_token(shape.context_length)
    say(f"{model_class.__name__} {config.preset}: {model.count_params():,} parameters, {config.dtype}, {plan}")
    say(
        f"{training.num_tokens:,} tokens of {training.num_documents:,} documents to train on, "
        f"{validation.num_tokens:,} of {validation.num_documents:,} held out; "
        f"{config.steps * tokens_per_step / training.num_tokens:.1f} passes in {config.steps} steps"
    )
    if progress.step:
        say(f"going on after step {progress.step}, from {store.path(progress.step)}")

    log = MetricsLog(
        directory,
        every=config.log_every,
        tokens_per_step=tokens_per_step,
        flops_per_token=flops,
        peak_flops=peak,
        first_step=progress.step,
    )
    verbose = config.verbose if config.verbose == "auto" else int(config.verbose)
    scores: Evaluation | None = None
    while progress.step < config.steps:
        stop = min(config.steps, (progress.step // config.evaluate_every + 1) * config.evaluate_every)
        part = batches(training, start_index=progress.next_example, num_examples=stop * config.batch_size)
        log.begin_round(progress.step)
        skipped = model.skipped_steps
        number = progress.step // config.evaluate_every
        model.fit(
            part.dataset(), shuffle=False, initial_epoch=number, epochs=number + 1, verbose=verbose, callbacks=[log]
        )
        is_last = stop == config.steps
        scores = evaluate_model(model, held_out, max_batches=None if is_last else config.evaluation_batches)
        log.write({"step": stop, **{f"validation_{name}": value for name, value in dataclasses.asdict(scores).items()}})
        say(f"step {stop}: validation loss {scores.loss:.4f}, perplexity {scores.perplexity:.2f}")
        _check_finite(scores.loss, model.skipped_steps - skipped, progress.step, stop, store, say)
        progress = _advance(progress, stop, stop * config.batch_size, scores.loss)
        store.save(model, progress)
        _point(directory / "last", store.path(progress.step))
        _point(directory / "best", store.path(progress.best_step or progress.step))
    log.close()
    scores = scores or evaluate_model(model, held_out)
    best = store.path(progress.best_step or progress.step)
    return PretrainResult(directory, best, progress.step, scores, model, tokenizer)


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


def _is_known(config: PretrainConfig, directory: Path, *, has_checkpoints: bool) -> bool:
    """Whether what lies in the directory was made with these settings.

    Raises:
        ValueError: it was made with others, and there are checkpoints of them.
    """
    path = directory / _SETTINGS
    values = _settings(config)
    before: dict[str, Any] = {}
    if path.exists():
        try:
            before = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove the run {directory}, or choose another.") from None
    changed = [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in values.items()
        if name not in _FREE and before.get(name) != value
    ]
    if not changed:
        return True
    if before and has_checkpoints:
        raise ValueError(
            f"{directory} holds a run with other settings: {'; '.join(changed)}. Choose another directory, or "
            "remove that one."
        )
    return False


def _settings(config: PretrainConfig) -> dict[str, Any]:
    """The settings as JSON holds them."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def _write_settings(config: PretrainConfig, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f"{_SETTINGS}.tmp"
    temporary.write_text(json.dumps(_settings(config), indent=2) + "\n", encoding="utf-8")
    temporary.replace(directory / _SETTINGS)


def _data(
    config: PretrainConfig, shape: ModelConfig, directory: Path, is_known: bool, say: Callable[[str], None]
) -> tuple[Tokenizer, Corpus, Corpus]:
    """The tokenizer, and the corpora to train and to validate on.

    A corpus of the run's own is made first, unless the one in its directory was made with the same settings.
    """
    prepared = config.corpus
    if prepared is None:
        prepared = directory / "corpus"
        if is_known and (prepared / "tokenizer").is_dir():
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
            overwrite=not is_known,
        )
    tokenizer = Tokenizer.from_pretrained(prepared / "tokenizer")
    return tokenizer, Corpus.open(prepared / "train", tokenizer), Corpus.open(prepared / "validation", tokenizer)


def _shape(config: PretrainConfig, shape: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    names = ("context_length", "num_layers", "num_heads", "model_dim", "dropout_rate")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return shape.replace(
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **given,
    )


def _model(config: PretrainConfig, model_class: type[LanguageModel], shape: ModelConfig) -> LanguageModel:
    """The model to train, compiled, with the variables of its optimizer."""
    keras.utils.set_random_seed(config.seed)
    model = model_class(shape, dtype=config.dtype)
    model.compile(
        _optimizer(config),
        micro_batches=config.micro_batches,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        jit_compile=config.jit_compile,
        steps_per_execution=config.steps_per_execution,
    )
    model.optimizer.build(model.trainable_variables)
    return model


def _optimizer(config: PretrainConfig) -> keras.optimizers.Optimizer:
    schedule = make_schedule(
        config.schedule,
        config.learning_rate,
        total_steps=config.steps,
        warmup_steps=min(config.warmup_steps, config.steps - 1),
        final=config.final_learning_rate,
    )
    betas: dict[str, Any] = {"beta_2": config.beta_2} if config.optimizer in ("adamw", "lamb") else {}
    return make_optimizer(
        config.optimizer, schedule, weight_decay=config.weight_decay, global_clipnorm=config.clip_norm, **betas
    )


def _check_finite(
    loss: float, skipped: int, start: int, stop: int, store: CheckpointStore, say: Callable[[str], None]
) -> None:
    """Stops a run that has lost its way; a few skipped steps are only told."""
    if math.isfinite(loss) and skipped < stop - start:
        if skipped:
            say(f"skipped {skipped} of {stop - start} steps, whose gradients were not finite")
        return
    what = f"the validation loss is {loss}" if not math.isfinite(loss) else "no gradient was finite"
    newest = store.path(start) if start else "none"
    raise FloatingPointError(
        f"{what} at step {stop}; the last good checkpoint is {newest}. Try a lower learning rate, or a longer warm-up."
    )


def _advance(progress: Progress, step: int, next_example: int, loss: float) -> Progress:
    is_best = progress.best_loss is None or loss < progress.best_loss
    return Progress(
        step=step,
        next_example=next_example,
        validation_loss=loss,
        best_step=step if is_best else progress.best_step,
        best_loss=loss if is_best else progress.best_loss,
    )


def _point(link: Path, target: Path) -> None:
    """Makes `link` a symbolic link to `target`, in one step."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    temporary.replace(link)
