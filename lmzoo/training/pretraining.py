"""Pretraining: from text to a trained checkpoint, in one call that can be stopped and started again."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmzoo.checkpoints import read_config
from lmzoo.checkpoints.card import README
from lmzoo.data.objectives import Objective
from lmzoo.data.pipeline import Batches
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.engine.averaging import averaged_weights, swap_averages
from lmzoo.engine.strategy import BatchPlan, is_chief, make_strategy, num_workers, wait_for_all
from lmzoo.files import write_whole
from lmzoo.models import LanguageModel, find_preset
from lmzoo.models.describe import readme
from lmzoo.training.building import given_shape, make_model, with_tokenizer
from lmzoo.training.callbacks import MetricsLog, measure_peak_flops
from lmzoo.training.checkpointing import CheckpointStore, Progress
from lmzoo.training.corpora import make_corpora, open_corpora, predicted_entropy
from lmzoo.training.evaluation import Evaluation, evaluate_model, held_out_batches, share_out
from lmzoo.training.guards import (
    LossGuard,
    LossSpikeError,
    StallWatch,
    StopOnTermination,
    Termination,
    told_of_lost_workers,
)
from lmzoo.training.objectives import choose_objective, facts_of, make_objective, objective_options
from lmzoo.training.phases import Phase, add_up, make_phases
from lmzoo.training.pretrain_card import make_card
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
        unigram_entropy: loss there of a model that knows nothing but the frequencies of the tokens in training, in nats
            a token; where there is a decoder, of the tokens that it is to write.
        model: the model after the last step.
        tokenizer: its tokenizer.
        held_out: the batches of all of the validation part, the same in each evaluation.
    """

    directory: Path
    checkpoint: Path
    steps: int
    validation: Evaluation
    unigram_entropy: float
    model: LanguageModel
    tokenizer: Tokenizer
    held_out: Batches


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
    with Termination() as termination, told_of_lost_workers():
        return _Run(config, termination, say).finish()


class _Run:
    """A run, from where it stands to its end; `progress` is what its newest checkpoint holds."""

    def __init__(self, config: PretrainConfig, termination: Termination, say: Callable[[str], None]) -> None:
        self.config, self.termination, self.tell = config, termination, say
        self.strategy = make_strategy(config.strategy, resolver=config.resolver, virtual_cpus=config.virtual_cpus)
        termination.listen()
        self.replicas = self.strategy.num_replicas_in_sync
        self.is_chief = is_chief(self.strategy)
        self.say = say if self.is_chief else lambda line: None
        self.directory = Path(config.directory)
        self.store = CheckpointStore(self.directory, keep=config.keep)
        model_class, shape = find_preset(config.preset)
        self.shape = shape.replace(**given_shape(config))
        self.objective_name = choose_objective(config.objective, model_class, self.shape)
        self.phases = make_phases(config, self.shape.context_length, self.replicas * config.micro_batches)
        self.plans = [
            BatchPlan.of_global(phase.batch_size, self.strategy, config.micro_batches) for phase in self.phases
        ]
        if self.is_chief:
            known = is_known(config, has_checkpoints=bool(self.store.steps()), say=self.say)
            kind, size, check = model_class.usual_tokenizer(shape), shape.vocab_size, self._objective
            make_corpora(config, kind, size, self.objective_name, known=known, say=self.say, check=check)
            write_settings(config)  # After the data: settings that are written down are those it was made with.
        wait_for_all(self.strategy)
        self.tokenizer, training, validation = open_corpora(config)
        self.store.extras = self.tokenizer.save_pretrained
        objective = self._objective(self.tokenizer)
        self.training = {
            phase: Batches(
                training,
                objective,
                seq_length=phase.seq_length,
                batch_size=phase.batch_size,
                packing=config.packing,
                seed=self._seed(phase),
            )
            for phase in self.phases
        }
        last = self.phases[-1]
        self.held_out = held_out_batches(
            validation,
            objective,
            seq_length=last.seq_length,
            batch_size=last.batch_size,
            packing=config.packing,
        )
        self.unigram_entropy = predicted_entropy(
            self.training[last], self.held_out, facts_of(self.objective_name, self.tokenizer)
        )
        self.shape = with_tokenizer(self.shape, self.tokenizer)
        with self.strategy.scope():
            self.model = make_model(config, model_class, self.shape)
        self.model.card = make_card(config)
        self.progress = self.store.restore(self.model) or Progress(replicas=self.replicas)
        self.turns: collections.Counter[int] = collections.Counter()
        self._trained_phase: Phase | None = None
        self.guard = LossGuard(
            max_skipped=min(config.max_skipped, config.steps),
            spike_factor=config.spike_factor,
            losses=self.progress.recent_losses,
        )
        self.log = self._make_log()
        self.log.go_back_to(self.progress.step, evaluated=self.progress.validation_loss is not None)

    def _objective(self, tokenizer: Tokenizer) -> Objective:
        """What is learnt, from text of a tokenizer, on rows of all phases."""
        facts = facts_of(self.objective_name, tokenizer)
        made = make_objective(
            self.objective_name, facts, tokenizer_kind=tokenizer.kind, **objective_options(self.config)
        )
        for phase in self.phases:
            made.costs(phase.seq_length)  # Raises if rows are too short for it, or too long.
        return made

    def _make_log(self) -> MetricsLog:
        shape, phases = self.shape, self.phases
        lengths = {phase: batches.lengths for phase, batches in self.training.items()}
        tokens = {phase: phase.batch_size * sum(lengths[phase]) for phase in phases}
        real = {phase: batches.real_share for phase, batches in self.training.items()}
        peak = measure_peak_flops("bfloat16" if self.config.dtype == "mixed_bfloat16" else "float32")
        return MetricsLog(
            self.directory if self.is_chief else None,
            every=self.config.log_every,
            tokens_at=lambda step: add_up(phases, step, tokens.__getitem__),
            real_tokens_at=lambda step: add_up(phases, step, lambda phase: tokens[phase] * real[phase]),
            flops_at=lambda step: add_up(
                phases, step, lambda phase: tokens[phase] * shape.training_flops_per_token(*lengths[phase])
            ),
            peak_flops=peak * self.replicas,
            check=self._check_record,
        )

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
        scores = scores or evaluate_model(self.model, self.held_out)
        best = self.store.path(self.progress.best_step or self.progress.step)
        bits = "" if scores.bits_per_byte is None else f", {scores.bits_per_byte:.3f} bits per byte"
        self.say(
            f"validation loss {scores.loss:.4f} nats a token (unigram entropy {self.unigram_entropy:.4f}){bits} after "
            f"step {self.progress.step}; best checkpoint: {best}"
        )
        return PretrainResult(
            self.directory,
            best,
            self.progress.step,
            scores,
            self.unigram_entropy,
            self.model,
            self.tokenizer,
            self.held_out,
        )

    def _introduce(self) -> None:
        """Says what is going to happen."""
        config, model, progress = self.config, self.model, self.progress
        workers = num_workers(self.strategy)
        self.say(
            f"{type(model).__name__} {config.preset}: {model.count_params():,} parameters, {config.dtype}, "
            f"{self.plans[0]}" + (f", on {workers} workers" if workers > 1 else "")
        )
        training, validation = self.training[self.phases[0]].corpus, self.held_out.corpus
        passes = sum(
            (phase.stop - phase.start) * phase.batch_size / batches.rows_per_epoch
            for phase, batches in self.training.items()
        )
        self.say(
            f"{training.num_tokens:,} tokens of {training.num_documents:,} documents to train on, "
            f"{validation.num_tokens:,} of {validation.num_documents:,} held out; {passes:.1f} passes in "
            f"{config.steps} steps"
        )
        for phase, batches in self.training.items():
            written = "".join(f", and {length} that are written" for length in batches.lengths[1:])
            self.say(f"{phase}{written}, {batches.real_share:.0%} of them no padding")
        self.say(
            f"unigram entropy {self.unigram_entropy:.4f} nats a token: the loss on the held-out text of the token "
            "frequencies in training"
        )
        if progress.step:
            self.say(f"going on after step {progress.step}, from {self.store.path(progress.step)}")
        if progress.replicas != self.replicas:
            self.say(
                f"the run was on {progress.replicas} replicas and is now on {self.replicas}: the examples of each "
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
        """The step after which the next checkpoint is written; the last step of a phase is one."""
        step = self.progress.step
        every = (self.config.evaluate_every, self.config.checkpoint_every or self.config.evaluate_every)
        return min(self._phase(step).stop, *((step // each + 1) * each for each in every))

    def _phase(self, step: int) -> Phase:
        """The phase that the step after so many belongs to."""
        return next((phase for phase in self.phases if step < phase.stop), self.phases[-1])

    def _seed(self, phase: Phase) -> int:
        """Of the order of a phase's rows, and of their masks: another one in each phase."""
        return self.config.seed + phase.number

    def _train(self) -> None:
        """Trains up to the next checkpoint and writes it, unless the loss jumps on the way."""
        config, before, stop = self.config, self.progress, self._next_stop()
        phase = self._phase(before.step)
        part = self.training[phase].between(before.next_example, self._example_at(stop))
        if self._trained_phase != phase:  # A new function: that of before would be traced for rows of any length.
            self.model.make_train_function(force=True)
            self._trained_phase = phase
        watch = StallWatch(
            config.stall_seconds,
            self.tell,
            lambda number: self._examples(before.step + number + 1, before.step + number + 1),
            parts=self.replicas // num_workers(self.strategy),
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
                next_example=0 if step == phase.stop < self.config.steps else self._example_at(step),
                replicas=self.replicas,
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
        with averaged_weights(self.model.optimizer):
            scores = evaluate_model(self.model, self.held_out, max_batches=limit)
        if not math.isfinite(scores.total_loss):
            if self.is_chief:
                self.store.discard(step)
            raise FloatingPointError(
                f"the validation loss is {scores.total_loss} at step {step}; {self._last_good()}. Try a lower learning "
                "rate, or a longer warm-up."
            )
        values = {f"validation_{name}": value for name, value in scores.as_record().items()}
        self.log.write({"step": step, **values, "unigram_entropy": self.unigram_entropy})
        self.say(f"step {step}: validation loss {scores.loss:.4f}, perplexity {scores.perplexity:.2f}")
        self.progress = self.progress.evaluated(scores.total_loss)
        if self.is_chief:
            self.store.save_evaluation(self.progress)
            self.model.card = make_card(self.config, scores, self.unigram_entropy)
            checkpoint = self.store.path(step)
            write_whole(checkpoint / README, readme(self.model, read_config(checkpoint)))
            self.model.card = make_card(self.config)
        return scores

    def _go_back(self, spike: LossSpikeError) -> None:
        """Goes back to the newest checkpoint, and on from there with examples that have not been seen."""
        before, reached = self.progress, self._example_at(self.log.step)
        self.turns[before.step] += 1
        if not before.step or self.turns[before.step] > _MOST_TURNS:
            why = f"{_MOST_TURNS} times since step {before.step}" if before.step else "before the first checkpoint"
            raise FloatingPointError(f"{spike}, {why}; {self._last_good()}. Try a lower learning rate.")
        restored = self.store.restore(self.model) or before
        if self._phase(restored.step) != self._phase(before.step):  # The newest checkpoint was damaged.
            reached = restored.next_example
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
        """Index, in the present phase, of the first example after a step of this part of the run."""
        before = self.progress
        return before.next_example + (step - before.step) * self._phase(before.step).batch_size

    def _examples(self, first: int, last: int) -> str:
        begin, end = self._example_at(first - 1), self._example_at(last)
        return f"examples {begin} to {end - 1} of the order of seed {self._seed(self._phase(self.progress.step))}"

    def _last_good(self) -> str:
        steps = self.store.steps()
        return f"the last good checkpoint is {self.store.path(steps[-1]) if steps else 'none'}"
