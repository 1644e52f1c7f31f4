"""Fine-tunes a T5 to write a short text for a long one, and scores it by ROUGE.

    python examples/summarize_t5.py --model t5-small --train news.jsonl --text article --label summary \\
        --prefix "summarize: " --max-length 512 --num-beams 4
    python examples/summarize_t5.py
    python examples/summarize_t5.py --smoke

Every flag of `lmzoo finetune` is one here. Without --train it learns what a docstring of Python's standard library
begins with, its first sentence, from the rest of it; without --model a small T5 starts from random weights, with a
tokenizer trained on the training part. `--smoke` does both for a few steps, with a tiny T5.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tyro

from lmzoo.data.python_help import python_help
from lmzoo.data.records import read_records
from lmzoo.training import FinetuneConfig, finetune, make_untrained

SHAPE = {"num_layers": 3, "num_heads": 4, "head_dim": 64, "model_dim": 256, "feedforward_dim": 1024}
TINY = {"num_layers": 1, "num_heads": 2, "head_dim": 16, "model_dim": 32, "feedforward_dim": 64}
TRAINING = """--task text-to-text --optimizer muon --learning-rate 5e-3 --epochs 10 --batch-size 32 --max-length 256
    --max-target-length 48 --label-smoothing 0.1 --metric rougeL --verbose 2"""
SMOKE = "--epochs 1 --max-steps 3 --max-length 32 --max-target-length 12"


def first_sentences() -> Iterator[dict[str, str]]:
    """What documentation begins with, and what follows: a target and a source."""
    for document in python_help():
        name, _, text = document.partition("\n\n")
        summary, _, body = text.partition("\n\n")
        if len(body) > 200 and re.fullmatch(r"[A-Z][^\n]{20,200}\.", summary):
            yield {"source": f"{name}: {' '.join(body.split())}", "target": summary}


def main() -> None:
    """Parses the flags, makes what they leave open, and trains."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--smoke", action="store_true")
    first.add_argument("--model")
    first.add_argument("--train", nargs="+")
    chosen, rest = first.parse_known_args()
    place = Path("runs/summarize-smoke" if chosen.smoke else "runs/summarize")
    model, train = chosen.model or str(place / "start"), chosen.train or [str(place / "docstrings.jsonl")]
    words = f"{TRAINING} {SMOKE if chosen.smoke else ''} --directory {place}/run".split()
    config = tyro.cli(
        FinetuneConfig,
        args=[*words, *rest, "--model", model, "--train", *train],
        description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )
    if not chosen.train:
        place.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(pair) + "\n" for pair in islice(first_sentences(), 80 if chosen.smoke else None)]
        (place / "docstrings.jsonl").write_text("".join(lines), encoding="utf-8")
    if not chosen.model:
        source, _, target = config.fields
        texts = [str(record[name]) for record in read_records(train) for name in (source, target)]
        shape = TINY if chosen.smoke else SHAPE
        make_untrained(model, "t5-small", texts, vocab_size=600 if chosen.smoke else 8000, **shape)
    result = finetune(config)
    for part, scores in result.metrics.items():
        print(f"{part}: " + ", ".join(f"{name} {scores[name]:.3f}" for name in ("rouge1", "rouge2", "rougeL")))
    print(f"it is in {result.checkpoint}")


if __name__ == "__main__":
    main()
