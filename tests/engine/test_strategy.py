import json

import numpy as np
import pytest
import tensorflow as tf

from lmzoo.engine import strategy


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS", "TPU_NAME"):
        monkeypatch.delenv(name, raising=False)


def cluster(**tasks):
    return json.dumps({"cluster": tasks, "task": {"type": "worker", "index": 0}})


def test_one_is_the_default_strategy():
    assert strategy.make_strategy("one") is tf.distribute.get_strategy()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "one"),
        ({"TF_CONFIG": cluster(worker=["a:1", "b:1"])}, "multiworker"),
        ({"TF_CONFIG": cluster(chief=["a:1"], worker=["b:1"])}, "multiworker"),
        ({"TF_CONFIG": cluster(worker=["a:1"], evaluator=["b:1"])}, "one"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "multiworker"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, "one"),
        ({"TPU_NAME": "local"}, "tpu"),
    ],
    ids=str,
)
def test_what_the_environment_shows(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert strategy._detect("auto") == expected


def test_several_gpus_are_mirrored(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a", "b"] if kind == "GPU" else [])
    assert strategy._detect("auto") == "mirrored"


@pytest.mark.parametrize(
    ("name", "kind"), [("tf_config", "TFConfig"), ("slurm", "Slurm"), ("kubernetes", "Kubernetes")]
)
def test_resolvers(monkeypatch, name, kind):
    class Resolver:
        def __init__(self, **options):
            self.options = options

    monkeypatch.setattr(tf.distribute.cluster_resolver, f"{kind}ClusterResolver", Resolver)
    found = strategy._cluster_resolver(name, {"rpc_layer": "grpc"})
    assert isinstance(found, Resolver)
    assert found.options == {"rpc_layer": "grpc"}


def test_automatic_resolver(monkeypatch):
    with pytest.raises(ValueError, match="finds neither TF_CONFIG nor a Slurm step"):
        strategy.make_strategy("multiworker")
    monkeypatch.setenv("TF_CONFIG", cluster(worker=["a:1", "b:1"]))
    found = strategy._cluster_resolver("auto", {})
    assert found.cluster_spec().as_dict() == {"worker": ["a:1", "b:1"]}


def test_kubernetes_task_is_an_attribute(monkeypatch):
    class Resolver:
        pass

    monkeypatch.setattr(tf.distribute.cluster_resolver, "KubernetesClusterResolver", Resolver)
    found = strategy._cluster_resolver("kubernetes", {"task_type": "worker", "task_id": 3})
    assert (found.task_type, found.task_id) == ("worker", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ddp"}, "strategy must be one of auto, one, mirrored, multiworker, tpu, but is 'ddp'"),
        ({"resolver": "ssh"}, "resolver must be one of auto, .*, but is 'ssh'"),
        ({"virtual_cpus": 0}, "virtual_cpus must be 1 or more, but is 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        strategy.make_strategy(**arguments)


def test_virtual_cpus_after_the_first_tensor():
    tf.constant(1.0)
    with pytest.raises(ValueError, match="virtual_cpus must be set before TensorFlow is used"):
        strategy.make_strategy("mirrored", virtual_cpus=2)


def test_batch_plan():
    plan = strategy.BatchPlan(rows=8, replicas=4, micro_batches=2)
    assert plan.global_batch == 64
    assert str(plan) == "global batch 64 = 8 rows x 4 replicas x 2 micro-batches"
    assert strategy.BatchPlan.of_global(12, tf.distribute.get_strategy(), 3) == strategy.BatchPlan(4, 1, 3)


def test_batch_plan_errors():
    with pytest.raises(ValueError, match=r"12 must be a multiple of 5 = 1 replicas x 5 micro-batches. Try 10\."):
        strategy.BatchPlan.of_global(12, tf.distribute.get_strategy(), 5)
    with pytest.raises(ValueError, match="rows must be an integer of 1 or more, but is 0"):
        strategy.BatchPlan(0, 1)


def test_spread_over_one_replica_only_converts():
    batch = strategy.spread(({"a": np.arange(3)}, None), tf.distribute.get_strategy())
    assert isinstance(batch[0]["a"], tf.Tensor)
    assert batch[1] is None
