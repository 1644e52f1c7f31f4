"""Trains a small T5 from scratch to translate help pages, here and in transformers, for the same time.

The data, the held-out pages, the tokenizer, the shape of the model and the batches are those of
examples/translate_t5.py, which says what they are. Each contender trains for `--minutes` and then translates the
held-out pages with 4 beams. lmzoo's run is that of the example, with as many steps as a short run before says will fit;
torch's is a plain loop with fused AdamW, a learning rate that falls to 0 with the time that is left, label smoothing,
gradients clipped to norm 1, and autocast to bfloat16 if a few steps say that it is faster; `--only torch --torch-rate`
tries another learning rate. Time is that of the training alone, with all compiling; a quiet machine is needed for it.

Pages come from Debian's packages libreoffice-help-en-us and libreoffice-help-de, by `apt-get download`; or they are
under the directory that LMZOO_TRANSLATION_PAGES names, in usr/share/libreoffice/help as the packages have them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import main, peak_mb

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

PAGES, MINUTES, SCRATCH = "LMZOO_TRANSLATION_PAGES", "LMZOO_TRANSLATION_MINUTES", "LMZOO_TRANSLATION_SCRATCH"
PACKAGES = ("libreoffice-help-en-us", "libreoffice-help-de")
RATE, TABLE_FACTOR = "LMZOO_TRANSLATION_TORCH_RATE", "LMZOO_TRANSLATION_TORCH_EMBEDDING_RATE"
LENGTH, BEAMS, SMOOTHING, ROWS, WARMUP = 128, 4, 0.1, 64, 0.1
TRIAL_STEPS = 40
COLUMNS = ["BLEU", "BLEU unseen", "chrF unseen", "train seconds", "CPU seconds", "steps", "decode seconds", "peak MB"]


def prepare(directory: Path) -> None:
    """Gets the pages, and writes train.jsonl, test.jsonl and the untrained checkpoint with its tokenizer."""
    import translate_t5 as example

    from lmzoo.training import make_untrained

    pages = Path(os.environ.get(PAGES, directory))
    if PAGES not in os.environ:
        done = subprocess.run(
            ["apt-get", "download", *PACKAGES], cwd=directory, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            print(f"skipped: the help pages cannot be downloaded: {done.stderr.strip()[-300:]}")
            raise SystemExit(0)
        for package in directory.glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(directory)], check=True)
    help_pages = pages / "usr/share/libreoffice/help"
    parts = example.split(list(example.read_pages(help_pages / "en-US", help_pages / "de")))
    for name, part in parts.items():
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in part]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [pair[side] for pair in parts["train"] for side in ("source", "target")]
    make_untrained(directory / "start", "t5-small", texts, vocab_size=example.VOCAB_SIZE, **example.SHAPE)


def lmzoo() -> dict[str, Any]:
    """The example's own run."""
    import translate_t5 as example
    import tyro

    from lmzoo.training import FinetuneConfig, finetune

    place, budget = Path(os.environ[SCRATCH]), 60.0 * float(os.environ[MINUTES])
    files = f"--train {place}/train.jsonl --model {place}/start --verbose 0 --log-every 1 --epochs 1000"

    def run(name: str, words: str) -> Any:
        text = f"--task text-to-text {example.TRAINING} {files} --directory {place}/{name} {words}"
        return finetune(
            tyro.cli(FinetuneConfig, args=text.split(), config=(tyro.conf.FlagConversionOff,)),
            say=lambda line: print(line, file=sys.stderr),
        )

    def seconds_at(name: str) -> dict[int, float]:
        lines = (place / name / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record["seconds"] for record in map(json.loads, lines) if "seconds" in record}

    run("trial", f"--max-steps {TRIAL_STEPS}")
    trial = seconds_at("trial")
    middle = TRIAL_STEPS // 2
    each = (trial[TRIAL_STEPS] - trial[middle]) / (TRIAL_STEPS - middle)
    steps = max(1, int((budget - trial[middle]) / each) + middle)
    cpu = time.process_time()
    result = run("run", f"--max-steps {steps}")
    cpu = time.process_time() - cpu

    def write(token_ids: list[list[int]], longest: int) -> Any:
        return result.model.generate(token_ids, max_new_tokens=longest, num_beams=BEAMS).numpy()

    seconds = seconds_at("run")
    return {**_scores(place, write), "train seconds": seconds[steps], "CPU seconds": cpu, "steps": steps}


def torch() -> dict[str, Any]:
    """A plain loop around transformers' model, on lmzoo's batches."""
    import torch
    import torch.nn.functional as functional
    import transformers

    from lmzoo import Tokenizer
    from lmzoo.data.labelled import LabelledBatches
    from lmzoo.data.records import read_records
    from lmzoo.data.text_to_text import encode_text_to_text

    place, budget = Path(os.environ[SCRATCH]), 60.0 * float(os.environ[MINUTES])
    peak = float(os.environ[RATE])
    torch.manual_seed(0)
    config = transformers.T5Config.from_pretrained(place / "start", dropout_rate=0.0)
    model = transformers.T5ForConditionalGeneration(config)
    examples = encode_text_to_text(
        read_records(place / "train.jsonl"),
        Tokenizer.from_pretrained(place / "start"),
        source="source",
        target="target",
        max_source_length=LENGTH,
        max_target_length=LENGTH,
    )
    batches = LabelledBatches(examples, ROWS, num_batches=10**6)
    table = model.shared.weight
    kernels = [value for value in model.parameters() if value.ndim > 1 and value is not table]
    others = [value for value in model.parameters() if value.ndim <= 1]
    groups = [
        {"params": [table], "weight_decay": 0.01, "factor": float(os.environ[TABLE_FACTOR])},
        {"params": kernels, "weight_decay": 0.01, "factor": 1.0},
        {"params": others, "weight_decay": 0.0, "factor": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)

    def train_step(number: int, rate: float, autocast: bool) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        inputs, labels, weights = batches.batch_at(number)
        given = {name: torch.from_numpy(inputs[name]) for name in ("token_ids", "padding_mask", "decoder_token_ids")}
        real = torch.from_numpy(weights) > 0
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(
                input_ids=given["token_ids"],
                attention_mask=given["padding_mask"],
                decoder_input_ids=given["decoder_token_ids"],
                use_cache=False,
            ).logits
        loss = functional.cross_entropy(
            logits[real].float(), torch.from_numpy(labels).long()[real], label_smoothing=SMOOTHING
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def seconds(autocast: bool) -> float:
        train_step(0, 0.0, autocast)
        start = time.perf_counter()
        for number in range(8):
            train_step(number, 0.0, autocast)
        return time.perf_counter() - start

    autocast = seconds(True) < seconds(False)
    optimizer.state.clear()
    start, cpu, step = time.perf_counter(), time.process_time(), 0
    while (spent := (time.perf_counter() - start) / budget) < 1.0:
        loss = train_step(step, peak * min(spent / WARMUP, (1.0 - spent) / (1.0 - WARMUP)), autocast)
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {100 * spent:.0f}% of the time, loss {loss:.3f}", file=sys.stderr)
    trained, cpu = time.perf_counter() - start, time.process_time() - cpu
    model.eval()

    def write(token_ids: list[list[int]], longest: int) -> Any:
        width = max(map(len, token_ids))
        ids, mask = (torch.zeros(len(token_ids), width, dtype=torch.long) for _ in range(2))
        for row, tokens in enumerate(token_ids):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=longest, num_beams=BEAMS, do_sample=False
            ).numpy()

    return {
        **_scores(place, write),
        "train seconds": trained,
        "CPU seconds": cpu,
        "steps": step,
        "autocast": autocast,
    }


def _scores(place: Path, write: Any) -> dict[str, Any]:
    """Translates the held-out pages with `write(token ids of sources, U) -> token ids [B, U]`."""
    import sacrebleu

    from lmzoo import Tokenizer
    from lmzoo.data.records import read_records

    tokenizer = Tokenizer.from_pretrained(place / "start")
    rows = read_records(place / "test.jsonl").rows
    sources = [
        [*ids[: LENGTH - 1], tokenizer.eos_token_id] for ids in tokenizer.encode([row["source"] for row in rows])
    ]
    order = sorted(range(len(rows)), key=lambda number: len(sources[number]))
    start = time.perf_counter()
    for first in range(0, len(rows), ROWS):
        chosen = order[first : first + ROWS]
        longest = min(LENGTH, -(-2 * len(sources[chosen[-1]]) // 32) * 32)
        texts = tokenizer.decode(write([sources[number] for number in chosen], longest))
        for number, text in zip(chosen, texts, strict=True):
            rows[number]["text"] = text
    seconds = time.perf_counter() - start
    unseen = [row for row in rows if not row["seen"]]

    def score(metric: Any, chosen: list[dict[str, Any]]) -> float:
        return metric([row["text"] for row in chosen], [[row["target"] for row in chosen]]).score

    return {
        "BLEU": score(sacrebleu.corpus_bleu, rows),
        "BLEU unseen": score(sacrebleu.corpus_bleu, unseen),
        "chrF unseen": score(sacrebleu.corpus_chrf, unseen),
        "decode seconds": seconds,
        "peak MB": peak_mb(),
    }


if __name__ == "__main__":
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--minutes", type=float, default=20.0, help="how long each contender trains")
    first.add_argument("--torch-rate", type=float, default=1e-3, help="torch's learning rate at its peak")
    first.add_argument("--torch-embedding-rate", type=float, default=60.0, help="factor of it for the token embeddings")
    chosen, rest = first.parse_known_args()
    sys.argv[1:] = rest if {"--rounds", "--worker"} & set(rest) else ["--rounds", "1", *rest]
    with tempfile.TemporaryDirectory() as scratch:
        if "--worker" not in rest:
            os.environ |= {MINUTES: str(chosen.minutes), RATE: str(chosen.torch_rate)}
            os.environ[TABLE_FACTOR] = str(chosen.torch_embedding_rate)
        if SCRATCH not in os.environ:
            os.environ[SCRATCH] = scratch
            if not {"-h", "--help"} & set(rest):
                prepare(Path(scratch))
        main({"lmzoo": lmzoo, "torch": torch}, __doc__ or "", COLUMNS)
