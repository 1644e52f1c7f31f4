"""Pretrains a BERT on any text. Stopped and started again with the same flags, it goes on where it was.

    python examples/pretrain_bert.py                      # 2 layers on the help of Python itself, minutes on two cores
    python examples/pretrain_bert.py --objective mlm+nsp --optimizer lamb --learning-rate 5e-3 --weight-decay 0.01
    python examples/pretrain_bert.py --strategy mirrored --virtual-cpus 2
    lmzoo launch --workers 2 -- python examples/pretrain_bert.py --strategy multiworker
    python examples/pretrain_bert.py --recipe bert-base --strategy tpu --source 'wiki/*.jsonl' --check v5e:2x2
    python examples/pretrain_bert.py --smoke

`--check TOPOLOGY` compiles the training step for TPU chips (by libtpu, if the extra tpu-check is installed; else by XLA
for this machine), says what they need, and trains nothing.

Recipes are settings to begin with; every flag overrides its own. `default` learns masked LM on rows of 128 tokens that
hold several documents each. `bert-base` is the published shape and schedule (90% of the steps on rows of 128 tokens and
the others on 512), with LAMB, whose batch may be large.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tyro

from lmzoo import PretrainConfig, pretrain
from lmzoo.training import check_pretraining

RECIPES = {
    "default": PretrainConfig(
        directory=Path("runs/bert"),
        preset="bert-mini",
        vocab_size=4096,
        num_layers=2,
        seq_length=128,
        steps=2000,
        batch_size=16,
        optimizer="muon",
        learning_rate=3e-3,
        warmup_steps=100,
        schedule="linear",
        final_learning_rate=0.0,
        dtype="mixed_bfloat16",
        jit_compile=True,
        steps_per_execution=10,
        log_every=100,
        evaluate_every=500,
    ),
    "bert-base": PretrainConfig(
        directory=Path("runs/bert-base"),
        preset="bert-base",
        dropout_rate=0.1,
        seq_length=128,
        long_seq_length=512,
        steps=100_000,
        batch_size=2048,
        optimizer="lamb",
        learning_rate=2e-3,
        beta_2=0.999,
        weight_decay=0.01,
        warmup_steps=5000,
        schedule="linear",
        final_learning_rate=0.0,
        dtype="mixed_bfloat16",
        evaluate_every=2500,
    ),
}
SMOKE = [
    *("--directory", "runs/bert-smoke", "--vocab-size", "512", "--context-length", "64", "--num-layers", "1"),
    *("--num-heads", "2", "--model-dim", "32", "--seq-length", "32", "--long-seq-length", "64", "--steps", "10"),
    *("--batch-size", "4", "--evaluate-every", "5", "--evaluation-batches", "4", "--log-every", "5"),
]


def main() -> None:
    """Parses the flags and trains."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", choices=list(RECIPES), default="default")
    first.add_argument("--smoke", action="store_true")
    first.add_argument("--check", metavar="TOPOLOGY")
    chosen, rest = first.parse_known_args()
    config = tyro.cli(
        PretrainConfig,
        default=RECIPES[chosen.recipe],
        args=(SMOKE if chosen.smoke else []) + rest,
        description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )
    if chosen.check:
        report = check_pretraining(config, chosen.check)
        print(report)
        sys.exit(0 if report.compiles and report.fits is not False else 1)
    pretrain(config)


if __name__ == "__main__":
    main()
