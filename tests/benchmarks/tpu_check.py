"""A pretraining step of published shapes, compiled for a TPU topology on a machine without a TPU.

Needs the extra tpu-check. A case is PRESET,LENGTH,ROWS,MICRO_BATCHES,REMAT: tokens a row, rows a replica, in how many
parts, and "block" to compute blocks again going backward; each is what `lmzoo pretrain` would run in bfloat16 with
AdamW and dropout, packed. Figures of cases that are not asked for stay in the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from harness import machine

CASES = ("gpt2,1024,8,1,", "gpt2,1024,16,1,block", "bert-small,128,64,1,", "t5-small,512,8,1,")


def check(case: str, topology: str) -> dict[str, Any]:
    from lmzoo.engine.tpu_check import replicas_of
    from lmzoo.training import PretrainConfig, check_pretraining

    preset, length, rows, micro_batches, remat = case.split(",")
    config = PretrainConfig(
        preset=preset,
        seq_length=int(length),
        batch_size=int(rows) * replicas_of(topology),
        micro_batches=int(micro_batches),
        remat="block" if remat == "block" else None,
        dropout_rate=0.1,
        dtype="mixed_bfloat16",
    )
    report = check_pretraining(config, topology)
    print(f"{case}\n{report}\n", flush=True)
    return {**dataclasses.asdict(report), "fits": report.fits, "text": str(report).splitlines(), "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    for case in arguments.cases:
        figures = check(case, arguments.topology)
        content = json.loads(arguments.json.read_text()) if arguments.json.exists() else {"figures": {}}
        content["figures"][case] = figures
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
