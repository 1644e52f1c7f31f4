"""Makes tests/golden/gpt2/: small GPT-2 checkpoints and what transformers computes with them.

So tests need neither torch nor transformers. Run it with the `parity` extra installed:

    python tests/golden/make_gpt2_golden.py

The parity tests use `reference` live, on configurations that nobody chose.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent / "gpt2"
CASES = {
    "published": {"activation_function": "gelu_new", "n_inner": None, "layer_norm_epsilon": 1e-5},
    "other": {"activation_function": "gelu", "n_inner": 12, "layer_norm_epsilon": 1e-3, "n_head": 1},
}
SHAPE = {"vocab_size": 31, "n_positions": 10, "n_layer": 2, "n_head": 2, "n_embd": 8}


def make_model(seed, **config):
    """A GPT-2 of transformers in float32 whose every weight, biases included, is random."""
    import torch
    import transformers

    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**ids, **config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_batch(seed, vocab_size, rows, length, padding):
    """Token ids and labels [B, T], and a mask with padding on the "left", the "right", or no side (None)."""
    random = np.random.default_rng(seed)
    token_ids, labels = random.integers(0, vocab_size, (2, rows, length)).astype("int32")
    mask = np.ones((rows, length), bool)
    if padding:
        for row in range(rows):
            size = int(random.integers(0, length))
            mask[row, slice(0, size) if padding == "left" else slice(length - size, length)] = False
    return {"token_ids": token_ids, "padding_mask": mask, "labels": labels}


def reference(model, batch):
    """Logits, mean loss over the labels that are not padding, and gradients by name, as transformers has them."""
    import torch

    token_ids, mask, labels = (torch.tensor(batch[name]) for name in ("token_ids", "padding_mask", "labels"))
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    model.zero_grad()
    logits = model(token_ids.long(), attention_mask=mask.long(), position_ids=positions).logits
    loss = torch.nn.functional.cross_entropy(logits[mask], labels[mask].long())
    loss.backward()
    parameters = model.transformer.named_parameters()
    return {
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        **{f"gradient.{name}": parameter.grad.numpy() for name, parameter in parameters},
    }


def main():
    """Writes checkpoint, batch and answers of each case."""
    import safetensors.numpy

    for seed, (name, options) in enumerate(CASES.items(), 2):
        model = make_model(seed, **{**SHAPE, **options})
        model.save_pretrained(DIRECTORY / name)
        (DIRECTORY / name / "generation_config.json").unlink()
        batch = make_batch(seed, SHAPE["vocab_size"], rows=3, length=7, padding=("right", "left")[seed % 2])
        answers = reference(model, batch)
        kept = ("logits", "loss", "gradient.wte.weight", "gradient.h.0.attn.c_attn.weight")
        answers = {key: np.ascontiguousarray(answers[key]) for key in kept}
        safetensors.numpy.save_file({**batch, **answers}, DIRECTORY / name / "answers.safetensors")
    total = sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file())
    print(f"{DIRECTORY}: {total} bytes in {len(os.listdir(DIRECTORY))} cases")


if __name__ == "__main__":
    main()
