"""The settings of a pretraining run, and how they are kept in its directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from lmzoo.files import write_whole
from lmzoo.training.objectives import ObjectiveName

_FILE = "pretrain.json"
# What may change between a run and its continuation, and changes nothing of what is learnt unless something goes wrong.
FREE_SETTINGS = (
    *("directory", "resolver", "virtual_cpus", "log_every", "keep", "steps_per_execution", "verbose"),
    *("checkpoint_every", "max_skipped", "spike_factor", "stall_seconds"),
)
# What may change too, but changes the order in which numbers are added up: said, and no more.
_ROUNDING = ("strategy", "micro_batches", "jit_compile", "remat")

_MAY_BE_NONE = ("checkpoint_every", "num_sentinels", "seq_length", "long_seq_length", "long_batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All that a pretraining run depends on; also the flags of `lmzoo pretrain`."""

    directory: Path = Path("runs/pretrain")
    """Where the run lies: corpus, checkpoints and logs. Started again with the same settings, it goes on."""
    source: tuple[str, ...] = ("pydoc",)
    """Text: files, globs, *.jsonl, *.parquet, tfds:NAME, or pydoc (the help and docstrings of Python itself)."""
    corpus: Path | None = None
    """Directory written by `lmzoo prepare`, instead of a source."""
    tokenizer: str = "auto"
    """Kind to train on the source (bpe, wordpiece, unigram, char or byte), or a directory or file to load; auto trains
    the kind that is usual for the architecture."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out."""

    preset: str = "gpt2-nano"
    """Shape of the model."""
    vocab_size: int | None = None
    """Size of a tokenizer that is trained; by default that of the preset."""
    num_sentinels: int | None = None
    """Tokens of a tokenizer that is trained which mark spans; by default 100 for T5, 125 for bytes, or none."""
    context_length: int | None = None
    """Positions of the model; by default those of the preset."""
    num_layers: int | None = None
    """Instead of the preset's; of the encoder, where there is a decoder too."""
    num_decoder_layers: int | None = None
    """Instead of the preset's."""
    num_heads: int | None = None
    """Instead of the preset's."""
    head_dim: int | None = None
    """Instead of the preset's, in a T5; elsewhere a head has its share of model_dim."""
    model_dim: int | None = None
    """Instead of the preset's."""
    feedforward_dim: int | None = None
    """Instead of the preset's."""
    dropout_rate: float = 0.0
    """In training; 0 suits a text that is read only a few times."""

    objective: ObjectiveName = "auto"
    """What is learnt: the next token (causal); hidden ones (mlm), alone or with next-sentence or sentence-order
    prediction; by an encoder with a decoder, spans that are missing (span, or ul2 for its mixture), how a text goes on
    (prefix), or a text (decoder). auto is the architecture's own: mlm for encoders, span for T5."""
    mask_rate: float = 0.15
    """Share of the tokens that masked LM hides."""
    mask_unit: Literal["token", "word", "span"] = "token"
    """What is hidden at a time: tokens, whole words, or spans of 1 to 10 words."""
    noise_density: float = 0.15
    """Share of the tokens that span corruption takes out."""
    mean_span_length: float | None = None
    """Tokens that it takes out in a row, on average; by default 3, or 20 bytes."""
    mode_tokens: bool = False
    """Whether UL2 begins what is read with a token that says which of its denoisers it is for."""
    packing: Literal["stream", "pad", "best-fit"] | None = None
    """How documents become rows: one after the other, one a row, or as many whole ones as a row holds; by default
    stream for causal LMs and for one long text, best-fit for masked LM and T5, and pad for pairs of sentences and for
    decoder."""
    seq_length: int | None = None
    """Tokens a row, of what an encoder with a decoder reads: what is written is as long as it takes. By default as many
    as the model has positions."""
    long_seq_length: int | None = None
    """Tokens a row in a second phase, such as 512 after 128; by default there is none."""
    long_share: float = 0.1
    """Share of the steps that are of the second phase, the last ones."""
    long_batch_size: int | None = None
    """Rows of a global batch in the second phase; by default so many that it has about as many tokens as before."""
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
    embedding_rate: float = 1.0
    """Factor of the learning rate for token embeddings and a head of their size; more than 1 suits a T5 of random
    weights, whose embeddings are large."""
    schedule: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt", "inverse_sqrt_flat"] = "cosine"
    """How the learning rate falls after the warm-up; flat is at its peak from the first step on, as T5's."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0, or is at its peak before an inverse square root."""
    final_learning_rate: float = 0.1
    """At the end, as a share of the peak."""
    weight_decay: float = 0.1
    """Of matrices; biases and norms never decay."""
    beta_2: float = 0.95
    """Of AdamW and LAMB: memory of the squared gradients."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradients."""
    ema_momentum: float | None = None
    """Of a running average of the weights, such as 0.999, which is then what is evaluated and published."""
    label_smoothing: float = 0.0
    """Share of the target spread over the vocabulary."""
    z_loss: float = 0.0
    """Factor of log(Z) ** 2."""
    dtype: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Precision of the computation; weights are float32."""
    seed: int = 0
    """Of the weights, the order of the rows and dropout."""

    strategy: Literal["auto", "one", "mirrored", "multiworker", "tpu"] = "auto"
    """Devices: one, all GPUs of this machine, those of all machines, all cores of a TPU; auto takes all there are."""
    resolver: Literal["auto", "tf_config", "slurm", "gce", "kubernetes"] = "auto"
    """How multiworker finds the machines; auto takes TF_CONFIG, then Slurm."""
    virtual_cpus: int | None = None
    """Split the CPU into so many devices, to try mirrored without GPUs."""
    jit_compile: bool = False
    """Compile the step with XLA: faster on GPUs, and on CPUs for very small models."""
    remat: Literal["block"] | None = None
    """Compute the inside of each block again going backward, instead of keeping it: less memory, a third more time."""
    steps_per_execution: int = 1
    """Steps that run between two looks of Python at them."""
    evaluate_every: int = 250
    """Steps between evaluations; a checkpoint is written each time."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, if there are to be more than those."""
    evaluation_batches: int | None = 100
    """The most batches of each of them; none is all of the validation part. The last one takes all."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    max_skipped: int = 20
    """Steps in a row without a finite gradient after which the run ends; looked at with each record."""
    spike_factor: float | None = None
    """If the loss of a record exceeds so many times the median of the 50 before it, go back to the newest checkpoint,
    and on from there with the examples that come after."""
    stall_seconds: float = 120.0
    """Seconds without a step after which it is told what the run waits for, and again after as many."""
    keep: int = 2
    """How many of the newest checkpoints are kept, beside the best."""
    verbose: Literal["auto", "0", "1", "2"] = "auto"
    """Keras's progress: 0 none, 1 a bar, 2 a line for each evaluation."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "micro_batches",
            "seq_length",
            "long_seq_length",
            "long_batch_size",
            "steps_per_execution",
            "evaluate_every",
            "checkpoint_every",
            "num_sentinels",
            "log_every",
            "max_skipped",
            "keep",
        ):
            value = getattr(self, name)
            if (value is not None or name not in _MAY_BE_NONE) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"PretrainConfig.{name} is {value!r}, but must be an integer of 1 or more.")
        for name in ("validation_fraction", "noise_density", "long_share"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"PretrainConfig.{name} is {getattr(self, name)}, but must lie in (0, 1).")
        if not 0.0 < self.mask_rate <= 1.0:
            raise ValueError(f"PretrainConfig.mask_rate is {self.mask_rate}, but must lie in (0, 1].")
        if self.mean_span_length is not None and not self.mean_span_length >= 1.0:
            raise ValueError(f"PretrainConfig.mean_span_length is {self.mean_span_length}, but must be 1 or more.")
        if not self.embedding_rate > 0.0:
            raise ValueError(f"PretrainConfig.embedding_rate is {self.embedding_rate}, but must be above 0.")
        if self.ema_momentum is not None and not 0.0 < self.ema_momentum < 1.0:
            raise ValueError(f"PretrainConfig.ema_momentum is {self.ema_momentum}, but must lie in (0, 1).")
        if self.spike_factor is not None and self.spike_factor <= 1.0:
            raise ValueError(f"PretrainConfig.spike_factor is {self.spike_factor}, but must be above 1.")
        if self.stall_seconds <= 0.0:
            raise ValueError(f"PretrainConfig.stall_seconds is {self.stall_seconds}, but must be above 0.")
        if not self.source and self.corpus is None:
            raise ValueError("PretrainConfig.source is empty: name a text, or a prepared corpus.")


def is_known(
    config: Any,
    *,
    has_checkpoints: bool,
    say: Callable[[str], None],
    file: str = _FILE,
    free: Sequence[str] = FREE_SETTINGS,
) -> bool:
    """Whether what lies in the run's directory was made with these settings.

    Args:
        config: the settings of a recipe, with a `directory`.
        has_checkpoints: whether there are checkpoints of the run.
        say: told what may change and has changed.
        file: that the settings are kept in.
        free: settings that may change without a word.

    Raises:
        ValueError: it was made with others, and there are checkpoints of them.
    """
    directory = Path(config.directory)
    path = directory / file
    before: dict[str, Any] = {}
    if path.exists():
        try:
            before = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove the run {directory}, or choose another.") from None
    changed = {
        name: f"{name} was {before.get(name)!r} and is {value!r}"
        for name, value in _as_json(config).items()
        if before.get(name) != value and name not in free
    }
    told = [changed.pop(name) for name in _ROUNDING if name in changed]
    if not changed:
        if told and has_checkpoints:
            say(f"changed since the run began: {'; '.join(told)}. The examples of each step stay the same")
        return True
    if before and has_checkpoints:
        raise ValueError(
            f"{directory} holds a run with other settings: {'; '.join(changed.values())}. Choose another directory, or "
            "remove that one."
        )
    return False


def write_settings(config: Any, file: str = _FILE) -> None:
    """Writes the settings down in the run's directory."""
    directory = Path(config.directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / file, json.dumps(_as_json(config), indent=2) + "\n")


def _as_json(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values
