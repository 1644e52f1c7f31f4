"""Training steps of GPT-2 (124M, dropout 0.1, AdamW) on 4 x 512 tokens, with and without remat="block".

Activations are what a process of 4 x 512 tokens holds at most, less what it held at most for 1 x 8 tokens: weights,
gradients, the optimizer's state and what is left in the libraries.
"""

from __future__ import annotations

import functools

import numpy as np
from harness import main, peak_mb, time_calls

ROWS, LENGTH = 4, 512


def measure(dtype: str, remat: str | None) -> dict[str, float]:
    import keras

    from lmzoo import GPTModel

    keras.utils.set_random_seed(0)
    model = GPTModel.from_preset("gpt2", dtype=dtype)
    model.compile(remat=remat)

    def step(rows: int, length: int) -> float:
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length + 1)).astype("int32")
        return float(model.train_on_batch(tokens[:, :-1], tokens[:, 1:], return_dict=True)["loss"])

    for _ in range(2):
        step(1, 8)
    model.make_train_function(force=True)
    model.reset_metrics()
    without = peak_mb()
    seconds = time_calls(lambda: step(ROWS, LENGTH), warmup=2, calls=3)
    return {
        "ms a step": 1000 * seconds,
        "tokens a second": ROWS * LENGTH / seconds,
        "peak MB": peak_mb(),
        "activations MB": peak_mb() - without,
        "loss": step(ROWS, LENGTH),
    }


if __name__ == "__main__":
    main(
        {
            f"{name} {'remat' if remat else 'plain'}": functools.partial(measure, dtype, remat)
            for name, dtype in (("float32", "float32"), ("bfloat16", "mixed_bfloat16"))
            for remat in (None, "block")
        },
        __doc__,
        ["ms a step", "tokens a second", "peak MB", "activations MB", "loss"],
    )
