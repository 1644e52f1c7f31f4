"""Pretrains a T5 on any text. Stopped and started again with the same flags, it goes on where it was.

    python examples/pretrain_t5.py                        # 2 + 2 layers on the help of Python itself, on two cores
    python examples/pretrain_t5.py --objective prefix     # or ul2, or decoder
    python examples/pretrain_t5.py --strategy mirrored --virtual-cpus 2
    lmzoo launch --workers 2 -- python examples/pretrain_t5.py --strategy multiworker
    python examples/pretrain_t5.py --recipe t5-small --strategy tpu --source 'c4/*.jsonl' --check v5e:2x2
    python examples/pretrain_t5.py --smoke

`--check TOPOLOGY` compiles the training step for TPU chips (by libtpu, if the extra tpu-check is installed; else by XLA
for this machine) and trains nothing. A run ends with a text that was held out, and what T5 writes for it.

Recipes are settings to begin with; every flag overrides its own. `default` learns span corruption on rows of 128 tokens
that hold several documents each. `t5-small` is the published shape and schedule, whose rows are cut from one long text.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tyro

from lmzoo import PretrainConfig, pretrain
from lmzoo.models import load_pretrained
from lmzoo.training import check_pretraining

RECIPES = {
    "default": PretrainConfig(
        directory=Path("runs/t5"),
        preset="t5-small",
        vocab_size=4096,
        num_layers=2,
        num_heads=4,
        model_dim=256,
        feedforward_dim=1024,
        seq_length=128,
        steps=2000,
        batch_size=16,
        optimizer="muon",
        learning_rate=3e-3,
        embedding_rate=10.0,
        schedule="linear",
        final_learning_rate=0.0,
        dtype="mixed_bfloat16",
        jit_compile=True,
        steps_per_execution=10,
        log_every=100,
        evaluate_every=500,
    ),
    "t5-small": PretrainConfig(
        directory=Path("runs/t5-small"),
        preset="t5-small",
        separate_documents=False,
        steps=2**19,
        batch_size=128,
        optimizer="adafactor",
        learning_rate=0.01,
        schedule="inverse_sqrt_flat",
        warmup_steps=10_000,
        weight_decay=0.0,
        clip_norm=None,
        dtype="mixed_bfloat16",
        evaluate_every=5000,
    ),
}
SMOKE = "--directory runs/t5-smoke --vocab-size 512 --num-layers 1 --model-dim 32 --seq-length 32 --steps 10"


def show(inputs, labels, model, tokenizer) -> None:
    """Prints the first text of a batch as the encoder reads it, and what the decoder writes."""
    read = inputs["token_ids"][0][inputs.get("segment_ids", inputs.get("padding_mask"))[0] == 1]
    missing = labels[0][inputs.get("decoder_segment_ids", labels != tokenizer.pad_token_id)[0] == 1]
    written = model.generate([read], max_new_tokens=len(missing), temperature=0.0)[0].numpy()
    for name, ids in {"a held-out text": read, "what is missing": missing, "what T5 writes": written}.items():
        print(f"{name}: {tokenizer.decode(ids.tolist(), skip_special_tokens=False)}")


def main() -> None:
    """Parses the flags, trains, and shows what has been learnt."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", choices=list(RECIPES), default="default")
    first.add_argument("--smoke", action="store_true")
    first.add_argument("--check", metavar="TOPOLOGY")
    chosen, rest = first.parse_known_args()
    args = (SMOKE.split() if chosen.smoke else []) + rest
    flags = (tyro.conf.FlagConversionOff,)
    config = tyro.cli(PretrainConfig, default=RECIPES[chosen.recipe], args=args, description=__doc__, config=flags)
    if chosen.check:
        report = check_pretraining(config, chosen.check)
        print(report)
        sys.exit(0 if report.compiles and report.fits is not False else 1)
    result = pretrain(config)
    show(*result.held_out.batch_at(0)[:2], load_pretrained(result.checkpoint), result.tokenizer)


if __name__ == "__main__":
    main()
