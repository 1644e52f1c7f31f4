"""Pretraining: from text to a trained checkpoint, in one call that can be stopped and started again."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from lmzoo.config import ModelConfig
from lmzoo.data.corpus import Corpus
from lmzoo.data.objectives import Causal
from lmzoo.data.pipeline import Batches
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.engine.averaging import averaged_weights, swap_averages
from lmzoo.engine.optimizers import make_optimizer
from lmzoo.engine.schedules import make_schedule
from lmzoo.engine.strategy import BatchPlan, is_chief, make_strategy, num_workers, wait_for_all
from lmzoo.models import CausalLM, LanguageModel, find_preset
from lmzoo.training.callbacks import MetricsLog, measure_peak_flops
from lmzoo.training.checkpointing import CheckpointStore, Progress
from lmzoo.training.corpora import make_corpora, open_corpora
from lmzoo.training.evaluation import Evaluation, evaluate_model, share_out
from lmzoo.training.guards import LossGuard, LossSpikeError, StallWatch, StopOnTermination, Termination
from lmzoo.training.settings import PretrainConfig, is_known, write_settings

_MOST_TURNS = 10


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
    with the examples that come next, as if it had never been stopped; on other devices too. At SIGTERM it writes a
    checkpoint and ends the process with status 0. Of several workers, which must share the directory, one writes.

    Args:
        config: the settings; or give its fields as keywords.
        say: told what happens, a line at a time, on one worker.
        fields: fields of `PretrainConfig`.

    Raises:
        ValueError: a setting is out of range, or the directory holds a run with other settings.
        FileNotFoundError: a source or a corpus is missing.
        FloatingPointError: the loss is not finite, or jumps again and again; the error names the steps, the examples
            they were made of and the last good checkpoint.
        OSError: a file could not be written, or another worker is gone. The checkpoints that are there are whole.
    """
    config = dataclasses.replace(config, **fields) if config is not None else PretrainConfig(**fields)
    with Termination() as termination:
        try:
            return _Run(config, termination, say).finish()
        except (tf.errors.UnavailableError, tf.errors.DeadlineExceededError) as error:
            reason = next(iter(error.message.splitlines()), "")
            raise ConnectionError(
                f"lost another worker ({reason}). Start all of them again, to go on from the newest checkpoint."
            ) from error


class _Run:
    """A run, from where it stands to its end; `progress` is what its newest checkpoint holds."""

    def __init__(self, config: PretrainConfig, termination: Termination, say: Callable[[str], None]) -> None:
        self.config, self.termination, self.tell = config, termination, say
        self.strategy = make_strategy(config.strategy, resolver=config.resolver, virtual_cpus=config.virtual_cpus)
        termination.listen()
        self.is_chief = is_chief(self.strategy)
        self.say = say if self.is_chief else lambda line: None
        self.plan = BatchPlan.of_global(config.batch_size, self.strategy, config.micro_batches)
        self.directory = Path(config.directory)
        self.store = CheckpointStore(self.directory, keep=config.keep)
        model_class, shape = find_causal_preset(config.preset)
        if self.is_chief:
            known = is_known(config, has_checkpoints=bool(self.store.steps()), say=self.say)
            make_corpora(config, shape, known, self.say)
            write_settings(config)  # After the data: settings that are written down are those it was made with.
        wait_for_all(self.strategy)
        self.tokenizer, self.training, self.validation = open_corpora(config)
        self.store.extras = self.tokenizer.save_pretrained
        self.shape = shape.replace(
            vocab_size=self.tokenizer.vocab_size,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **given_shape(config),
        )
        with self.strategy.scope():
            self.model = make_model(config, model_class, self.shape)
        self.progress = self.store.restore(self.model) or Progress(replicas=self.plan.replicas)
        self.turns: collections.Counter[int] = collections.Counter()
        self.guard = LossGuard(
            max_skipped=min(config.max_skipped, config.steps),
            spike_factor=config.spike_factor,
            losses=self.progress.recent_losses,
        )
        peak = measure_peak_flops("bfloat16" if config.dtype == "mixed_bfloat16" else "float32")
        self.log = MetricsLog(
            self.directory if self.is_chief else None,
            every=config.log_every,
            tokens_per_step=config.batch_size * self.shape.context_length,
            flops_per_token=self.shape.training_flops_per_token(self.shape.context_length),
            peak_flops=peak * self.plan.replicas,
            check=self._check_record,
        )
        self.log.go_back_to(self.progress.step, evaluated=self.progress.validation_loss is not None)

    def finish(self) -> PretrainResult:
        """Trains, evaluates and writes checkpoints until all steps are done."""
        self._introduce()
        scores = None
        while True:
            step = self.progress.step
            is_due = step == self.config.steps or step % self.config.evaluate_every == 0
            if step and is_due and self.progress.validation_loss is None:
                scores = self._evaluate()
            if step >= self.config.steps:
                break
            self._train()
        self.log.close()
        wait_for_all(self.strategy)
        swap_averages(self.model.optimizer)
        scores = scores or evaluate_model(self.model, self._batches(self.validation, shuffle=False, epochs=1))
        best = self.store.path(self.progress.best_step or self.progress.step)
        self.say(
            f"validation loss {scores.loss:.4f} nats a token, {scores.bits_per_byte:.3f} bits per byte after step "
            f"{self.progress.step}; best checkpoint: {best}"
        )
        return PretrainResult(self.directory, best, self.progress.step, scores, self.model, self.tokenizer)

    def _introduce(self) -> None:
        """Says what is going to happen."""
        config, model, progress = self.config, self.model, self.progress
        workers = num_workers(self.strategy)
        self.say(
            f"{type(model).__name__} {config.preset}: {model.count_params():,} parameters, {config.dtype}, {self.plan}"
            + (f", on {workers} workers" if workers > 1 else "")
        )
        passes = config.steps * config.batch_size * self.shape.context_length / self.training.num_tokens
        self.say(
            f"{self.training.num_tokens:,} tokens of {self.training.num_documents:,} documents to train on, "
            f"{self.validation.num_tokens:,} of {self.validation.num_documents:,} held out; {passes:.1f} passes in "
            f"{config.steps} steps"
        )
        if progress.step:
            self.say(f"going on after step {progress.step}, from {self.store.path(progress.step)}")
        if progress.replicas != self.plan.replicas:
            self.say(
                f"the run was on {progress.replicas} replicas and is now on {self.plan.replicas}: the examples of each "
                "step stay the same, sums are added up in another order"
            )
        self._look_for_room()

    def _look_for_room(self) -> None:
        """Says it if the next checkpoint would not find room, while there is time to make some."""
        missing = self.store.missing_bytes(self.model)
        if missing > 0 and self.progress.step < self.config.steps:
            self.say(
                f"the disk of {self.store.directory} is too full for the next checkpoint, by {missing:,} bytes of "
                f"{self.store.bytes_needed(self.model):,}: make room before step {self._next_stop()}"
            )

    def _next_stop(self) -> int:
        """The step after which the next checkpoint is written."""
        every = (self.config.evaluate_every, self.config.checkpoint_every or self.config.evaluate_every)
        return min(self.config.steps, *((self.progress.step // each + 1) * each for each in every))

    def _batches(self, corpus: Corpus, **limits: Any) -> Batches:
        return Batches(
            corpus,
            Causal(separate_documents=self.config.separate_documents),
            seq_length=self.shape.context_length,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            **limits,
        )

    def _train(self) -> None:
        """Trains up to the next checkpoint and writes it, unless the loss jumps on the way."""
        config, before, stop = self.config, self.progress, self._next_stop()
        part = self._batches(self.training, start_index=before.next_example, num_examples=self._example_at(stop))
        watch = StallWatch(
            config.stall_seconds,
            self.tell,
            lambda number: self._examples(before.step + number + 1, before.step + number + 1),
            parts=self.plan.replicas // num_workers(self.strategy),
        )
        stopper = StopOnTermination(self.termination)
        skipped = self.model.skipped_steps
        epoch = before.step // config.evaluate_every
        verbose = config.verbose if config.verbose == "auto" else int(config.verbose)
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
            except LossSpikeError as spike:
                self._go_back(spike)
                return
            finally:
                watch.stop()
            step = self.log.step
            if skipped := self.model.skipped_steps - skipped:
                self.say(f"left out {skipped} of steps {before.step + 1} to {step}, which were not finite")
            self.progress = dataclasses.replace(
                before,
                step=step,
                next_example=self._example_at(step),
                replicas=self.plan.replicas,
                validation_loss=None,
                recent_losses=tuple(self.guard.losses),
            )
            if self.is_chief:
                self.store.save(self.model, self.progress)
                self._look_for_room()
        if stopper.stopped:
            wait_for_all(self.strategy)
            self.say(f"asked to end: step {step} is in {self.store.path(step)}, and the same command goes on from it")
            raise SystemExit(0)

    def _evaluate(self) -> Evaluation:
        """Scores the weights on the held-out part, and adds the loss to their checkpoint."""
        step = self.progress.step
        limit = None if step == self.config.steps else self.config.evaluation_batches
        held_out = self._batches(self.validation, shuffle=False, epochs=1)
        with averaged_weights(self.model.optimizer):
            scores = evaluate_model(self.model, held_out, max_batches=limit)
        if not math.isfinite(scores.loss):
            if self.is_chief:
                self.store.discard(step)
            raise FloatingPointError(
                f"the validation loss is {scores.loss} at step {step}; {self._last_good()}. Try a lower learning rate, "
                "or a longer warm-up."
            )
        values = {f"validation_{name}": value for name, value in dataclasses.asdict(scores).items()}
        self.log.write({"step": step, **values})
        self.say(f"step {step}: validation loss {scores.loss:.4f}, perplexity {scores.perplexity:.2f}")
        self.progress = self.progress.evaluated(scores.loss)
        if self.is_chief:
            self.store.save_evaluation(self.progress)
        return scores

    def _go_back(self, spike: LossSpikeError) -> None:
        """Goes back to the newest checkpoint, and on from there with examples that have not been seen."""
        before, reached = self.progress, self._example_at(self.log.step)
        self.turns[before.step] += 1
        if not before.step or self.turns[before.step] > _MOST_TURNS:
            why = f"{_MOST_TURNS} times since step {before.step}" if before.step else "before the first checkpoint"
            raise FloatingPointError(f"{spike}, {why}; {self._last_good()}. Try a lower learning rate.")
        restored = self.store.restore(self.model) or before
        skipped = (restored.next_example, reached)
        self.progress = dataclasses.replace(
            restored, next_example=reached, skipped_examples=(*restored.skipped_examples, skipped)
        )
        self.guard.forget(restored.recent_losses)
        self.log.go_back_to(restored.step, evaluated=restored.validation_loss is not None)
        self.say(f"{spike}: back to step {restored.step}, and on without examples {skipped[0]} to {skipped[1] - 1}")

    def _check_record(self, step: int, loss: float) -> None:
        self.guard.check(
            self.model, step, loss, lambda first, last: f"{self._examples(first, last)}; {self._last_good()}"
        )

    def _example_at(self, step: int) -> int:
        """Index of the first example after a step of this part of the run."""
        return self.progress.next_example + (step - self.progress.step) * self.config.batch_size

    def _examples(self, first: int, last: int) -> str:
        begin, end = self._example_at(first - 1), self._example_at(last)
        return f"examples {begin} to {end - 1} of the order of seed {self.config.seed}"

    def _last_good(self) -> str:
        steps = self.store.steps()
        return f"the last good checkpoint is {self.store.path(steps[-1]) if steps else 'none'}"


def find_causal_preset(name: str) -> tuple[type[CausalLM], ModelConfig]:
    """As `find_preset`, for what this recipe can train.

    Raises:
        ValueError: there is no such preset, or it is of a model that reads in both directions.
    """
    model_class, shape = find_preset(name)
    if not issubclass(model_class, CausalLM):
        raise ValueError(f"{name} is a {model_class.__name__}, but this recipe trains causal LMs: take a GPT's preset.")
    return model_class, shape


def given_shape(config: PretrainConfig) -> dict[str, Any]:
    """Fields of the model's config that the settings replace."""
    names = ("context_length", "num_layers", "num_heads", "model_dim", "dropout_rate")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def make_model(config: PretrainConfig, model_class: type[LanguageModel], shape: ModelConfig) -> LanguageModel:
    """The model to train, compiled, with the variables of its optimizer; made under the scope of its strategy."""
    keras.utils.set_random_seed(config.seed)
    model = model_class(shape, dtype=config.dtype)
    model.compile(
        _optimizer(config),
        micro_batches=config.micro_batches,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        jit_compile=config.jit_compile,
        remat=config.remat,
        steps_per_execution=config.steps_per_execution,
    )
    model.optimizer.build(model.trainable_variables)
    # Each call of `fit` would end by writing the averages over the weights, from which the next one goes on.
    model.optimizer.finalize_variable_values = lambda variables: None
    return model


def _optimizer(config: PretrainConfig) -> keras.optimizers.Optimizer:
    schedule = make_schedule(
        config.schedule,
        config.learning_rate,
        total_steps=config.steps,
        warmup_steps=min(config.warmup_steps, config.steps - 1),
        final=config.final_learning_rate,
    )
    more: dict[str, Any] = {"beta_2": config.beta_2} if config.optimizer in ("adamw", "lamb") else {}
    if config.ema_momentum is not None:
        more |= {"use_ema": True, "ema_momentum": config.ema_momentum}
    return make_optimizer(
        config.optimizer, schedule, weight_decay=config.weight_decay, global_clipnorm=config.clip_norm, **more
    )
