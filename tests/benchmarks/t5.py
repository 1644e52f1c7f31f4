"""T5-small (60.5M), random weights: a training step of 4 rows of span corruption, 512 to 114 tokens, with AdamW; and 64
tokens written for each of 8 sources of 64 tokens, greedily and by four beams.

keras-hub's T5 has neither a head nor a decoding step: its step uses its own embedding as the head, and its greedy
decoding runs the whole backbone for each token. Tokens of a training step are those of both sides.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
from harness import main, peak_mb, time_calls

VOCAB, ROWS, SOURCE, TARGET = 32_128, 4, 512, 114
WRITTEN_ROWS, READ, NEW = 8, 64, 64


def batch() -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(0)
    return tuple(numbers.integers(2, VOCAB, (ROWS, length)).astype("int32") for length in (SOURCE, TARGET))


def sources() -> np.ndarray:
    return np.random.default_rng(1).integers(2, VOCAB, (WRITTEN_ROWS, READ)).astype("int32")


def shifted(labels: np.ndarray) -> np.ndarray:
    """What a decoder reads: the start token, then all labels but the last."""
    return np.concatenate([np.zeros_like(labels[:, :1]), labels[:, :-1]], axis=1)


def step_figures(seconds: float, loss: float) -> dict[str, float]:
    tokens = ROWS * (SOURCE + TARGET)
    return {"ms": 1000 * seconds, "tokens a second": tokens / seconds, "peak MB": peak_mb(), "loss": loss}


def written_figures(write: Any, calls: int = 3) -> dict[str, float]:
    """The best of some calls, after one that compiles."""
    write()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        write()
        seconds.append(time.perf_counter() - start)
    tokens = WRITTEN_ROWS * NEW
    return {"ms": 1000 * min(seconds), "tokens a second": tokens / min(seconds), "peak MB": peak_mb()}


# -- lmzoo


def lmzoo_step(dtype: str) -> dict[str, float]:
    import keras
    import tensorflow as tf

    from lmzoo import T5Model

    keras.utils.set_random_seed(0)
    model = T5Model.from_preset("t5-small", dtype=dtype, dropout_rate=0.0)
    model.compile()
    source, labels = batch()
    inputs = {"token_ids": source, "padding_mask": np.ones(source.shape, bool), "decoder_token_ids": shifted(labels)}
    data = tf.data.Dataset.from_tensors((inputs, labels, np.ones(labels.shape, "float32"))).repeat()
    return _keras_figures(model, data)


def lmzoo_write(dtype: str, num_beams: int) -> dict[str, float]:
    from lmzoo import T5Model

    model = T5Model.from_preset("t5-small", dtype=dtype, eos_token_id=None)
    search = {"num_beams": num_beams} if num_beams > 1 else {"temperature": 0}
    return written_figures(lambda: model.generate(sources(), max_new_tokens=NEW, **search).numpy())


# -- keras-hub


def _hub_backbone(dtype: str) -> Any:
    import keras
    import keras_hub as hub

    keras.utils.set_random_seed(0)
    return hub.models.T5Backbone(
        vocabulary_size=VOCAB,
        num_layers=6,
        num_heads=8,
        hidden_dim=512,
        intermediate_dim=2048,
        dropout=0.0,
        use_gated_activation=False,
        dtype=dtype,
    )


def _hub_inputs(source: Any, target: Any) -> dict[str, Any]:
    return {
        "encoder_token_ids": source,
        "encoder_padding_mask": np.ones(source.shape, "int32"),
        "decoder_token_ids": target,
        "decoder_padding_mask": np.ones(target.shape, "int32"),
    }


def keras_hub_step(dtype: str) -> dict[str, float]:
    import keras
    import tensorflow as tf

    backbone = _hub_backbone(dtype)
    hidden = backbone.output["decoder_sequence_output"] * 512**-0.5
    logits = keras.ops.cast(backbone.token_embedding(hidden, reverse=True), "float32")
    model = keras.Model(backbone.input, logits)
    model.compile(
        optimizer=keras.optimizers.AdamW(3e-4, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    source, labels = batch()
    data = tf.data.Dataset.from_tensors((_hub_inputs(source, shifted(labels)), labels)).repeat()
    return _keras_figures(model, data)


def keras_hub_write(dtype: str) -> dict[str, float]:
    import tensorflow as tf

    backbone = _hub_backbone(dtype)
    table = backbone.token_embedding.embeddings

    @tf.function(autograph=False)
    def scores(source: Any, target: Any, place: Any) -> Any:
        inputs = {name: tf.convert_to_tensor(value) for name, value in _hub_inputs(source, target).items()}
        hidden = backbone(inputs)["decoder_sequence_output"][:, place]
        return tf.argmax(tf.matmul(hidden, tf.cast(table, hidden.dtype), transpose_b=True), axis=-1)

    def write() -> None:
        target = np.zeros((WRITTEN_ROWS, NEW + 1), "int32")
        for place in range(NEW):
            target[:, place + 1] = scores(sources(), target, tf.constant(place)).numpy()

    return written_figures(write, calls=1)


def _keras_figures(model: Any, data: Any) -> dict[str, float]:
    model.make_train_function()
    iterator = iter(data)
    step = functools.partial(model.train_function, iterator)
    seconds = time_calls(lambda: float(step()["loss"]), warmup=2, calls=6)
    return step_figures(seconds, float(step()["loss"]))


# -- Hugging Face torch


def _torch_model() -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, num_heads=8, num_layers=6, dropout_rate=0.0, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def torch_step(dtype: str) -> dict[str, float]:
    import torch

    model = _torch_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    source, labels = (torch.tensor(array.astype("int64")) for array in batch())
    loss = torch.tensor(0.0)

    def step() -> None:
        nonlocal loss
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed_bfloat16"):
            loss = model(input_ids=source, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step_figures(time_calls(step, warmup=2, calls=6), float(loss))


def torch_write(dtype: str, num_beams: int) -> dict[str, float]:
    import torch
    import transformers

    model = _torch_model().eval().to(getattr(torch, dtype))
    ids = torch.tensor(sources().astype("int64"))
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        decoder_start_token_id=0,
    )

    def write() -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)

    return written_figures(write)


CONTENDERS: dict[str, Any] = {}
for _short, _policy in (("float32", "float32"), ("bfloat16", "mixed_bfloat16")):
    CONTENDERS |= {
        f"step {_short}: lmzoo": functools.partial(lmzoo_step, _policy),
        f"step {_short}: keras-hub": functools.partial(keras_hub_step, _policy),
        f"step {_short}: torch": functools.partial(torch_step, _policy),
        f"greedy {_short}: lmzoo": functools.partial(lmzoo_write, _short, 1),
        f"greedy {_short}: keras-hub": functools.partial(keras_hub_write, _short),
        f"greedy {_short}: torch": functools.partial(torch_write, _short, 1),
        f"4 beams {_short}: lmzoo": functools.partial(lmzoo_write, _short, 4),
        f"4 beams {_short}: torch": functools.partial(torch_write, _short, 4),
    }

if __name__ == "__main__":
    main(CONTENDERS, __doc__, ["ms", "tokens a second", "peak MB", "loss"])
