"""Planned against measured peak memory of a training step on a CPU, packed rows, without XLA.

Measured is the most that the process ever held (VmHWM), after four steps. Three figures of it: as it is; less what it
held after importing TensorFlow and before there was a model; and, to be compared with the plan, less the peak of the
same process with a model of as many blocks that is 4 wide and reads 8 tokens: TensorFlow, Python, and the traced graph.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

from harness import main, peak_mb, resident_mb

MB = 2**20
SIX = {"num_layers": 6, "num_heads": 8, "model_dim": 512, "vocab_size": 16_000}
TINY = {"num_heads": 1, "model_dim": 4, "vocab_size": 16}
CASES: dict[str, dict[str, Any]] = {
    "nano 32 x 256": {"preset": "gpt2-nano", "rows": 32},
    "micro 4 x 512": {"preset": "gpt2-micro", "rows": 4},
    "micro 8 x 512": {"preset": "gpt2-micro", "rows": 8},
    "micro 8 x 512 remat": {"preset": "gpt2-micro", "rows": 8, "remat": True},
    "micro 8 x 512 dropout": {"preset": "gpt2-micro", "rows": 8, "dropout_rate": 0.1},
    "micro 8 x 512 bfloat16": {"preset": "gpt2-micro", "rows": 8, "dtype": "mixed_bfloat16"},
    "micro 8 x 512 bfloat16 remat": {"preset": "gpt2-micro", "rows": 8, "dtype": "mixed_bfloat16", "remat": True},
    "six blocks 8 x 256": {"preset": "gpt2-micro", "rows": 8, "seq_length": 256, **SIX},
    "six blocks 8 x 256 adafactor": {
        "preset": "gpt2-micro",
        "rows": 8,
        "seq_length": 256,
        "optimizer": "adafactor",
        **SIX,
    },
    "six blocks 4 x (8 x 256)": {"preset": "gpt2-micro", "rows": 8, "seq_length": 256, "micro_batches": 4, **SIX},
    "gpt2 4 x 512": {"preset": "gpt2", "rows": 4, "seq_length": 512},
    "gpt2 4 x 512 remat": {"preset": "gpt2", "rows": 4, "seq_length": 512, "remat": True},
    "gpt2 4 x 512 bfloat16": {"preset": "gpt2", "rows": 4, "seq_length": 512, "dtype": "mixed_bfloat16"},
    "gpt2 4 x 512 adafactor": {"preset": "gpt2", "rows": 4, "seq_length": 512, "optimizer": "adafactor"},
}


def shape_of(preset: str, seq_length: int | None, dropout_rate: float, overrides: dict[str, int]) -> Any:
    from lmzoo.models import find_preset

    model_class, shape = find_preset(preset)
    return model_class, shape.replace(
        context_length=seq_length or shape.context_length,
        dropout_rate=dropout_rate,
        eos_token_id=None,
        **overrides,
    )


def measure(
    *,
    preset: str,
    rows: int,
    seq_length: int | None = None,
    dropout_rate: float = 0.0,
    dtype: str = "float32",
    optimizer: str = "adamw",
    remat: bool = False,
    micro_batches: int = 1,
    steps: int = 4,
    **overrides: int,
) -> dict[str, float]:
    """Peak of this process, and what it held before the model, in bytes; trains."""
    import numpy as np
    import tensorflow as tf

    from lmzoo.engine.optimizers import make_optimizer

    model_class, shape = shape_of(preset, seq_length, dropout_rate, overrides)
    before = resident_mb()
    model = model_class(shape, dtype=dtype)
    model.compile(
        make_optimizer(optimizer, 1e-3),
        remat="block" if remat else None,
        micro_batches=micro_batches,
        jit_compile=False,
    )
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (rows * micro_batches, shape.context_length + 1))
    segments = np.ones(ids[:, 1:].shape, "int32")
    inputs = {
        "token_ids": ids[:, :-1].astype("int32"),
        "segment_ids": segments,
        "positions": segments.cumsum(axis=1, dtype="int32") - 1,
    }
    batch = (inputs, ids[:, 1:].astype("int32"), segments.astype("float32"))
    iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
    model.make_train_function()
    for _ in range(steps):
        float(model.train_function(iterator)["loss"])
    return {"peak": peak_mb() * MB, "before": before * MB}


def planned(
    *,
    preset: str,
    rows: int,
    seq_length: int | None = None,
    dropout_rate: float = 0.0,
    dtype: str = "float32",
    optimizer: str = "adamw",
    remat: bool = False,
    micro_batches: int = 1,
    **overrides: int,
) -> float:
    """What the plan says, in bytes."""
    from lmzoo.training.memory import count_variables, step_memory

    model_class, shape = shape_of(preset, seq_length, dropout_rate, overrides)
    variables = count_variables(model_class, shape, optimizer=optimizer, dtype=dtype)
    options = {"optimizer": optimizer, "dtype": dtype, "remat": remat, "accumulates": micro_batches > 1}
    return step_memory(shape, variables, rows=rows, **options).total


def in_a_process(settings: dict[str, Any]) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(settings: dict[str, Any]) -> dict[str, float]:
    """Planned and measured, in MB of 1e6 bytes."""
    whole = in_a_process(settings)
    graph = in_a_process({**settings, **TINY, "rows": 1, "seq_length": 8})
    settings = {name: value for name, value in settings.items() if name != "steps"}
    measured, plan = whole["peak"] - graph["peak"], planned(**settings)
    return {
        "peak": whole["peak"] / 1e6,
        "less import": (whole["peak"] - whole["before"]) / 1e6,
        "measured": measured / 1e6,
        "planned": plan / 1e6,
        "off by %": 100 * (plan / measured - 1),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
    else:
        main(
            {name: functools.partial(compare, settings) for name, settings in CASES.items()},
            __doc__,
            ["peak", "less import", "measured", "planned", "off by %"],
        )
