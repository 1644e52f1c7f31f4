"""Fine-tuning: from a checkpoint and labelled examples to a model for a task, in one call that can be stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from lmzoo import checkpoints
from lmzoo.checkpoints.card import README
from lmzoo.data.labelled import Examples, LabelledBatches
from lmzoo.data.pipeline import permute
from lmzoo.data.records import Records, read_records
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.engine.optimizers import make_optimizer
from lmzoo.engine.schedules import make_schedule
from lmzoo.engine.strategy import BatchPlan, is_chief, make_strategy, num_workers, wait_for_all
from lmzoo.files import write_whole
from lmzoo.training.callbacks import MetricsLog
from lmzoo.training.checkpointing import CheckpointStore, Progress
from lmzoo.training.evaluation import share_out
from lmzoo.training.finetune_card import make_card
from lmzoo.training.finetune_recipe import FinetunedModel, TaskRecipe
from lmzoo.training.finetune_settings import FREE_SETTINGS, SETTINGS_FILE, FinetuneConfig
from lmzoo.training.finetune_tasks import RECIPES
from lmzoo.training.guards import LossGuard, StallWatch, StopOnTermination, Termination, told_of_lost_workers
from lmzoo.training.metrics import Scores
from lmzoo.training.prediction import Predictor, mean_loss, static_width
from lmzoo.training.settings import is_known, write_settings

_MOST_SKIPPED = 20


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What a run leaves behind.

    Args:
        directory: of the run. metrics.json holds the scores, predictions.jsonl what the model says of the test part.
        checkpoint: that of the best epoch, in the Hugging Face layout with its tokenizer.
        metrics: scores of its weights on each part that there is, "validation" and "test".
        model: with these weights.
        tokenizer: its tokenizer.
    """

    directory: Path
    checkpoint: Path
    metrics: dict[str, Scores]
    model: FinetunedModel
    tokenizer: Tokenizer


def finetune(
    config: FinetuneConfig | None = None, *, say: Callable[[str], None] = print, **fields: Any
) -> FinetuneResult:
    """Trains a model for a task, from a pretrained checkpoint and labelled examples.

    ```python
    result = lmzoo.finetune(model="bert", train=("reviews.jsonl",), test=("test.jsonl",), epochs=3)
    print(result.metrics["test"]["accuracy"])
    ```

    It is evaluated after each epoch; the best checkpoint and the newest are kept. Stopped at any moment and called
    again with the same settings, it goes on from the newest checkpoint as if it had never been stopped. At SIGTERM it
    writes a checkpoint and ends the process with status 0. Of several workers, which must share the directory, one
    writes.

    Args:
        config: the settings; or give its fields as keywords.
        say: told what happens, a line at a time, on one worker.
        fields: fields of `FinetuneConfig`.

    Raises:
        ValueError: a setting is out of range, an example is not as said, or the directory holds another run.
        FileNotFoundError: a source is missing.
        FloatingPointError: the loss is not finite, many times in a row or on the validation part.
        OSError: a file could not be written, or another worker is gone. The checkpoints that are there are whole.
    """
    if config is None:
        for name in _PARTS:
            if isinstance(source := fields.get(name), str | os.PathLike):
                fields[name] = (os.fspath(source),)
        config = FinetuneConfig(**fields)
    else:
        config = dataclasses.replace(config, **fields)
    with Termination() as termination, told_of_lost_workers():
        return _Run(config, termination, say).finish()


class _Run:
    """A run, from where it stands to its end; `progress` is what its newest checkpoint holds."""

    def __init__(self, config: FinetuneConfig, termination: Termination, say: Callable[[str], None]) -> None:
        self.config, self.termination, self.tell = config, termination, say
        self.strategy = make_strategy(config.strategy, resolver=config.resolver, virtual_cpus=config.virtual_cpus)
        termination.listen()
        self.is_chief = is_chief(self.strategy)
        self.say = say if self.is_chief else lambda line: None
        self.plan = BatchPlan.of_global(config.batch_size, self.strategy, config.micro_batches)
        self.directory = Path(config.directory)
        self.store = CheckpointStore(self.directory, keep=config.keep)
        if self.is_chief:
            has_checkpoints = bool(self.store.steps())
            is_known(config, has_checkpoints=has_checkpoints, say=self.say, file=SETTINGS_FILE, free=FREE_SETTINGS)
        self._read()
        if self.is_chief:
            write_settings(config, SETTINGS_FILE)
        wait_for_all(self.strategy)
        with self.strategy.scope():
            self.model = self._make_model()
        self.progress = self.store.restore(self.model) or Progress(replicas=self.plan.replicas)
        self.predictor = Predictor(self.model, self.recipe.outputs, batch_size=config.batch_size, **self.widths)
        self.guard = LossGuard(max_skipped=_MOST_SKIPPED, spike_factor=None, losses=self.progress.recent_losses)
        self.log = MetricsLog(
            self.directory if self.is_chief else None,
            every=config.log_every,
            tokens_at=lambda step: step * int(self.training.lengths.sum() / self.steps_per_epoch),
            check=self._check_record,
        )
        self.log.go_back_to(self.progress.step, evaluated=self.progress.validation_loss is not None)

    def _read(self) -> None:
        """Reads and encodes all parts."""
        config = self.config
        directory = checkpoints.find_checkpoint(config.model)
        self.tokenizer = Tokenizer.from_pretrained(directory)
        records = {name: read_records(source) for name in _PARTS if (source := getattr(config, name))}
        if "validation" not in records and config.validation_fraction:
            records["train"], records["validation"] = _split(records["train"], config.validation_fraction, config.seed)
        self.records = records
        known = (
            records["train"] if config.labels else Records([row for name in _PARTS for row in records.get(name, ())])
        )
        self.recipe: TaskRecipe = RECIPES[config.task](config, known)
        self.store.extras = self._write_beside
        length = self.recipe.longest(directory)
        self.widths: dict[str, Any] = {
            name: static_width(self.strategy, longest)
            for name, longest in (("width", length), ("decoder_width", config.max_target_length))
        }
        self.training = self.recipe.encode_training(records["train"], self.tokenizer, length)
        self.parts = {
            name: self.recipe.encode(part, self.tokenizer, length) for name, part in records.items() if name != "train"
        }
        self.steps_per_epoch = self._batches(self.training).batches_per_epoch
        self.steps = min(config.epochs * self.steps_per_epoch, config.max_steps or sys.maxsize)

    def _write_beside(self, directory: Path) -> None:
        """Writes what a checkpoint holds beside the model."""
        self.tokenizer.save_pretrained(directory)
        if settings := self.recipe.generation_config(self.tokenizer):
            write_whole(directory / "generation_config.json", json.dumps(settings, indent=2) + "\n")

    def _make_model(self) -> FinetunedModel:
        """The model to train, compiled, with the variables of its optimizer; made under the scope of its strategy."""
        config = self.config
        keras.utils.set_random_seed(config.seed)
        model = self.recipe.make_model(self.say)
        schedule = make_schedule(
            config.schedule,
            config.learning_rate,
            total_steps=self.steps,
            warmup_steps=min(int(config.warmup_share * self.steps), self.steps - 1),
            final=0.0,
        )
        more: dict[str, Any] = {"beta_2": 0.999} if config.optimizer in ("adamw", "lamb") else {}
        if config.optimizer == "muon" and config.dtype == "mixed_bfloat16":
            more["orthogonal_dtype"] = "bfloat16"
        more |= self.recipe.optimizer_arguments(model)
        model.compile(
            make_optimizer(
                config.optimizer, schedule, weight_decay=config.weight_decay, global_clipnorm=config.clip_norm, **more
            ),
            micro_batches=config.micro_batches,
            jit_compile=config.jit_compile,
            remat=config.remat,
            **self.recipe.compile_arguments(self.training),
        )
        model.optimizer.build(model.trainable_variables)
        model.card = make_card(config)
        return model

    def finish(self) -> FinetuneResult:
        """Trains, evaluates and writes checkpoints until all epochs are done, or enough have brought nothing better."""
        self._introduce()
        while True:
            step = self.progress.step
            is_due = "validation" in self.parts and step and (step % self.steps_per_epoch == 0 or step == self.steps)
            if is_due and self.progress.validation_loss is None:
                self._evaluate()
            if step >= self.steps or self._is_enough():
                break
            self._train()
        self.log.close()
        wait_for_all(self.strategy)
        best_step = self.progress.best_step or self.progress.step
        best = self.store.path(best_step)
        if best_step != self.progress.step:
            self.model.load_pretrained_weights(best)
        metrics: dict[str, Scores] = {}
        for name in ("validation", "test"):
            if name in self.parts:
                metrics[name] = self._conclude(name)
        if self.is_chief:
            content: dict[str, Any] = {"checkpoint": best.name, "epoch": self._epoch(best_step), **metrics}
            write_whole(self.directory / "metrics.json", json.dumps(content, indent=2) + "\n")
            self.model.card = make_card(self.config, metrics)
            write_whole(best / README, self.recipe.readme(self.model, checkpoints.read_config(best)))
        self.say(f"best checkpoint, of epoch {self._epoch(best_step)}: {best}")
        wait_for_all(self.strategy)
        return FinetuneResult(self.directory, best, metrics, self.model, self.tokenizer)

    def _introduce(self) -> None:
        """Says what is going to happen."""
        model, progress = self.model, self.progress
        workers = num_workers(self.strategy)
        trainable = sum(math.prod(variable.shape) for variable in model.trainable_variables)
        self.say(
            f"{type(model).__name__} on {self.config.model}: {model.count_params():,} parameters, {trainable:,} "
            f"of them trained, {self.config.dtype}, {self.plan}" + (f", on {workers} workers" if workers > 1 else "")
        )
        sizes = ", ".join(f"{len(self.records[name]):,} {name}" for name in _PARTS if name in self.records)
        labels = f"; labels: {', '.join(self.recipe.labels[:20])}" if self.recipe.labels else ""
        self.say(f"examples: {sizes}; {self.steps} steps in {self.config.epochs} epochs{labels}")
        if progress.step:
            self.say(f"going on after step {progress.step}, from {self.store.path(progress.step)}")

    def _batches(self, examples: Examples, **more: Any) -> LabelledBatches:
        return LabelledBatches(examples, self.config.batch_size, seed=self.config.seed, **self.widths, **more)

    def _epoch(self, step: int) -> int:
        return -(-step // self.steps_per_epoch)

    def _is_enough(self) -> bool:
        """Whether the last epochs have brought nothing better."""
        patience, best = self.config.early_stopping, self.progress.best_step
        if patience is None or best is None or self.progress.validation_loss is None:
            return False
        return self._epoch(self.progress.step) - self._epoch(best) >= patience

    def _train(self) -> None:
        """Trains up to the end of the epoch, and writes a checkpoint."""
        before = self.progress
        epoch = before.step // self.steps_per_epoch
        stop = min((epoch + 1) * self.steps_per_epoch, self.steps)
        part = self._batches(self.training, start=before.step, num_batches=stop - before.step)
        watch = StallWatch(
            self.config.stall_seconds,
            self.tell,
            lambda number: f"batch {before.step + number} of the order of seed {self.config.seed}",
            parts=self.plan.replicas // num_workers(self.strategy),
        )
        stopper = StopOnTermination(self.termination)
        verbose = self.config.verbose if self.config.verbose == "auto" else int(self.config.verbose)
        with self.termination.held():
            try:
                self.model.fit(
                    share_out(part, self.strategy, watch.note_part),
                    shuffle=False,
                    steps_per_epoch=stop - before.step,
                    initial_epoch=epoch,
                    epochs=epoch + 1,
                    verbose=verbose if self.is_chief else 0,
                    callbacks=[self.log, watch, stopper],
                )
            finally:
                watch.stop()
            self.progress = dataclasses.replace(
                before,
                step=self.log.step,
                next_example=self.log.step * self.config.batch_size,
                replicas=self.plan.replicas,
                validation_loss=None,
                recent_losses=tuple(self.guard.losses),
            )
            if self.is_chief:
                self.store.save(self.model, self.progress)
        if stopper.stopped:
            wait_for_all(self.strategy)
            step = self.progress.step
            self.say(f"asked to end: step {step} is in {self.store.path(step)}, and the same command goes on from it")
            raise SystemExit(0)

    def _evaluate(self) -> None:
        """Scores the weights on the validation part, and adds that to their checkpoint."""
        step = self.progress.step
        examples = self.parts["validation"]
        loss = mean_loss(self.model, self._batches(examples, shuffle=False))
        if not math.isfinite(loss):
            if self.is_chief:
                self.store.discard(step)
            raise FloatingPointError(f"the validation loss is {loss} at step {step}. Try a lower learning rate.")
        scores = {"loss": loss, **self.recipe.scores(examples, self.predictor(examples, self.recipe.per_token))}
        self.progress = self.progress.evaluated(loss, rank=self.recipe.rank(scores))
        self.log.write({"step": step, **{f"validation_{name}": value for name, value in scores.items()}})
        self.say(f"epoch {self._epoch(step)}, step {step}: {_told(scores)}")
        if self.is_chief:
            self.store.save_evaluation(self.progress)

    def _conclude(self, name: str) -> Scores:
        """Scores the best weights on a part; writes what they say of the test part down."""
        examples = self.parts[name]
        outputs = self.predictor(examples, self.recipe.per_token)
        scores = self.recipe.scores(examples, outputs)
        self.say(f"{name}: {_told(scores)}")
        if name == "test" and self.is_chief:
            rows = zip(self.records[name], self.recipe.predictions(examples, outputs), strict=True)
            lines = (json.dumps({**record, **said}, ensure_ascii=False, default=str) for record, said in rows)
            write_whole(self.directory / "predictions.jsonl", "".join(line + "\n" for line in lines))
        return scores

    def _check_record(self, step: int, loss: float) -> None:
        self.guard.check(self.model, step, loss, lambda first, last: f"batches {first - 1} to {last - 1}")


_PARTS = ("train", "validation", "test")


def _split(records: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    """Holds out a share of the records, chosen by the seed; both parts stay in order."""
    count = len(records)
    held_out = max(1, round(fraction * count))
    if held_out == count:
        raise ValueError(f"{records.places[0]}: there is one example, too few to hold any out; name a validation part")
    order = permute(np.arange(count), count, seed, np.full(count, _SPLIT))
    return records.take(sorted(order[held_out:])), records.take(sorted(order[:held_out]))


_SPLIT = 2**32 - 1  # Stands where the number of an epoch does.


def _told(scores: Scores) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
