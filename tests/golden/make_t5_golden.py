"""Makes tests/golden/t5/: small T5 checkpoints of both generations and what transformers computes with them.

So tests need neither torch nor transformers. Run it with the `parity` extra installed:

    python tests/golden/make_t5_golden.py

The parity tests use `reference` live, on configurations that nobody chose.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent / "t5"
SHAPE = {
    "vocab_size": 31,
    "d_model": 8,
    "d_kv": 3,
    "d_ff": 12,
    "num_heads": 2,
    "num_layers": 2,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 5,
}
CASES = {
    "t5": {"feed_forward_proj": "relu", "untied": False},
    "t5-1.1": {"feed_forward_proj": "gated-gelu", "untied": True, "num_decoder_layers": 1},
    "mt5": {"feed_forward_proj": "gated-gelu", "untied": True, "kind": "MT5"},
}
BEAMS = {"max_new_tokens": 8, "num_beams": 4, "length_penalty": 0.6}


def make_model(seed, *, untied, scale=0.3, kind="T5", **config):
    """A T5 of transformers in float32 whose every weight is random; with an output head of its own if it is untied."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = {"dropout_rate": 0.0, "decoder_start_token_id": 0, "tie_word_embeddings": not untied, **config}
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    model = model_class(getattr(transformers, f"{kind}Config")(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if untied:
            model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.shared.weight))
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def make_batch(seed, vocab_size, rows, source, target, padding):
    """Source [B, T] with a mask whose padding is on the "left", the "right", or no side (None), and labels [B, U]."""
    random = np.random.default_rng(seed)
    mask, counts = np.ones((rows, source), bool), np.ones((rows, target), bool)
    for row in range(rows if padding else 0):
        size = int(random.integers(0, source))
        mask[row, slice(0, size) if padding == "left" else slice(source - size, source)] = False
        counts[row, int(random.integers(1, target + 1)) :] = False
    return {
        "token_ids": random.integers(0, vocab_size, (rows, source)).astype("int32"),
        "padding_mask": mask,
        "labels": random.integers(0, vocab_size, (rows, target)).astype("int32"),
        "counts": counts,
    }


def reference(model, batch):
    """Encoder states, logits, mean loss over the labels that count, and gradients by name, as transformers has them."""
    import torch

    token_ids, mask, labels, counts = (
        torch.tensor(batch[name]) for name in ("token_ids", "padding_mask", "labels", "counts")
    )
    model.zero_grad()
    arguments = {"input_ids": token_ids.long(), "attention_mask": mask.long()}
    states = model.encoder(**arguments).last_hidden_state
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)  # Not as transformers does it: it takes -100 for the pad token.
    logits = model(**arguments, decoder_input_ids=shifted.long()).logits
    loss = torch.nn.functional.cross_entropy(logits[counts], labels[counts].long())
    loss.backward()
    return {
        "states": states.detach().numpy(),
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        **{f"gradient.{name}": parameter.grad.numpy() for name, parameter in model.named_parameters()},
    }


def generated(model, batch, **options):
    """New tokens [B * n, max_new_tokens] as transformers gives them, padded with 0, and their scores."""
    import torch

    result = model.generate(
        torch.tensor(batch["token_ids"]).long(),
        attention_mask=torch.tensor(batch["padding_mask"]).long(),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    tokens = result.sequences.numpy()[:, 1:]
    scores = result.sequences_scores.numpy() if "sequences_scores" in result else None
    return padded_after_end(tokens, options["max_new_tokens"], model.config.eos_token_id), scores


def padded_after_end(tokens, width, end):
    """`tokens` [R, U] as [R, width] with 0 after the first `end`: transformers fills finished beams with either."""
    rows = np.zeros((len(tokens), width), "int32")
    rows[:, : tokens.shape[1]] = tokens
    before = np.cumsum(rows == end, axis=1) - (rows == end)
    return np.where(before > 0, 0, rows)


def main():
    """Writes checkpoint, batch and answers of each case."""
    import safetensors.numpy

    for seed, (name, options) in enumerate(CASES.items(), 2):
        model = make_model(seed, **{**SHAPE, **options})
        model.save_pretrained(DIRECTORY / name)
        (DIRECTORY / name / "generation_config.json").unlink()
        batch = make_batch(seed, SHAPE["vocab_size"], 3, 7, 5, ("right", "left")[seed % 2])
        answers = reference(model, batch)
        first = "encoder.block.0.layer.0.SelfAttention"
        kept = ("shared.weight", f"{first}.k.weight", f"{first}.relative_attention_bias.weight")
        kept = ("states", "logits", "loss", *(f"gradient.{name}" for name in kept))
        answers = {key: np.ascontiguousarray(answers[key]) for key in kept}
        answers["greedy"], _ = generated(model, batch, max_new_tokens=8)
        answers["beams"], answers["scores"] = generated(model, batch, num_return_sequences=4, **BEAMS)
        safetensors.numpy.save_file({**batch, **answers}, DIRECTORY / name / "answers.safetensors")
    total = sum(path.stat().st_size for path in DIRECTORY.rglob("*") if path.is_file())
    print(f"{DIRECTORY}: {total} bytes in {len(os.listdir(DIRECTORY))} cases")


if __name__ == "__main__":
    main()
