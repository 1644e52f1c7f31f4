"""Fine-tunes an encoder to tag words, as for named entities, and scores whole entities as CoNLL does.

    python examples/finetune_tagger.py --model bert --train train.conll --validation dev.conll --test test.conll
    python examples/finetune_tagger.py --model bert --train tfds:conll2003 --label ner --validation tfds:conll2003@dev
    python examples/finetune_tagger.py --smoke

Every flag of `lmzoo finetune` is one here. `--smoke` needs no data and no weights: a tiny BERT with random weights
learns which words of Python code are keywords and which are numbers.
"""

import argparse
import inspect
import io
import json
import keyword
import os
import statistics
import sys
import textwrap
import token
import tokenize
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tyro

from lmzoo import BertModel, Tokenizer
from lmzoo.pipelines import TokenClassifier
from lmzoo.training import FinetuneConfig, finetune

PLACE = Path("runs/tagger-smoke")

SMOKE = [
    *("--model", str(PLACE / "encoder"), "--train", str(PLACE / "code.jsonl"), "--directory", str(PLACE / "run")),
    *("--max-length", "48", "--learning-rate", "5e-3", "--epochs", "4"),
]


def make_smoke_data(directory: Path) -> None:
    """Writes lines of code as words with tags, and a tiny encoder for them."""
    directory.mkdir(parents=True, exist_ok=True)
    lines: dict[int, list[tokenize.TokenInfo]] = {}
    source = inspect.getsource(statistics) + inspect.getsource(textwrap)
    for item in tokenize.generate_tokens(io.StringIO(source).readline):
        if item.type in (token.NAME, token.NUMBER, token.OP):
            lines.setdefault(item.start[0], []).append(item)
    records = []
    for items in lines.values():
        kinds = {token.NUMBER: "B-NUMBER"}
        tags = ["B-KEYWORD" if keyword.iskeyword(item.string) else kinds.get(item.type, "O") for item in items]
        records.append({"tokens": [item.string for item in items], "tags": tags})
    (directory / "code.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [" ".join(record["tokens"]) for record in records]
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
        args=["--task", "tag", *(SMOKE if chosen.smoke else []), *rest],
        description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )
    result = finetune(config)
    tagger = TokenClassifier(result.model, result.tokenizer)
    text = "return 3 if x else y"
    print(f"{text} -> {tagger(text)}")
    print(f"SavedModel: {tagger.export(Path('saved_models') / Path(config.directory).name)}")
    if chosen.smoke and result.metrics["validation"]["f1"] < 0.8:
        sys.exit("it has not learnt which words are keywords and numbers")


if __name__ == "__main__":
    main()
