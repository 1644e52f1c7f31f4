"""Trains a small T5 from scratch to translate help pages from English to German, and scores it on pages held out.

    apt-get download libreoffice-help-en-us libreoffice-help-de
    for package in libreoffice-help-*.deb; do dpkg -x $package .; done
    python examples/translate_t5.py --english usr/share/libreoffice/help/en-US --german usr/share/libreoffice/help/de
    python examples/translate_t5.py --pairs pairs.jsonl
    python examples/translate_t5.py --smoke

Paragraphs with the same id on the same page are a pair; `--pairs` names a file of them: records with source, target
and page. Some pages are for the test alone. A pair is learnt once however often it occurs, and not at all if both sides
are the same. Pages share paragraphs, so the score of those that were not learnt from is told too. Every flag of `lmzoo
finetune` is one here. `--smoke` needs no data: a tiny T5 learns to count.
"""

import argparse
import html
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tyro

from lmzoo.data.records import read_records
from lmzoo.training import FinetuneConfig, finetune, make_untrained
from lmzoo.training.metrics import text_scores

VOCAB_SIZE, HELD_OUT, SPLIT_SEED = 4000, 0.02, 2026
SHAPE = {"num_layers": 3, "num_heads": 4, "head_dim": 32, "model_dim": 128, "feedforward_dim": 512}
TRAINING = """--epochs 8 --batch-size 16 --packing True --optimizer muon --learning-rate 2.5e-3 --embedding-rate 60
    --dropout-rate 0 --label-smoothing 0.1 --validation-fraction 0 --num-beams 4 --dtype mixed_bfloat16 --verbose 2"""
SMOKE = "--epochs 3 --batch-size 4 --max-length 16 --max-target-length 16 --dtype float32"
DIGITS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
PARAGRAPH = re.compile(r'<(p|h[1-6]) id="((?:par|hd)_id\w+)"[^>]*>(.*?)</\1>', re.DOTALL)


def read_page(path: Path) -> dict[str, str]:
    """The paragraphs and headings of a page by their ids, without mark-up."""
    found = {key: text.replace("<br>", " ") for _, key, text in PARAGRAPH.findall(path.read_text(encoding="utf-8"))}
    return {key: " ".join(html.unescape(re.sub("<[^>]*>", "", text)).split()) for key, text in found.items()}


def read_pages(english: Path, german: Path) -> Iterator[dict[str, Any]]:
    """The pairs of all pages that are in both directories."""
    for page in sorted(path.relative_to(english) for path in english.rglob("*.html")):
        targets = read_page(german / page) if (german / page).is_file() else {}
        for key, source in read_page(english / page).items():
            yield {"page": str(page), "source": source, "target": targets.get(key, "")}


def split(pairs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Shares the pairs out by their pages; `seen` says whether a source is among those that are learnt from."""
    pages = sorted({pair["page"] for pair in pairs})
    tested = set(random.Random(SPLIT_SEED).sample(pages, max(1, round(HELD_OUT * len(pages)))))
    parts: dict[str, dict[tuple[str, str], dict[str, Any]]] = {"train": {}, "test": {}}
    for pair in pairs:
        if pair["source"] and pair["target"] and pair["source"] != pair["target"]:
            parts["test" if pair["page"] in tested else "train"][pair["source"], pair["target"]] = pair
    seen = {source for source, _ in parts["train"]}
    return {name: [pair | {"seen": pair["source"] in seen} for pair in part.values()] for name, part in parts.items()}


def main() -> None:
    """Reads pairs, trains, and scores the translations of what was held out."""
    first = argparse.ArgumentParser(add_help=False)
    for flag in ("--english", "--german", "--pairs"):
        first.add_argument(flag, type=Path)
    first.add_argument("--smoke", action="store_true")
    chosen, rest = first.parse_known_args()
    place = Path("runs/translate-smoke" if chosen.smoke else "runs/translate")
    files = f"--train {place}/train.jsonl --test {place}/test.jsonl --model {place}/start --directory {place}/run"
    words = f"--task text-to-text {files} {TRAINING} {SMOKE if chosen.smoke else ''}".split() + rest
    config = tyro.cli(FinetuneConfig, args=words, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    if chosen.smoke:
        pairs = [
            {"page": a, "source": f"{a} {b}", "target": f"{DIGITS[a]} {DIGITS[b]}"} for a in DIGITS for b in DIGITS
        ]
    else:
        pairs = read_records(chosen.pairs).rows if chosen.pairs else list(read_pages(chosen.english, chosen.german))
    parts = split(pairs)
    place.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in part]
        (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [pair[side] for pair in parts["train"] for side in ("source", "target")]
    make_untrained(place / "start", "t5-small", texts, vocab_size=VOCAB_SIZE, **SHAPE)
    result = finetune(config)
    unseen = [row for row in read_records(result.directory / "predictions.jsonl") if not row["seen"]]
    scores = text_scores([row["target"] for row in unseen], [row["prediction"] for row in unseen])
    print(f"{len(unseen)} that were not learnt from: BLEU {scores['bleu']:.2f}, chrF {scores['chrf']:.2f}")


if __name__ == "__main__":
    main()
