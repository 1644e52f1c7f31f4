"""Pretrains a GPT on any text. Stopped and started again with the same flags, it goes on where it was.

    python examples/pretrain_gpt.py --source 'books/*.txt' --preset gpt2-micro --steps 5000
    python examples/pretrain_gpt.py --strategy mirrored --dtype mixed_bfloat16 --jit-compile True
    python examples/pretrain_gpt.py --recipe char --source shakespeare.txt
    python examples/pretrain_gpt.py --preset gpt2 --strategy tpu --dtype mixed_bfloat16 --batch-size 32 --check v5e:2x2
    python examples/pretrain_gpt.py --smoke

`--check TOPOLOGY` compiles the training step for TPU chips (by libtpu, if the extra tpu-check is installed; else by XLA
for this machine), says what they need, and trains nothing.

Recipes are settings to begin with; every flag overrides its own. `default` is a model of 1 million parameters on the
help of Python itself. `char` is nanoGPT's size for a CPU (4 layers, 4 heads, 128 wide, a context of 64 characters),
trained for one minute on two cores.
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
    "default": PretrainConfig(directory=Path("runs/gpt")),
    "char": PretrainConfig(
        directory=Path("runs/gpt-char"),
        tokenizer="char",
        preset="gpt2-nano",
        context_length=64,
        num_layers=4,
        num_heads=4,
        model_dim=128,
        separate_documents=False,
        validation_fraction=0.1,
        steps=1000,
        batch_size=16,
        optimizer="muon",
        learning_rate=4e-3,
        warmup_steps=50,
        schedule="linear",
        final_learning_rate=0.0,
        jit_compile=True,
        steps_per_execution=50,
        log_every=50,
        evaluate_every=1000,
    ),
}
SMOKE = [
    *("--directory", "runs/gpt-smoke", "--vocab-size", "512", "--context-length", "32", "--num-layers", "2"),
    *("--model-dim", "32", "--steps", "10", "--batch-size", "4", "--evaluate-every", "5", "--evaluation-batches", "4"),
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
