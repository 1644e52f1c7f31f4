"""The settings of a fine-tuning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

TaskName = Literal["classify", "multilabel", "regress", "tag", "answer", "embed", "text-to-text"]

SETTINGS_FILE = "finetune.json"
# What may change between a run and its continuation, and changes nothing of what is learnt.
FREE_SETTINGS = ("directory", "resolver", "virtual_cpus", "log_every", "keep", "verbose", "stall_seconds", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """All that a fine-tuning run depends on; also the flags of `lmzoo finetune`."""

    model: Path
    """Directory of the checkpoint to begin with: of an encoder, of a model that has been fine-tuned before, or of one
    with an encoder and a decoder for text-to-text."""
    task: TaskName = "classify"
    """What is learnt: one label for a text, several, numbers, a tag for each word, answers in a text, vectors, or to
    write a text for each."""
    train: tuple[str, ...]
    """Labelled examples: *.jsonl, *.json, *.csv, *.tsv, *.parquet, *.conll, or tfds:NAME@SPLIT."""
    validation: tuple[str, ...] = ()
    """The same, to choose the best epoch by; by default a share of the training part is held out."""
    test: tuple[str, ...] = ()
    """The same, looked at once, at the end. Its predictions are written down."""
    validation_fraction: float = 0.1
    """Share of the examples that is held out without a validation part; 0 trains on all and takes the last epoch."""
    directory: Path = Path("runs/finetune")
    """Where the run lies: checkpoints and logs. Started again with the same settings, it goes on."""

    text: str | None = None
    """Field of the text, by default text; of the words of a tag task, tokens; of the question of an answer task,
    question; of what a text-to-text task reads, source."""
    pair: str | None = None
    """Field of the second text, none by default; that of an embed task is pair, of an answer task context."""
    label: str | None = None
    """Field of the label, by default label; for these tasks tags, answers and target. Without one embed is
    contrastive."""
    labels: tuple[str, ...] = ()
    """All labels in the order of the model's outputs; by default those that occur, sorted."""
    max_score: float = 1.0
    """Score of an embed task that stands for a cosine of 1."""
    max_length: int | None = None
    """Tokens of an example; longer ones are cut, or read in parts for tags and answers. 128, and 384 for answers."""
    max_target_length: int = 128
    """Tokens of a target of a text-to-text task; longer ones are cut."""
    prefix: tuple[str, ...] = ()
    """Stands in front of each source text: one for all, or one for each of the sources that train names, each of which
    is a task of its own."""
    mixing_temperature: float = 1.0
    """Several tasks are drawn in proportion to their examples; above 1, more evenly."""
    mixing_cap: int | None = None
    """As many examples of a task count in that, at most."""
    packing: bool = False
    """Let several pairs of a text-to-text task share a row of max_length and max_target_length tokens."""
    stride: int | None = None
    """Tokens that two windows of a long context have in common, in an answer task: 128, or a third of short ones."""

    epochs: int = 3
    """The most passes over the training part."""
    max_steps: int | None = None
    """End after so many steps, if that is sooner; the learning rate has fallen by then."""
    batch_size: int = 32
    """Examples in a global batch, over all devices and micro-batches."""
    micro_batches: int = 1
    """Parts that each device splits its batch into, to save memory."""
    optimizer: Literal["adamw", "adafactor", "lamb", "lion", "muon"] = "adamw"
    """How gradients become updates."""
    learning_rate: float = 5e-5
    """At its peak."""
    embedding_rate: float = 1.0
    """Factor of the learning rate for token embeddings and a head of their size, in a text-to-text task; more than 1
    suits random weights."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    warmup_share: float = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Of matrices; biases and norms never decay."""
    l2_sp: float = 0.0
    """Decay of the encoder's weights towards what they are at the beginning, in place of weight_decay; 0 for none."""
    layer_decay: float = 1.0
    """Learning rate of each layer, as a share of that of the layer above it."""
    freeze: Literal["all"] | int | None = None
    """What is not trained: the embeddings and so many layers above them (0 for none), or all but the head."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradients."""
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    """Weight of each label in the loss; balanced lets all weigh the same together."""
    label_smoothing: float = 0.0
    """Share of the target spread over the labels, for classify, tag and text-to-text."""
    z_loss: float = 0.0
    """Factor of log(Z) ** 2 in the loss of a text-to-text task."""
    dropout_rate: float | None = None
    """In training, of the whole model; by default as the checkpoint says."""
    pooling: Literal["mean", "first"] = "mean"
    """How an embed task makes a vector of the tokens' ones."""
    temperature: float = 0.05
    """Of the contrastive loss of an embed task."""
    early_stopping: int | None = None
    """Epochs without a better validation score after which the run ends; none never ends it early."""
    metric: str | None = None
    """Score that the best epoch is chosen by; by default the one usual for the task. loss and mse: lower is better."""
    max_answer_length: int = 30
    """The most tokens of an answer."""
    num_beams: int = 1
    """How many texts a beam search follows, in a text-to-text task; 1 takes the most likely token each time."""
    length_penalty: float = 1.0
    """Of the beam search: above 0 longer texts are preferred, the more the higher."""
    max_new_tokens: int | None = None
    """The most tokens of a text that is written; by default max_target_length."""
    n_best: int = 1
    """How many answers to each question are written down."""
    no_answer_threshold: float | None = None
    """No answer comes first if its score exceeds the best answer's by more than this; by default 0 if some examples
    have no answer, else never."""
    dtype: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Precision of the computation; weights are float32."""
    seed: int = 0
    """Of the new head, the held-out part, the order of the examples and dropout."""

    strategy: Literal["auto", "one", "mirrored", "multiworker", "tpu"] = "auto"
    """Devices: one, all GPUs of this machine, those of all machines, all cores of a TPU; auto takes all there are."""
    resolver: Literal["auto", "tf_config", "slurm", "gce", "kubernetes"] = "auto"
    """How multiworker finds the machines; auto takes TF_CONFIG, then Slurm."""
    virtual_cpus: int | None = None
    """Split the CPU into so many devices, to try mirrored without GPUs."""
    jit_compile: bool = False
    """Compile the step with XLA, once for each width of a batch: for GPUs."""
    remat: Literal["block"] | None = None
    """Compute the inside of each block again going backward, instead of keeping it: less memory, a third more time."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    stall_seconds: float = 120.0
    """Seconds without a step after which it is told what the run waits for, and again after as many."""
    keep: int = 1
    """How many of the newest checkpoints are kept, beside the best."""
    verbose: Literal["auto", "0", "1", "2"] = "auto"
    """Keras's progress: 0 none, 1 a bar, 2 a line for each epoch."""

    _FIELDS: ClassVar[dict[str, tuple[str, str | None, str | None]]] = {
        "classify": ("text", None, "label"),
        "multilabel": ("text", None, "label"),
        "regress": ("text", None, "label"),
        "tag": ("tokens", None, "tags"),
        "answer": ("question", "context", "answers"),
        "embed": ("text", "pair", None),
        "text-to-text": ("source", None, "target"),
    }

    def __post_init__(self) -> None:
        counts = (
            "epochs",
            "batch_size",
            "micro_batches",
            "max_steps",
            "early_stopping",
            "n_best",
            "max_answer_length",
            "max_length",
            "max_target_length",
            "max_new_tokens",
            "mixing_cap",
            "num_beams",
        )
        for name in (*counts, "log_every", "keep"):
            self._check(name, "an integer of 1 or more", lambda value: isinstance(value, int) and value >= 1)
        for name in (
            "learning_rate",
            "embedding_rate",
            "max_score",
            "temperature",
            "mixing_temperature",
            "stall_seconds",
        ):
            self._check(name, "above 0", lambda value: value > 0.0)
        for name in ("weight_decay", "l2_sp", "z_loss"):
            self._check(name, "0 or more", lambda value: value >= 0)
        for name in ("validation_fraction", "warmup_share", "label_smoothing", "dropout_rate"):
            self._check(name, "in [0, 1)", lambda value: 0.0 <= value < 1.0)
        self._check("stride", "0 or more", lambda value: value >= 0)
        self._check("layer_decay", "in (0, 1]", lambda value: 0.0 < value <= 1.0)
        self._check("train", "the name of a source at least", bool)
        if self.task not in self._FIELDS:
            raise ValueError(f"FinetuneConfig.task is {self.task!r}, but must be one of {', '.join(self._FIELDS)}.")
        if self.early_stopping is not None and not self.validation and not self.validation_fraction:
            raise ValueError("FinetuneConfig.early_stopping needs a validation part, but validation_fraction is 0.")
        if self.task == "tag" and self.pair is not None:
            raise ValueError(f"FinetuneConfig.pair is {self.pair!r}, but words have no second text: leave it out.")
        if self.task == "text-to-text":
            self._check_text_to_text()
        elif self.embedding_rate != 1.0:
            raise ValueError(
                f"FinetuneConfig.embedding_rate is {self.embedding_rate!r}, but only text-to-text has it: leave it out."
            )
        if self.class_weights is not None and self.task not in ("classify", "tag"):
            raise ValueError(
                f"FinetuneConfig.class_weights is {self.class_weights!r}, but {self.task} has no classes to weigh."
            )

    def _check_text_to_text(self) -> None:
        for name, usual in (("pair", None), ("freeze", None), ("layer_decay", 1.0), ("l2_sp", 0.0)):
            if (value := getattr(self, name)) != usual:
                raise ValueError(
                    f"FinetuneConfig.{name} is {value!r}, but text-to-text has no use for it: leave it out."
                )
        for name in ("train", "validation", "test"):
            sources = len(getattr(self, name))
            if sources and len(self.prefix) > 1 and len(self.prefix) != sources:
                raise ValueError(
                    f"FinetuneConfig.prefix has {len(self.prefix)} prefixes, but {name} has {sources} sources: give "
                    "one prefix for all, or one for each."
                )

    @property
    def fields(self) -> tuple[str, str | None, str | None]:
        """Names of the fields of the text, the second text and the label, as given or as usual for the task."""
        text, pair, label = self._FIELDS[self.task]
        return self.text or text, self.pair or pair, self.label or label

    @property
    def length(self) -> int:
        """`max_length`, as given or as usual for the task."""
        return self.max_length or (384 if self.task == "answer" else 128)

    def _check(self, name: str, rule: str, is_right: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        optional = name in _OPTIONAL and value is None
        if not optional and not is_right(value):
            raise ValueError(f"FinetuneConfig.{name} is {value!r}, but must be {rule}.")


_OPTIONAL = ("max_length", "max_steps", "max_new_tokens", "mixing_cap", "stride", "early_stopping", "dropout_rate")
