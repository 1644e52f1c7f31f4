"""Fine-tunes an encoder to classify texts or pairs of texts, and serves it.

    python examples/finetune_classifier.py --model MiniLM --train reviews.jsonl --test test.jsonl
    python examples/finetune_classifier.py --model bert --train tfds:glue/mrpc --validation tfds:glue/mrpc@validation \
        --text sentence1 --pair sentence2 --metric f1
    python examples/finetune_classifier.py --model bert --task regress --train tfds:glue/stsb --text sentence1 \
        --pair sentence2 --metric spearman
    python examples/finetune_classifier.py --smoke

Every flag of `lmzoo finetune` is one here. `--smoke` needs no data and no weights: a tiny BERT with random weights
learns which module of the standard library a line of documentation is from.
"""

import argparse
import inspect
import json
import math
import os
import statistics
import string
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tyro

from lmzoo import BertModel, Tokenizer
from lmzoo.pipelines import TextClassifier
from lmzoo.training import FinetuneConfig, finetune

SMOKE = [
    *("--model", "runs/classifier-smoke/encoder", "--train", "runs/classifier-smoke/lines.jsonl"),
    *("--directory", "runs/classifier-smoke/run", "--max-length", "24", "--batch-size", "8", "--learning-rate", "5e-3"),
]


def make_smoke_data(directory: Path) -> None:
    """Writes lines of documentation with the names of their modules, and a tiny encoder for them."""
    directory.mkdir(parents=True, exist_ok=True)
    records = []
    for module in (math, statistics, string, textwrap, json):
        documented = [each for _, each in inspect.getmembers(module) if inspect.getdoc(each)]
        lines = {line.strip() for each in documented for line in inspect.getdoc(each).splitlines() if len(line) > 20}
        records += [{"text": line, "label": module.__name__} for line in sorted(lines)[:60]]
    (directory / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = Tokenizer.train(iter([record["text"] for record in records]), kind="wordpiece", vocab_size=800)
    shape = {"num_layers": 1, "num_heads": 2, "model_dim": 32, "context_length": 24}
    BertModel.from_preset("bert-tiny", vocab_size=tokenizer.vocab_size, **shape).save_pretrained(directory / "encoder")
    tokenizer.save_pretrained(directory / "encoder")


def main() -> None:
    """Parses the flags, trains, and tries the model on its own texts."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--smoke", action="store_true")
    chosen, rest = first.parse_known_args()
    if chosen.smoke:
        make_smoke_data(Path("runs/classifier-smoke"))
    config = tyro.cli(
        FinetuneConfig,
        args=(SMOKE if chosen.smoke else []) + rest,
        description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )
    result = finetune(config)
    classifier = TextClassifier(result.model, result.tokenizer)
    text = "Return the square root of x."
    if config.pair is None:
        print(f"{text} -> {classifier(text)}")
    print(f"SavedModel: {classifier.export(Path('saved_models') / Path(config.directory).name)}")
    if chosen.smoke and result.metrics["validation"]["accuracy"] < 0.3:
        sys.exit("it has not learnt: five modules, and less than three of ten right")


if __name__ == "__main__":
    main()
