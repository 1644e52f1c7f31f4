"""Two worker processes over loopback, each held to one core, against one process held to one core.

The model and the rows of a worker are those of train_step.py. Contenders run in turn; figures are medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import machine, time_calls
from train_step import CONTEXT, ROWS, VOCAB, make_gpt

WORKERS = 2


def train(dtype: str, calls: int) -> dict[str, Any]:
    """Times the training step of this worker, or of a process that has no cluster."""
    import numpy as np
    import tensorflow as tf

    from lmzoo.engine.strategy import make_strategy

    strategy = make_strategy("auto")
    with strategy.scope():
        model = make_gpt(dtype)
        model.compile(jit_compile=False)
    replicas = strategy.num_replicas_in_sync
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS * replicas, CONTEXT + 1)).astype("int32")
    batch = (tokens[:, :-1], tokens[:, 1:], np.ones((ROWS * replicas, CONTEXT), "float32"))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    data = tf.data.Dataset.from_tensor_slices(batch).repeat().batch(ROWS * replicas, drop_remainder=True)
    iterator = iter(strategy.experimental_distribute_dataset(data.with_options(options)))
    model.make_train_function()

    def step() -> dict[str, float]:
        return {name: float(value) for name, value in model.train_function(iterator).items()}

    time_calls(step, warmup=4, calls=1)
    before = time.process_time()
    seconds = time_calls(step, warmup=0, calls=calls)
    return {
        "replicas": replicas,
        "cores": len(os.sched_getaffinity(0)),
        "ms a step": 1000 * seconds,
        "CPU ms a step": 1000 * (time.process_time() - before) / calls,
        "tokens a second": replicas * ROWS * CONTEXT / seconds,
        "loss": float(model.train_function(iterator)["loss"]),
    }


def run(workers: int, dtype: str, calls: int) -> dict[str, Any]:
    """Runs workers under `lmzoo launch`, one core each; returns the figures of the first."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, __file__, "--train", dtype, "--calls", str(calls)]
    done = subprocess.run(
        [sys.executable, "-m", "lmzoo", "launch", "--workers", str(workers), "--cores-each", "1", "--", *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith("[0] RESULT "):
            return json.loads(line.removeprefix("[0] RESULT "))
    raise RuntimeError(f"{workers} workers failed:\n{done.stderr[-3000:]}")


def main() -> None:
    """Trains if asked to as a worker; otherwise runs all rounds and writes the figures down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender runs")
    parser.add_argument("--calls", type=int, default=20, help="steps that are timed")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "mixed_bfloat16"])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where the figures go")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        print("RESULT " + json.dumps(train(arguments.train, arguments.calls)))
        return
    pairs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {dtype: [] for dtype in arguments.dtypes}
    for _ in range(arguments.rounds):
        for dtype, rounds in pairs.items():
            rounds.append((run(1, dtype, arguments.calls), run(WORKERS, dtype, arguments.calls)))
    figures = {dtype: summary(rounds) for dtype, rounds in pairs.items()}
    print(f"{'':16}{'tokens/s, 1':>14}{'tokens/s, 2':>14}{'ratio':>8}{'by CPU':>8}   of each round")
    for dtype, figure in figures.items():
        ratios = ", ".join(f"{ratio:.2f}" for ratio in figure["ratios"])
        print(
            f"{dtype:16}{figure['one']:>14,.0f}{figure['two']:>14,.0f}{figure['ratio']:>8.2f}"
            f"{figure['ratio of CPU time']:>8.2f}   {ratios}"
        )
    arguments.json.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n")
    print(f"written to {arguments.json}")


def summary(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds; the ratio is that of the two runs of a round, one after the other."""
    one, two = ([pair[place]["tokens a second"] for pair in rounds] for place in range(2))
    ratios = [after / before for before, after in zip(one, two, strict=True)]
    # What the ratio would be if no process waited, for the other one or for the machine's other work.
    cpu = [WORKERS * before["CPU ms a step"] / after["CPU ms a step"] for before, after in rounds]
    return {
        "one": statistics.median(one),
        "two": statistics.median(two),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ratio of CPU time": statistics.median(cpu),
        "runs": rounds,
    }


if __name__ == "__main__":
    main()
