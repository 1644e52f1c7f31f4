"""The same training under every strategy, and what plain Keras makes of it. One strategy to a process."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("scenarios.py")
TWENTY_STEPS = ["adamw", "adamw_micro", "muon", "lion_micro"]
MORE_TWENTY_STEPS = ["nadam", "accumulation", "average"]
RESULTS = ["uneven", "compiled_metrics", "own_dataset", "one_row_left"]
ONE_STEP = ["idle", "clip", "inf", "odd", "accumulate", "ema", "steps"]
SHARED = [*TWENTY_STEPS, *RESULTS, *ONE_STEP]
NAMES = {
    "one": ["memory", *SHARED, *MORE_TWENTY_STEPS, "dropout"],
    "mirrored": [*SHARED, *MORE_TWENTY_STEPS, "jit", "refused", "dropout", "remat"],
    "multiworker": [*SHARED, "refused", "dropout", "embedding"],
}
BROKEN = ["clip", "inf", "odd", "accumulate", "ema", "steps", "jit", "log", "dropout", "remat"]
DISTRIBUTED = ["mirrored", "multiworker"]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_processes(kind, names):
    """Runs scenarios in a process of their own, or in two that form a cluster; returns the results of each."""
    with tempfile.TemporaryDirectory() as directory:
        common = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
        common |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        environments = [common]
        if kind == "multiworker":
            cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
            environments = [
                {**common, "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})}
                for index in range(2)
            ]
        outputs = [Path(directory, f"{index}.npz") for index in range(len(environments))]
        processes = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), kind, str(output), *names],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for output, environment in zip(outputs, environments, strict=True)
        ]
        try:
            logs = [process.communicate(timeout=400)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output, log in zip(processes, outputs, logs, strict=True):
            assert output.exists(), f"{kind} exited with {process.returncode}:\n{log[-4000:]}"
        return [dict(np.load(output)) for output in outputs]


@functools.cache
def results(kind):
    return run_processes(kind, NAMES[kind])


@functools.cache
def keras_results(kind, *names):
    return run_processes(kind, [f"keras_{name}" for name in names])


def fields(kind, name):
    """The results of one scenario, of each process."""
    found = []
    for process in results(kind):
        assert f"{name}/error" not in process, str(process[f"{name}/error"])
        found.append({key.split("/")[1]: value for key, value in process.items() if key.startswith(f"{name}/")})
        assert found[-1]
    return found


def broken(name, kind="mirrored", names=tuple(BROKEN)):
    """What plain Keras makes of a scenario: its fields, in the first process."""
    process = keras_results(kind, *names)[0]
    return {key.split("/")[1]: value for key, value in process.items() if key.startswith(f"keras_{name}/")}


class TestSameAsOneDevice:
    @pytest.mark.parametrize(
        ("kind", "name"),
        [(kind, name) for kind in DISTRIBUTED for name in TWENTY_STEPS]
        + [("mirrored", name) for name in MORE_TWENTY_STEPS],
    )
    def test_twenty_steps(self, kind, name):
        (expected,) = fields("one", name)
        assert (expected["gradient_norm"] > 0.1).all()
        for actual in fields(kind, name):
            np.testing.assert_allclose(actual["weights"], expected["weights"], atol=1e-5)
            np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-5)
            np.testing.assert_allclose(actual["gradient_norm"], expected["gradient_norm"], rtol=1e-4)
            assert actual["iterations"] == expected["iterations"]
            assert actual["spread"] == 0.0

    @pytest.mark.parametrize("kind", DISTRIBUTED)
    @pytest.mark.parametrize("name", RESULTS)
    def test_results(self, kind, name):
        (expected,) = fields("one", name)
        for actual in fields(kind, name):
            assert set(actual) == set(expected)
            for field, value in expected.items():
                np.testing.assert_allclose(actual[field], value, atol=1e-5, rtol=1e-5, err_msg=field)


@pytest.mark.parametrize("kind", ["one", *DISTRIBUTED])
class TestStep:
    """One step whose result can be written down."""

    def kernels(self, kind, name):
        return np.concatenate([process["kernel"] for process in fields(kind, name)])

    def test_clipping_acts_on_the_reduced_gradient(self, kind):
        for kernel in self.kernels(kind, "clip"):
            np.testing.assert_allclose(kernel, [0.6, 0.8], rtol=1e-6)

    def test_a_replica_without_weight_does_not_dilute_the_mean(self, kind):
        for kernel in self.kernels(kind, "idle"):
            np.testing.assert_allclose(kernel, [0.75, 0.25], rtol=1e-6)

    def test_rows_count_the_same_wherever_they_are(self, kind):
        for kernel in self.kernels(kind, "odd"):
            np.testing.assert_allclose(kernel, [2 / 3, 2 / 3], rtol=1e-6)

    def test_an_inf_on_one_replica_changes_no_weight_on_any(self, kind):
        for process in fields(kind, "inf"):
            np.testing.assert_array_equal(process["kernel"], np.zeros_like(process["kernel"]))
            np.testing.assert_array_equal(process["momentum"], np.zeros_like(process["momentum"]))
            np.testing.assert_array_equal(process["scale"], np.full_like(process["scale"], 4.0))
            assert process["skipped"] == 1

    def test_keras_accumulation(self, kind):
        for kernel in self.kernels(kind, "accumulate"):
            np.testing.assert_allclose(kernel, [1.0, 1.0], rtol=1e-6)

    def test_ema_overwrites(self, kind):
        # 0.5, then 2.0; their average 1.25 replaces the weights at the second step, and again at the end.
        for kernel in self.kernels(kind, "ema"):
            np.testing.assert_allclose(kernel, [1.25, 1.25], rtol=1e-6)

    def test_steps_per_execution(self, kind):
        for kernel in self.kernels(kind, "steps"):
            np.testing.assert_allclose(kernel, [2.0, 2.0], rtol=1e-6)


class TestRandomness:
    def test_one_replica_draws_as_keras_does(self):
        layer = keras.layers.Dropout(0.5, seed=7)
        for step in fields("one", "dropout")[0]["steps"]:
            np.testing.assert_array_equal(step, layer(np.ones([1, 64], "float32"), training=True)[0])

    @pytest.mark.parametrize("kind", DISTRIBUTED)
    def test_replicas_and_steps_draw_their_own(self, kind):
        for process in fields(kind, "dropout"):
            first, second, third = process["steps"]
            for step in (first, second, third):
                # Two masks of 0 and 2 that have nothing to do with one another: half of their means are 1.
                assert set(step) == {0.0, 1.0, 2.0}
                assert 16 < (step == 1.0).sum() < 48
            assert (first != second).mean() > 0.4
            assert (second != third).mean() > 0.4

    @pytest.mark.parametrize("kind", DISTRIBUTED)
    def test_all_hold_the_same_and_can_be_resumed(self, kind):
        processes = fields(kind, "dropout")
        for process in processes:
            np.testing.assert_array_equal(process["resumed"], process["steps"][2])
            for copy in (*process["kernel"], processes[0]["kernel"][0]):
                np.testing.assert_array_equal(copy, process["kernel"][0])
            np.testing.assert_array_equal(process["seed"], [[7, 3]] * len(process["seed"]))


def test_remat_changes_nothing():
    found = fields("mirrored", "remat")[0]
    for name in ("whole", "micro"):
        assert np.abs(found[f"{name}_weights"] - found[f"{name}_weights"][:1]).max() == 0.0
        np.testing.assert_allclose(found[f"{name}_weights"], found[f"plain_{name}_weights"], atol=1e-6)
        np.testing.assert_array_equal(found[f"{name}_seeds"], found[f"plain_{name}_seeds"])


def test_gradients_of_an_embedding_are_summed_densely():
    for process in fields("multiworker", "embedding"):
        assert any(op.startswith("CollectiveReduce") for op in process["ops"])
        assert not any(op.startswith("CollectiveGather") for op in process["ops"])


@pytest.mark.parametrize("kind", DISTRIBUTED)
def test_what_lives_outside_the_strategy_is_refused(kind):
    for process in fields(kind, "refused"):
        optimizer, metric = process["messages"]
        assert "was created under _DefaultDistributionStrategy" in optimizer
        assert "metric 'outside' was created outside the model's strategy" in metric


def test_xla_on_several_cpus_is_left_out():
    np.testing.assert_allclose(fields("mirrored", "jit")[0]["kernel"][1], [3.0, 4.0])


def test_micro_batches_need_the_memory_of_one():
    eighth, whole = fields("one", "memory")[0]["growth"]
    assert whole > 100e6
    assert eighth < whole / 3


class TestPlainKeras:
    """Why the engine is there. A failure here means that Keras has been mended, and a part of the engine can go."""

    def test_clips_before_it_reduces(self):
        np.testing.assert_allclose(broken("clip")["kernel"][0], [1.0, 1.0])

    def test_checks_only_the_first_replica(self):
        found = broken("inf")
        assert not np.isfinite(found["kernel"]).all()
        assert (found["scale"] == 8.0).all()

    def test_takes_the_mean_of_means(self):
        np.testing.assert_allclose(broken("odd")["kernel"][0], [0.5, 1.0])

    @pytest.mark.parametrize("name", ["accumulate", "ema"])
    def test_has_no_conditional_update(self, name):
        assert "merge_call" in str(broken(name)["error"])

    def test_has_no_steps_per_execution(self):
        assert "error" in broken("steps")

    def test_compiles_replicas_into_one_cluster(self):
        assert "error" in broken("jit")

    def test_logs_a_mean_of_means(self):
        assert broken("log")["value"] == pytest.approx(2.5)  # 2 is right

    def test_drops_the_same_on_all_replicas(self):
        assert set(broken("dropout")["steps"].ravel()) == {0.0, 2.0}

    def test_has_no_rematerialisation_in_a_graph(self):
        assert "keywords" in str(broken("remat")["error"])

    def test_gathers_the_gradients_of_an_embedding(self):
        ops = broken("embedding", "multiworker", ("odd", "embedding"))["ops"]
        assert any(op.startswith("CollectiveGather") for op in ops)

    def test_fit_fails_with_several_workers(self):
        assert "error" in broken("odd", "multiworker", ("odd", "embedding"))
