"""What happens to real jobs: kills, machines that are taken away, bad data, slow disks and full ones."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from lmzoo import GPTModel, evaluate, pretrain
from lmzoo.data.corpus import Corpus
from lmzoo.data.pipeline import Batches
from lmzoo.training.guards import Termination

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "to", "me"]
STEPS = 200
FLAGS = [
    *("--vocab-size", "300", "--context-length", "16", "--num-layers", "1", "--num-heads", "2", "--model-dim", "16"),
    *("--steps", str(STEPS), "--batch-size", "8", "--evaluate-every", "50", "--checkpoint-every", "20"),
    *("--log-every", "1", "--evaluation-batches", "4", "--verbose", "0"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for number in range(60):
        lines = (" ".join(words.choices(WORDS, k=12)) for _ in "1234")
        (directory / f"{number}.txt").write_text("\n".join(lines))
    return directory / "*.txt"


def command(text, directory, *flags):
    return [
        sys.executable,
        "-m",
        "lmzoo",
        "pretrain",
        "--source",
        str(text),
        "--directory",
        str(directory),
        *FLAGS,
        *flags,
    ]


def start(*arguments):
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout=240):
    """What the process said, once it has ended well."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


def losses(directory, kind="loss"):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record[kind]) for record in records if kind in record]


def wait_for_step(directory, step, process, seconds=120):
    """Returns once the step has been logged (or the process has ended)."""
    log, end = directory / "metrics.jsonl", time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if log.exists() and log.read_bytes().count(b'"loss"') >= step:
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of 200 steps with dropout, that nothing interrupts."""
    directory = tmp_path_factory.mktemp("whole")
    finish(start(*command(text, directory, "--strategy", "one", "--dropout-rate", "0.1", "--ema-momentum", "0.9")))
    return directory


def check_same(directory, whole):
    for kind in ("loss", "validation_loss"):
        assert losses(directory, kind) == losses(whole, kind)
    for name in ("last", "best"):
        mine, theirs = (load_file(each / name / "model.safetensors") for each in (directory, whole))
        assert all(np.array_equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.distributed
def test_five_kills_leave_the_losses_of_a_whole_run(text, whole, tmp_path):
    moments = sorted(random.Random(time.time_ns()).sample(range(1, STEPS), 5))
    print("killed at steps", moments)
    run = command(text, tmp_path, "--strategy", "one", "--dropout-rate", "0.1", "--ema-momentum", "0.9")
    for moment in moments:
        process = start(*run)
        wait_for_step(tmp_path, moment, process)
        time.sleep(random.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(start(*run))
    assert [step for step, _ in losses(tmp_path)] == list(range(1, STEPS + 1))
    check_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_kills_in_both_phases_of_a_masked_lm_leave_the_losses_of_a_whole_run(text, tmp_path):
    phases = ("--preset", "bert-tiny", "--seq-length", "8", "--long-seq-length", "16", "--long-share", "0.4")
    flags = (*phases, "--strategy", "one", "--dropout-rate", "0.1")
    finish(start(*command(text, tmp_path / "whole", *flags)))
    run = command(text, tmp_path / "killed", *flags)
    for moment in (70, 121):  # The second phase begins after step 120.
        process = start(*run)
        wait_for_step(tmp_path / "killed", moment, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(start(*run))
    assert [step for step, _ in losses(tmp_path / "killed")] == list(range(1, STEPS + 1))
    check_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_terminated_run_saves_and_ends_well(text, whole, tmp_path):
    run = command(text, tmp_path, "--strategy", "one", "--dropout-rate", "0.1", "--ema-momentum", "0.9")
    process = start(*run)
    wait_for_step(tmp_path, 33, process)
    process.terminate()
    began = time.monotonic()
    said = finish(process, timeout=60)
    assert time.monotonic() - began < 30
    stopped = losses(tmp_path)[-1][0]
    assert 33 <= stopped < STEPS
    assert f"asked to end: step {stopped} is in " in said
    assert f"going on after step {stopped}" in finish(start(*run))
    check_same(tmp_path, whole)


def worker_processes(directory):
    """Process ids of the workers that train in a directory."""
    found = subprocess.run(["pgrep", "-f", f"^[^ ]*python[^ ]* -m lmzoo pretrain .*{directory}"], capture_output=True)
    return [int(number) for number in found.stdout.split()]


@pytest.fixture(scope="module")
def on_one_device(text, tmp_path_factory):
    """A run of 200 steps without dropout, that nothing interrupts."""
    directory = tmp_path_factory.mktemp("one")
    finish(start(*command(text, directory, "--strategy", "one")))
    return directory


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ending", ["kill one worker", "terminate all"])
def test_two_workers_go_on_from_the_last_checkpoint(text, on_one_device, tmp_path, ending):
    launch = [sys.executable, "-m", "lmzoo", "launch", "--workers", "2", "--restarts", "1", "--"]
    directory = tmp_path / "two"
    two = [*launch, *command(text, directory, "--strategy", "multiworker")]
    process = start(*two)
    wait_for_step(directory, 70, process)
    workers = worker_processes(directory)
    assert len(workers) == 2
    if ending == "kill one worker":
        os.kill(workers[1], signal.SIGKILL)
        said = finish(process)
        assert "lost another worker" in said
        assert "Traceback" not in said
        assert "going on after step" in said
    else:
        process.terminate()
        assert "asked to end: step" in finish(process, timeout=30)
        assert losses(directory)[-1][0] < STEPS
        assert "on 2 workers" in finish(start(*two))
    assert not worker_processes(directory)
    for kind in ("loss", "validation_loss"):
        expected, got = dict(losses(on_one_device, kind)), dict(losses(directory, kind))
        assert got == pytest.approx(expected, abs=1e-4)


def settings(text, directory, **changes):
    return {
        "directory": directory,
        "source": (str(text),),
        "vocab_size": 300,
        "context_length": 16,
        "num_layers": 1,
        "num_heads": 2,
        "model_dim": 32,
        "steps": 40,
        "batch_size": 8,
        "warmup_steps": 5,
        "learning_rate": 2e-2,
        "evaluate_every": 20,
        "log_every": 1,
        "validation_fraction": 0.1,
        "strategy": "one",
        "verbose": "0",
        **changes,
    }


BAD = range(30 * 8, 32 * 8)


@pytest.fixture
def bad_data(monkeypatch):
    """Noise instead of text in the examples of steps 31 and 32."""
    examples = Batches.examples

    def with_noise(self, indices):
        inputs, labels, weights = examples(self, indices)
        if self.shuffle:
            noise = np.random.default_rng(0).integers(0, 256, labels.shape).astype("int32")
            labels = np.where(np.isin(indices, BAD)[:, None], noise, labels)
        return inputs, labels, weights

    monkeypatch.setattr(Batches, "examples", with_noise)


@pytest.mark.slow
def test_a_spike_is_left_out(text, tmp_path, bad_data):
    config = settings(text, tmp_path / "a", spike_factor=1.5)
    said = []
    result = pretrain(**config, say=said.append)
    turns = [line for line in said if "back to step" in line]
    assert [turn.partition(": ")[2] for turn in turns] == [
        "back to step 20, and on without examples 160 to 247",
        "back to step 20, and on without examples 160 to 255",
    ]
    assert all(turn.startswith("the loss jumped to ") for turn in turns)
    assert [step for step, _ in losses(tmp_path / "a")] == list(range(1, 41))
    trained = dict(losses(tmp_path / "a"))
    assert max(trained[step] for step in range(21, 41)) < 1.2 * trained[20]
    progress = json.loads((tmp_path / "a" / "last" / "training.json").read_text())["progress"]
    assert progress["skipped_examples"] == [[160, 256]]
    assert progress["next_example"] == 256 + 20 * 8
    assert result.steps == 40

    def killed_as_it_turns_back(line):
        if "back to step" in line:
            raise InterruptedError

    config = settings(text, tmp_path / "b", spike_factor=1.5)
    with pytest.raises(InterruptedError):
        pretrain(**config, say=killed_as_it_turns_back)
    pretrain(**config, say=said.append)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_without_the_guard_a_spike_stays(text, tmp_path, bad_data):
    pretrain(**settings(text, tmp_path), say=lambda line: None)
    trained = dict(losses(tmp_path))
    assert trained[31] > 1.5 * trained[30]


def test_a_spike_before_the_first_checkpoint_ends_the_run(text, tmp_path, bad_data):
    config = settings(text, tmp_path, spike_factor=1.5, evaluate_every=40)
    with pytest.raises(FloatingPointError, match=r"jumped to .* at step 31, .*before the first checkpoint; the last"):
        pretrain(**config, say=lambda line: None)


def test_averaged_weights_are_evaluated_and_published(text, tmp_path):
    result = pretrain(**settings(text, tmp_path, ema_momentum=0.9, dtype="mixed_float16"), say=lambda line: None)
    published = load_file(tmp_path / "last" / "model.safetensors")
    state = load_file(tmp_path / "last" / "training_state.safetensors").values()
    name = next(name for name, value in published.items() if value.shape == (32, 96))
    assert not any(np.array_equal(published[name], value) for value in state)
    last = GPTModel.from_pretrained(tmp_path / "last").weights
    for weight, mine in zip(last, result.model.weights[: len(last)], strict=True):
        np.testing.assert_array_equal(weight, mine)
    scores = evaluate(tmp_path / "last", tmp_path / "corpus", batch_size=8, dtype="mixed_float16", verbose=0)
    assert scores.loss == pytest.approx(result.validation.loss, rel=1e-5)
    again = pretrain(**settings(text, tmp_path, ema_momentum=0.9, dtype="mixed_float16"), say=lambda line: None)
    assert again.validation == result.validation


def test_a_stalled_pipeline_is_told_of(text, tmp_path, monkeypatch):
    take, calls = Corpus.take, []

    def slow_take(self, places):
        calls.append(1)
        if len(calls) == 24:
            time.sleep(2.0)
        return take(self, places)

    monkeypatch.setattr(Corpus, "take", slow_take)
    said = []
    pretrain(**settings(text, tmp_path, stall_seconds=0.6), say=said.append)
    assert any(": the input pipeline has not made the next batch yet, examples " in line for line in said), said


def test_a_slow_step_is_not_taken_for_a_stalled_pipeline(text, tmp_path, monkeypatch):
    from lmzoo.training.callbacks import MetricsLog

    record = MetricsLog._record

    def slow_record(self, logs):
        if self.step == 5:
            time.sleep(1.5)
        record(self, logs)

    monkeypatch.setattr(MetricsLog, "_record", slow_record)
    said = []
    pretrain(**settings(text, tmp_path, stall_seconds=0.6, steps=10), say=said.append)
    assert any("the next batch is ready, so it is the step itself" in line for line in said), said
    assert not any(": the input pipeline has not made" in line for line in said)


def test_a_full_disk_is_told_of_before_a_checkpoint_is_lost(text, tmp_path, monkeypatch):
    said = []
    usage = shutil.disk_usage

    def filling_up(path):
        return usage(path)._replace(free=100 if (tmp_path / "checkpoints" / "step-00000010").is_dir() else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", filling_up)
    with pytest.raises(OSError, match=r"step 20 could not be written: it needs [\d,]+ bytes more than are left"):
        pretrain(**settings(text, tmp_path, checkpoint_every=10, evaluate_every=10), say=said.append)
    assert any("too full for the next checkpoint" in line and "before step 20" in line for line in said)
    assert (tmp_path / "last" / "model.safetensors").is_file()
    monkeypatch.setattr(shutil, "disk_usage", usage)
    again = pretrain(**settings(text, tmp_path, checkpoint_every=10, evaluate_every=10), say=said.append)
    assert "going on after step 10" in " ".join(said)
    assert again.steps == 40


def test_termination_is_held_while_something_could_be_lost():
    with Termination() as termination:
        with termination.held():
            os.kill(os.getpid(), signal.SIGTERM)
            assert termination.requested
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
