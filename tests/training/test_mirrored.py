"""Runs on two devices, stopped and started again, against the same run on one. One strategy to a process."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from lmzoo import pretrain
strategy, text, directory, stop_after = sys.argv[1:]
def say(line):
    print(line)
    if line.startswith(f"step {stop_after}:"):
        raise SystemExit(0)
pretrain(
    directory=directory, source=(text,), vocab_size=300, context_length=16, num_layers=1, num_heads=2, model_dim=16,
    steps=18, batch_size=6, warmup_steps=2, evaluate_every=6, log_every=1, verbose="0", ema_momentum=0.9,
    strategy=strategy, virtual_cpus=2 if strategy == "mirrored" else None, say=say,
)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_devices_one_and_two_again_give_the_losses_of_one(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"Sentence number {number} of this text says hello to you. " * 10)

    def run(strategy, name, stop_after):
        command = [sys.executable, "-c", PROGRAM, strategy, str(tmp_path / "*.txt"), str(tmp_path / name), stop_after]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("one", "whole", "none")
    assert "6 = 3 rows x 2 replicas" in run("mirrored", "changing", "6")
    said = run("one", "changing", "12")
    assert "going on after step 6" in said
    assert "the run was on 2 replicas and is now on 1: the examples of each step stay the same" in said
    said = run("mirrored", "changing", "none")
    assert "changed since the run began: strategy was 'one' and is 'mirrored'" in said
    losses = {}
    for name in ("whole", "changing"):
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for kind in ("loss", "validation_loss"):
            losses[name, kind] = {record["step"]: record[kind] for record in records if kind in record}
    assert list(losses["whole", "loss"]) == list(range(1, 19))
    assert list(losses["whole", "validation_loss"]) == [6, 12, 18]
    for kind in ("loss", "validation_loss"):
        assert losses["changing", kind] == pytest.approx(losses["whole", kind], abs=1e-4)
