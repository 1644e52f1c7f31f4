"""Greedy decoding of the 124M GPT-2 with random weights: 64 new tokens after 16, for 1 and 8 rows, from a cache."""

from __future__ import annotations

import functools
import time

import numpy as np
from harness import main, peak_mb

PROMPT, NEW, VOCAB = 16, 64, 50257


def prompts(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (rows, PROMPT)).astype("int32")


def figures(generate, rows: int) -> dict[str, float]:
    """Seconds of a whole generation, and tokens a second: the best of three, after one that compiles."""
    generate()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        generate()
        seconds.append(time.perf_counter() - start)
    return {"ms a token": 1000 * min(seconds) / NEW, "tokens a second": rows * NEW / min(seconds), "peak MB": peak_mb()}


def lmzoo(dtype: str, rows: int) -> dict[str, float]:
    from lmzoo import GPTModel

    model = GPTModel.from_preset("gpt2", dtype=dtype, eos_token_id=None)
    ids = prompts(rows)
    return figures(lambda: model.generate(ids, max_new_tokens=NEW, temperature=0).numpy(), rows)


def keras_hub(dtype: str, rows: int) -> dict[str, float]:
    import keras_hub as hub

    backbone = hub.models.GPT2Backbone(
        vocabulary_size=VOCAB, num_layers=12, num_heads=12, hidden_dim=768, intermediate_dim=3072, dtype=dtype
    )
    model = hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")
    ids = np.zeros((rows, PROMPT + NEW), "int32")
    ids[:, :PROMPT] = prompts(rows)
    mask = np.zeros(ids.shape, "bool")
    mask[:, :PROMPT] = True
    return figures(lambda: model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None), rows)


def torch(dtype: str, rows: int) -> dict[str, float]:
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(getattr(torch, dtype))
    ids = torch.tensor(prompts(rows).astype("int64"))
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )

    def generate() -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)

    return figures(generate, rows)


if __name__ == "__main__":
    main(
        {
            f"{name} {dtype} {rows} row{'s' if rows > 1 else ''}": functools.partial(run, dtype, rows)
            for dtype in ("float32", "bfloat16")
            for rows in (1, 8)
            for name, run in (("lmzoo", lmzoo), ("keras-hub", keras_hub), ("torch", torch))
        },
        __doc__,
        ["ms a token", "tokens a second", "peak MB"],
    )
