"""Fine-tunes an encoder to find the answers to questions in a text, and scores it as SQuAD does.

    python examples/finetune_qa.py --model bert --train train-v2.0.json --validation dev-v2.0.json --epochs 2
    python examples/finetune_qa.py --model bert --train tfds:squad --validation tfds:squad@validation --epochs 2
    python examples/finetune_qa.py --smoke

Every flag of `lmzoo finetune` is one here. `--smoke` needs no data and no weights: a tiny BERT with random weights
learns to find who is where in made-up sentences, some of which do not say.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tyro

from lmzoo import BertModel, Tokenizer
from lmzoo.pipelines import QuestionAnswerer
from lmzoo.training import FinetuneConfig, finetune

PLACE = Path("runs/qa-smoke")
NAMES = ["ada", "alan", "grace", "john", "mary", "paul", "rosa", "tim"]
PLACES = ["athens", "berlin", "lima", "oslo", "paris", "quito", "rome", "tokyo"]

SMOKE = [
    *("--model", str(PLACE / "encoder"), "--train", str(PLACE / "questions.jsonl"), "--directory", str(PLACE / "run")),
    *("--max-length", "32", "--learning-rate", "5e-3", "--epochs", "2"),
]


def make_smoke_data(directory: Path) -> None:
    """Writes questions with their texts and answers, and a tiny encoder for them."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    records = []
    for _ in range(600):
        name, other = generator.sample(NAMES, 2)
        place = generator.choice(PLACES)
        knows = generator.random() < 0.8
        context = f"{other} is happy today . {name} is {f'in {place}' if knows else 'tired'} ."
        answers = [{"text": place, "answer_start": context.index(place)}] if knows else []
        records.append({"question": "where is somebody ?", "context": context, "answers": answers})
    (directory / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [f"{record['question']} {record['context']}" for record in records]
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
        args=["--task", "answer", *(SMOKE if chosen.smoke else []), *rest],
        description=__doc__,
        config=(tyro.conf.FlagConversionOff,),
    )
    result = finetune(config)
    answerer = QuestionAnswerer(result.model, result.tokenizer, no_answer_threshold=0.0)
    question, context = "where is somebody ?", "paul is happy today . rosa is in lima ."
    print(f"{question} {context} -> {answerer(question, context)}")
    print(f"SavedModel: {answerer.export(Path('saved_models') / Path(config.directory).name)}")
    if chosen.smoke and result.metrics["validation"]["f1"] < 0.6:
        sys.exit("it has not learnt where the places stand")


if __name__ == "__main__":
    main()
