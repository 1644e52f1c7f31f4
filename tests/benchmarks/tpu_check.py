"""The training step of GPT-2 (124M), rows of 1,024 tokens, compiled for a TPU topology on a machine without a TPU.

Needs jax and libtpu, in this environment or in that of the interpreter that `--python` names. A case is
ROWS,MICRO_BATCHES,REMAT: rows a replica, in how many parts, and "block" to compute blocks again going backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from harness import machine

CASES = ("8,1,", "16,1,", "32,1,", "8,4,", "16,1,block")
LENGTH = 1024


def check(case: str, topology: str, python: str | None) -> dict[str, Any]:
    import tensorflow as tf

    from lmzoo.engine.optimizers import make_optimizer
    from lmzoo.engine.tpu_check import check_on_tpu, host_ops, replicas_of
    from lmzoo.models.gpt import GPTModel

    rows, micro_batches, remat = case.split(",")
    global_batch = int(rows) * replicas_of(topology)
    model = GPTModel.from_preset("gpt2", dtype="mixed_bfloat16")
    model.compile(make_optimizer("adamw", 3e-4), micro_batches=int(micro_batches), remat=remat or None)
    batch = tuple(tf.TensorSpec([global_batch, LENGTH], dtype) for dtype in (tf.int32, tf.int32, tf.float32))
    flops = model.config.training_flops_per_token(LENGTH) * global_batch * LENGTH
    report = check_on_tpu(model, batch, topology, model_flops=flops, python=python)
    print(f"{report}{f', remat={remat}' if remat else ''}\n", flush=True)
    facts = {"remat": remat or None, "dropout_rate": model.config.dropout_rate, "fits": report.fits}
    return {**dataclasses.asdict(report), **facts, "host_ops": host_ops(model, batch), "text": str(report).splitlines()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--python", help="an interpreter that has jax and libtpu")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    figures = {}
    for case in arguments.cases:
        figures[case] = check(case, arguments.topology, arguments.python)
        content = {"machine": machine(), "preset": "gpt2", "length": LENGTH, "figures": figures}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
