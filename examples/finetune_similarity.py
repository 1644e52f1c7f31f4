"""Fine-tunes an encoder to give sentences that mean the same vectors that are near to each other.

    python examples/finetune_similarity.py --model MiniLM --train tfds:glue/stsb --text sentence1 --pair sentence2 \\
        --label label --max-score 5
    python examples/finetune_similarity.py --model MiniLM --train pairs.jsonl --batch-size 64
    python examples/finetune_similarity.py --smoke

With scores (`--label`) it learns cosines; without, that the two texts of a pair belong together and to no other in the
batch. Every flag of `lmzoo finetune` is one here. `--smoke` needs no data and no weights: a tiny BERT with random
weights learns which docstring is that of which function.
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
from lmzoo.pipelines import TextEmbedder
from lmzoo.training import FinetuneConfig, finetune

PLACE = Path("runs/similarity-smoke")

SMOKE = [
    *("--model", str(PLACE / "encoder"), "--train", str(PLACE / "pairs.jsonl"), "--directory", str(PLACE / "run")),
    *("--max-length", "32", "--learning-rate", "3e-3", "--epochs", "8", "--batch-size", "16"),
]


def make_smoke_data(directory: Path) -> None:
    """Writes the first and the second half of docstrings as pairs, and a tiny encoder for them."""
    directory.mkdir(parents=True, exist_ok=True)
    records = []
    for module in (math, statistics, string, textwrap, json):
        for name, each in inspect.getmembers(module, callable):
            words = (inspect.getdoc(each) or "").split()
            if len(words) > 8:
                records.append({"text": f"{name} {' '.join(words[1:30:2])}", "pair": " ".join(words[0:30:2])})
    (directory / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [text for record in records for text in record.values()]
    tokenizer = Tokenizer.train(iter(texts), kind="wordpiece", vocab_size=800)
    shape = {"num_layers": 1, "num_heads": 2, "model_dim": 32, "context_length": 64}
    BertModel.from_preset("bert-tiny", vocab_size=tokenizer.vocab_size, **shape).save_pretrained(directory / "encoder")
    tokenizer.save_pretrained(directory / "encoder")


def main() -> None:
    """Parses the flags, trains, and tries and exports the model."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--smoke", action="store_true")
    chosen, rest = first.parse_known_args()
    if chosen.smoke:
        make_smoke_data(PLACE)
    config = tyro.cli(
        FinetuneConfig,
        args=["--task", "embed", *(SMOKE if chosen.smoke else []), *rest],
        description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )
    result = finetune(config)
    embedder = TextEmbedder(result.model, result.tokenizer)
    vectors = embedder(["Return the square root of x.", "Square root of a number.", "Wrap a paragraph of text."])
    print("cosines to the first of three sentences:", (vectors @ vectors[0]).round(3).tolist())
    print(f"SavedModel: {embedder.export(Path('saved_models') / Path(config.directory).name)}")
    if chosen.smoke and result.metrics["validation"]["mrr"] < 0.3:
        sys.exit("it has not learnt which halves belong together")


if __name__ == "__main__":
    main()
