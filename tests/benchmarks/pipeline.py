"""How many tokens a second the input pipeline feeds, beside what a training step of gpt2-nano takes in."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from harness import main, time_calls

TOKENS, VOCAB, CONTEXT, ROWS = 5_000_000, 4096, 256, 16


def reader() -> dict[str, float]:
    from lmzoo.data.corpus import Corpus, CorpusWriter
    from lmzoo.data.objectives import Causal
    from lmzoo.data.pipeline import Batches

    random = np.random.default_rng(0)
    lengths = random.integers(20, 2000, TOKENS // 1000)
    tokens = random.integers(0, VOCAB, lengths.sum()).astype("int32")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "corpus"
        with CorpusWriter.create(path, vocab_size=VOCAB, tokenizer_fingerprint="none") as writer:
            writer.add(tokens, lengths, num_bytes=int(lengths.sum()))
        batches = Batches(Corpus.open(path), Causal(), seq_length=CONTEXT, batch_size=ROWS)
        iterator = iter(batches.dataset())
        for _ in range(20):
            next(iterator)
        start, steps = time.perf_counter(), 1000
        for _ in range(steps):
            next(iterator)
        seconds = (time.perf_counter() - start) / steps
    return {"ms a batch": 1000 * seconds, "tokens a second": ROWS * CONTEXT / seconds}


def step() -> dict[str, float]:
    import tensorflow as tf

    from lmzoo import GPTModel

    model = GPTModel.from_preset("gpt2-nano")
    model.compile(jit_compile=False)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, CONTEXT + 1)).astype("int32")
    iterator = iter(tf.data.Dataset.from_tensors((tokens[:, :-1], tokens[:, 1:])).repeat())
    model.make_train_function()
    seconds = time_calls(lambda: float(model.train_function(iterator)["loss"]), calls=20)
    return {"ms a batch": 1000 * seconds, "tokens a second": ROWS * CONTEXT / seconds}


if __name__ == "__main__":
    main({"input pipeline": reader, "gpt2-nano step": step}, __doc__, ["ms a batch", "tokens a second"])
