"""Writes sampling.npz: scores after Hugging Face's logits processors, for tests/generation/test_sampling.py.

Run `python tests/golden/make_sampling_golden.py` with the `parity` extra installed. The parity test calls
`reference_scores` live, on other numbers.
"""

from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 48
EOS_TOKEN_ID = 7
GOLDEN = Path(__file__).with_name("sampling.npz")

# Number of new tokens that each row has, and the options as fields of SamplingOptions.
CASES: list[tuple[int, dict[str, Any]]] = [
    (0, {"temperature": 0.7}),
    (0, {"top_k": 5}),
    (0, {"top_k": 1000}),
    (0, {"top_p": 0.9}),
    (0, {"top_p": 0.05}),
    (0, {"min_p": 0.1}),
    (3, {"repetition_penalty": 1.3}),
    (3, {"repetition_penalty": 0.8}),
    (3, {"no_repeat_ngram_size": 1}),
    (3, {"no_repeat_ngram_size": 2}),
    (3, {"no_repeat_ngram_size": 3}),
    (2, {"min_new_tokens": 3}),
    (3, {"min_new_tokens": 3}),
    (0, {"suppressed_token_ids": (1, 5, 40)}),
    (3, {"bad_words_ids": ((5,), (2, 3), (4, 4), (0, 1, 2), (1, 1, 7), (3, 0, 40))}),
    (0, {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.05}),
    (0, {"temperature": 0.5, "top_p": 0.95, "min_p": 0.02}),
    (
        3,
        {
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 2,
            "suppressed_token_ids": (0, 9),
            "min_new_tokens": 5,
            "temperature": 0.8,
            "top_k": 20,
            "top_p": 0.9,
            "min_p": 0.01,
        },
    ),
]


def inputs(seed: int, rows: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [B, V], histories [B, S] of few different tokens (so that n-grams repeat), and their lengths [B]."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, VOCAB_SIZE)).astype(np.float32) * 3
    history = random.integers(0, 6, size=(rows, 24)).astype(np.int32)
    lengths = random.integers(4, 25, size=rows).astype(np.int32)
    # Make what would repeat likely, so that the rules have something to do.
    logits[:, :8] += 2
    return logits, history, lengths


def reference_scores(
    logits: np.ndarray, history: np.ndarray, lengths: np.ndarray, num_new_tokens: int, options: dict[str, Any]
) -> np.ndarray:
    """The same options through Hugging Face's processors, row by row without padding, in `generate`'s own order."""
    import torch
    from transformers import GenerationConfig, GenerationMixin, GPT2Config, GPT2LMHeadModel

    names = {"suppressed_token_ids": "suppress_tokens"}
    settings = {names.get(name, name): value for name, value in options.items()}
    settings["suppress_tokens"] = list(settings["suppress_tokens"]) if "suppress_tokens" in settings else None
    settings["bad_words_ids"] = [list(word) for word in settings.get("bad_words_ids", ())] or None
    settings = {"top_k": 0, **settings}
    model: GenerationMixin = GPT2LMHeadModel(
        GPT2Config(vocab_size=logits.shape[1], n_embd=4, n_layer=1, n_head=1, n_positions=8)
    )
    rows = []
    for row, length in enumerate(lengths):
        config = GenerationConfig(do_sample=True, eos_token_id=EOS_TOKEN_ID, pad_token_id=0, **settings)
        model._prepare_special_tokens(config, device="cpu")
        processors = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=int(length) - num_new_tokens,
            device="cpu",
        )
        token_ids = torch.tensor(history[row : row + 1, :length], dtype=torch.long)
        rows.append(processors(token_ids, torch.tensor(logits[row : row + 1])).numpy()[0])
    return np.stack(rows)


if __name__ == "__main__":
    arrays = dict(zip(("logits", "history", "lengths"), inputs(seed=0), strict=True))
    scores = [reference_scores(*arrays.values(), *case) for case in CASES]
    np.savez_compressed(GOLDEN, scores=np.stack(scores), **arrays)
    print(f"{GOLDEN}: {len(CASES)} cases, {GOLDEN.stat().st_size} bytes")
