"""Greedy decoding of the 124M GPT-2 with random weights by what is exported: 64 new tokens after 16, for 1 and 8 rows.

Artefacts are made by the first process that needs them, and kept until the end of the run.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path

import decode
from harness import main

DIRECTORY = "LMZOO_BENCHMARK_ARTEFACTS"


def gpt():
    from lmzoo import GPTModel

    return GPTModel.from_preset("gpt2", eos_token_id=None)


def tflite(weights: str, length: int, rows: int) -> dict[str, float]:
    from lmzoo.export import TFLiteGenerator

    path = Path(os.environ[DIRECTORY], f"{weights}-{length}-{rows}.tflite")
    if not path.exists():
        from lmzoo.export import export_tflite

        export_tflite(gpt(), path, weights=weights, batch_size=rows, length=length, prefill_length=decode.PROMPT)
        os.execvpe(sys.executable, [sys.executable, *sys.argv], os.environ)  # Without what exporting has held.
    generator = TFLiteGenerator(path)
    ids = decode.prompts(rows).tolist()
    size = path.stat().st_size / 1e6
    return {**decode.figures(lambda: generator.generate(ids, decode.NEW, temperature=0), rows), "file MB": size}


def saved_model(rows: int) -> dict[str, float]:
    import tensorflow as tf

    path = Path(os.environ[DIRECTORY], "saved_model")
    if not path.exists():
        from lmzoo.export import write_saved_model
        from lmzoo.generation import SamplingOptions

        model = gpt()
        decoder = model.decoder(decode.NEW, SamplingOptions(temperature=0))

        @tf.function(input_signature=[tf.TensorSpec([None, decode.PROMPT], tf.int32, "token_ids")], autograph=False)
        def generate(token_ids):
            return {"new": decoder(token_ids, tf.fill([tf.shape(token_ids)[0]], decode.PROMPT)).token_ids}

        module = tf.Module()
        module.weights = [weight.value for weight in model.weights]
        write_saved_model(path, module, {"generate": generate})
        os.execvpe(sys.executable, [sys.executable, *sys.argv], os.environ)
    loaded = tf.saved_model.load(str(path / "1"))
    signature, ids = loaded.signatures["generate"], tf.constant(decode.prompts(rows))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    return {**decode.figures(lambda: signature(token_ids=ids)["new"].numpy(), rows), "file MB": size}


CONTENDERS = {
    "lmzoo Keras": functools.partial(decode.lmzoo, "float32"),
    "lmzoo SavedModel": saved_model,
    "lmzoo TFLite float32": functools.partial(tflite, "float32", decode.PROMPT + decode.NEW),
    "lmzoo TFLite int8": functools.partial(tflite, "int8", decode.PROMPT + decode.NEW),
    "lmzoo TFLite int8, 1024 places": functools.partial(tflite, "int8", 1024),
    "keras-hub": functools.partial(decode.keras_hub, "float32"),
    "keras-hub bfloat16": functools.partial(decode.keras_hub, "bfloat16"),
    "torch": functools.partial(decode.torch, "float32"),
    "torch bfloat16": functools.partial(decode.torch, "bfloat16"),
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault(DIRECTORY, directory)
        main(
            {
                f"{name} {rows} row{'s' if rows > 1 else ''}": functools.partial(run, rows)
                for rows in (1, 8)
                for name, run in CONTENDERS.items()
            },
            __doc__,
            ["ms a token", "tokens a second", "peak MB", "file MB"],
        )
