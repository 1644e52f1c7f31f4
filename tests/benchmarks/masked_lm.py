"""A masked-LM training step of bert-small's size (4 layers, 512 wide, 30,522 tokens) on the help texts of Python.

All read the same documents in pieces of 126 tokens at most, 15% of them hidden, 16 rows of up to 128 a step, AdamW. A
second is counted by the tokens that come from text: neither padding nor special tokens. lmzoo packs several documents
into a row; the padded contenders have one in each, torch padded to the longest of its batch.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import main, peak_mb

LAYERS, HEADS, WIDTH, VOCAB, LENGTH, ROWS = 4, 8, 512, 30_522, 128, 16
WARMUP, STEPS = 3, 20


def batches(packing: str) -> list[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    """Batches of the embedded corpus, in a random order; all contenders of a packing get the same ones."""
    from lmzoo.data.masking import MaskedLM, TokenFacts
    from lmzoo.data.pipeline import Batches
    from lmzoo.data.prepare import prepare
    from lmzoo.data.sources import read_documents
    from lmzoo.data.tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Tokenizer.train(read_documents(["pydoc"]), kind="wordpiece", vocab_size=VOCAB)
        prepared = prepare(["pydoc"], tokenizer, Path(directory) / "corpus")
        objective = MaskedLM(TokenFacts.of(tokenizer))
        made = Batches(
            prepared.train,
            objective,
            seq_length=LENGTH,
            batch_size=ROWS,
            packing=packing,
        )
        return [made.batch_at(number) for number in range(WARMUP + STEPS)]


def figures(step: Any, made: list[Any]) -> dict[str, float]:
    """Takes a step with every batch, and counts those after the warm-up."""
    numbers = itertools.count()
    for _ in range(WARMUP):
        step(next(numbers))
    start, loss = time.perf_counter(), 0.0
    for _ in range(STEPS):
        loss = step(next(numbers))
    seconds = time.perf_counter() - start
    tokens = sum(text_tokens(inputs) for inputs, _, _ in made[WARMUP:])
    return {
        "text tokens/s": tokens / seconds,
        "ms a step": 1000 * seconds / STEPS,
        "text share %": 100 * tokens / (STEPS * ROWS * LENGTH),
        "peak MB": peak_mb(),
        "loss": loss,
    }


def text_tokens(inputs: dict[str, np.ndarray]) -> int:
    """Tokens of a batch that come from text: all but padding, and the two special tokens around each piece."""
    segment_ids = inputs["segment_ids"]
    pieces = sum(len(np.unique(row[row > 0])) for row in segment_ids)
    return int((segment_ids > 0).sum()) - 2 * pieces


def lmzoo(dtype: str, packing: str) -> dict[str, float]:
    import keras
    import tensorflow as tf

    from lmzoo import BertModel

    keras.utils.set_random_seed(0)
    model = BertModel.from_preset("bert-small", dtype=dtype, dropout_rate=0.0)
    model.compile(jit_compile=False)
    made = batches(packing)
    data = tf.data.Dataset.from_generator(
        lambda: made,
        output_signature=tuple(
            {name: tf.TensorSpec(value.shape, value.dtype) for name, value in part.items()}
            if isinstance(part, dict)
            else tf.TensorSpec(part.shape, part.dtype)
            for part in made[0]
        ),
    ).prefetch(2)
    return keras_figures(model, data, made)


def keras_hub(dtype: str) -> dict[str, float]:
    import keras
    import keras_hub as hub
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    backbone = hub.models.BertBackbone(
        vocabulary_size=VOCAB,
        num_layers=LAYERS,
        num_heads=HEADS,
        hidden_dim=WIDTH,
        intermediate_dim=4 * WIDTH,
        dropout=0.0,
        max_sequence_length=512,
        dtype=dtype,
    )
    tokens = backbone.input
    places = keras.Input((None,), dtype="int32", name="mask_positions")
    head = hub.layers.MaskedLMHead(
        vocabulary_size=VOCAB,
        token_embedding=backbone.token_embedding,
        intermediate_activation="gelu",
        dtype=dtype,
    )
    scores = head(backbone.output["sequence_output"], mask_positions=places)
    model = keras.Model({**tokens, "mask_positions": places}, scores)
    model.compile(
        optimizer=keras.optimizers.AdamW(3e-4, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[],
        weighted_metrics=[],
        jit_compile=False,
    )
    made = batches("pad")

    def read() -> Any:
        for inputs, labels, weights in made:
            token_ids = inputs["token_ids"]
            yield (
                {
                    "token_ids": token_ids,
                    "segment_ids": np.zeros_like(token_ids),
                    "padding_mask": inputs["segment_ids"] > 0,
                    "mask_positions": inputs["mask_positions"],
                },
                labels,
                weights,
            )

    row, masked = (None, LENGTH), (None, None)
    specs = {name: tf.TensorSpec(row, "int32") for name in ("token_ids", "segment_ids")}
    specs |= {"padding_mask": tf.TensorSpec(row, "bool"), "mask_positions": tf.TensorSpec(masked, "int32")}
    signature = (specs, tf.TensorSpec(masked, "int32"), tf.TensorSpec(masked, "float32"))
    return keras_figures(model, tf.data.Dataset.from_generator(read, output_signature=signature).prefetch(2), made)


def keras_figures(model: Any, data: Any, made: list[Any]) -> dict[str, float]:
    model.make_train_function()
    iterator = iter(data)
    return figures(lambda number: float(model.train_function(iterator)["loss"]), made)


def torch(dtype: str) -> dict[str, float]:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    made = batches("pad")
    tensors = []
    for inputs, labels, weights in made:
        mask = inputs["segment_ids"] > 0
        width = int(mask.sum(1).max())
        all_labels = np.full(mask.shape, -100)
        rows, columns = np.nonzero(weights)
        all_labels[rows, inputs["mask_positions"][rows, columns]] = labels[rows, columns]
        arrays = (inputs["token_ids"], mask, all_labels)
        tensors.append([torch.tensor(array[:, :width].astype("int64")) for array in arrays])

    def step(number: int) -> float:
        token_ids, mask, labels = tensors[number]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed_bfloat16"):
            loss = model(token_ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return figures(step, made)


if __name__ == "__main__":
    main(
        {
            f"{name} {dtype.removeprefix('mixed_')}": functools.partial(run, dtype, *more)
            for dtype in ("float32", "mixed_bfloat16")
            for name, run, *more in (
                ("lmzoo packed", lmzoo, "best-fit"),
                ("lmzoo padded", lmzoo, "pad"),
                ("keras-hub", keras_hub),
                ("torch", torch),
            )
        },
        __doc__,
        ["text tokens/s", "ms a step", "text share %", "peak MB", "loss"],
    )
