"""A run on two devices, stopped and started again, against the same run on one. One strategy to a process."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import tensorflow as tf
from pathlib import Path
strategy, text, directory = sys.argv[1:]
if strategy == "mirrored":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from lmzoo import pretrain
settings = dict(
    directory=Path(directory), source=(text,), vocab_size=300, context_length=16, num_layers=1, num_heads=2,
    model_dim=16, steps=12, batch_size=6, warmup_steps=2, evaluate_every=6, log_every=1, strategy=strategy,
    verbose="0",
)
def stop(line):
    if line.startswith("step 12"):
        raise InterruptedError
if strategy == "mirrored":
    try:
        pretrain(say=stop, **settings)
    except InterruptedError:
        pass
pretrain(**settings)
"""


@pytest.mark.distributed
def test_two_devices_and_a_restart_give_the_losses_of_one(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"Sentence number {number} of this text says hello to you. " * 10)
    losses = {}
    for strategy in ("one", "mirrored"):
        command = [sys.executable, "-c", PROGRAM, strategy, str(tmp_path / "*.txt"), str(tmp_path / strategy)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        records = map(json.loads, (tmp_path / strategy / "metrics.jsonl").read_text().splitlines())
        losses[strategy] = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert "6 = 3 rows x 2 replicas" in done.stdout
    assert "going on after step 6" in done.stdout
    assert list(losses["one"]) == list(range(1, 13))
    assert losses["mirrored"] == pytest.approx(losses["one"], abs=1e-4)
