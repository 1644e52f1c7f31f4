"""Fine-tuning on two devices against one, with all that touches the optimizer. One strategy to a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = """
import sys
import keras, numpy as np
kind, output, tests, here = sys.argv[1:]
sys.path[:0] = [tests, here]
from conftest import TINY
from examples import make_batch, make_task
from lmzoo.engine.optimizers import make_optimizer
from lmzoo.engine.strategy import make_strategy
from lmzoo.models import ARCHITECTURES
strategy = make_strategy(kind, virtual_cpus=2 if kind == "mirrored" else None)
keras.utils.set_random_seed(0)
with strategy.scope():
    model_class = ARCHITECTURES["bert"]
    encoder = model_class(model_class.config_class.from_dict(TINY["bert"]))
    task = make_task("single_label", encoder)
    task.freeze(1)
    factors = {"learning_rate_factors": task.learning_rate_factors(0.7), "start_decay": task.start_decay(2.0)}
    optimizer = make_optimizer("adamw", 0.01, epsilon=1e-3, **factors)
    task.compile(optimizer, class_weights=(1.0, 2.0, 0.5), micro_batches=2, remat="block")
inputs, labels, weights = make_batch("single_label", rows=21)
history = task.fit(inputs, labels, sample_weight=weights, batch_size=8, epochs=4, shuffle=False, verbose=0).history
values = {str(number): each.numpy() for number, each in enumerate(task.weights)}
np.savez(output, loss=history["loss"], accuracy=history["accuracy"], **values)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_devices_give_what_one_gives(tmp_path):
    here = Path(__file__).parent
    results = []
    for kind in ("one", "mirrored"):
        output = tmp_path / f"{kind}.npz"
        command = [sys.executable, "-c", PROGRAM, kind, str(output), str(here.parent), str(here)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        results.append(dict(np.load(output)))
    one, two = results
    assert one["loss"][-1] < one["loss"][0]
    for name, value in one.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=2e-5, err_msg=name)
