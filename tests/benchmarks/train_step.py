"""One training step of a GPT-2 (4 layers, 256 wide, 8,192 tokens, 16 rows of 128): same shapes, same data, AdamW."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from harness import main, peak_mb, time_calls

LAYERS, HEADS, WIDTH, VOCAB, CONTEXT, ROWS = 4, 4, 256, 8192, 128, 16


def batch() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, CONTEXT + 1)).astype("int32")
    return tokens[:, :-1], tokens[:, 1:]


def figures(seconds: float, loss: float) -> dict[str, float]:
    return {
        "ms a step": 1000 * seconds,
        "tokens a second": ROWS * CONTEXT / seconds,
        "peak MB": peak_mb(),
        "loss": loss,
    }


def make_gpt(dtype: str) -> Any:
    """lmzoo's model of the size that is measured, not compiled."""
    import keras

    from lmzoo import GPTModel

    keras.utils.set_random_seed(0)
    return GPTModel.from_preset(
        "gpt2",
        dtype=dtype,
        vocab_size=VOCAB,
        context_length=CONTEXT,
        num_layers=LAYERS,
        num_heads=HEADS,
        model_dim=WIDTH,
        dropout_rate=0.0,
        eos_token_id=None,
    )


def lmzoo(dtype: str, jit_compile: bool = False) -> dict[str, float]:
    import tensorflow as tf

    model = make_gpt(dtype)
    model.compile(jit_compile=jit_compile)
    inputs, labels = batch()
    data = tf.data.Dataset.from_tensors((inputs, labels, np.ones(labels.shape, "float32"))).repeat()
    return _keras_figures(model, data)


def keras_hub(dtype: str) -> dict[str, float]:
    import keras
    import keras_hub as hub
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=VOCAB,
        num_layers=LAYERS,
        num_heads=HEADS,
        hidden_dim=WIDTH,
        intermediate_dim=4 * WIDTH,
        dropout=0.0,
        max_sequence_length=CONTEXT,
        dtype=dtype,
    )
    model = hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.AdamW(3e-4, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[],
        weighted_metrics=[],
        jit_compile=False,
    )
    inputs, labels = batch()
    features = {"token_ids": inputs, "padding_mask": np.ones(inputs.shape, "bool")}
    data = tf.data.Dataset.from_tensors((features, labels, np.ones(labels.shape, "float32"))).repeat()
    return _keras_figures(model, data)


def _keras_figures(model, data) -> dict[str, float]:
    model.make_train_function()
    iterator = iter(data)
    seconds = time_calls(lambda: {name: float(value) for name, value in model.train_function(iterator).items()})
    return figures(seconds, float(model.train_function(iterator)["loss"]))


def torch(dtype: str) -> dict[str, float]:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    inputs, labels = (torch.tensor(array.astype("int64")) for array in batch())
    loss = torch.tensor(0.0)

    def step() -> None:
        nonlocal loss
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed_bfloat16"):
            logits = model(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB).float(), labels.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return figures(time_calls(step), float(loss))


if __name__ == "__main__":
    main(
        {
            "lmzoo float32": functools.partial(lmzoo, "float32"),
            "lmzoo float32 XLA": functools.partial(lmzoo, "float32", True),
            "keras-hub float32": functools.partial(keras_hub, "float32"),
            "torch float32": functools.partial(torch, "float32"),
            "lmzoo bfloat16": functools.partial(lmzoo, "mixed_bfloat16"),
            "keras-hub bfloat16": functools.partial(keras_hub, "mixed_bfloat16"),
            "torch bfloat16": functools.partial(torch, "mixed_bfloat16"),
        },
        __doc__,
        ["ms a step", "tokens a second", "peak MB", "loss"],
    )
