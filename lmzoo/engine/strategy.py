"""Distribution strategies by name, the arithmetic of batches, and what a strategy does with values."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

STRATEGIES = ("auto", "one", "mirrored", "multiworker", "tpu")
RESOLVERS = ("auto", "tf_config", "slurm", "gce", "kubernetes")


def make_strategy(
    name: str = "auto",
    *,
    resolver: str = "auto",
    resolver_options: Mapping[str, Any] | None = None,
    virtual_cpus: int | None = None,
) -> tf.distribute.Strategy:
    """Returns a strategy by name. Call it before any tensor is made: it may configure devices and open connections.

    Args:
        name: "one" is one device, the first GPU or else the CPU. "mirrored" is every GPU of this machine, or every
            CPU that `virtual_cpus` makes. "multiworker" is every worker of a cluster, which `resolver` finds. "tpu" is
            every core of a TPU. "auto" is the first of multiworker, tpu, mirrored and one that the environment shows:
            a cluster of two or more workers, TPU_NAME or TPU devices, two or more GPUs.
        resolver: how "multiworker" finds the cluster: "tf_config" (the TF_CONFIG variable), "slurm", "gce",
            "kubernetes"; "auto" takes TF_CONFIG, then Slurm, whichever is there.
        resolver_options: arguments of TensorFlow's resolver of that name; of the TPU's one (`tpu`, `zone`, `project`).
        virtual_cpus: splits the CPU into so many devices, for trying things out without GPUs.

    Raises:
        ValueError: an unknown name, or nothing to run the strategy on.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, but is {name!r}.")
    if resolver not in RESOLVERS:
        raise ValueError(f"resolver must be one of {', '.join(RESOLVERS)}, but is {resolver!r}.")
    options = dict(resolver_options or {})
    if name == "auto":
        name = _detect(resolver)
    if virtual_cpus is not None:
        _split_cpu(virtual_cpus)
    if name == "multiworker":
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=_cluster_resolver(resolver, options))
    if name == "tpu":
        return _tpu_strategy(options)
    if name == "mirrored":
        kind = "GPU" if tf.config.list_physical_devices("GPU") and virtual_cpus is None else "CPU"
        return tf.distribute.MirroredStrategy([device.name for device in tf.config.list_logical_devices(kind)])
    # Not OneDeviceStrategy: with the default one, Keras may turn XLA on for a GPU by itself.
    return tf.distribute.get_strategy()


def cluster_size() -> int:
    """Returns how many workers TF_CONFIG names, 1 without it; an evaluator or parameter server is no worker."""
    cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
    return max(1, len(cluster.get("chief", [])) + len(cluster.get("worker", [])))


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: global_batch = rows x replicas x micro_batches.

    Args:
        rows: examples that one replica holds in memory at once.
        replicas: devices that take part, over all workers.
        micro_batches: parts that each replica takes one after the other, for one update.
    """

    rows: int
    replicas: int
    micro_batches: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be an integer of 1 or more, but is {value!r}.")

    @classmethod
    def of_global(cls, global_batch: int, strategy: tf.distribute.Strategy, micro_batches: int = 1) -> BatchPlan:
        """Cuts a global batch for a strategy.

        Args:
            global_batch: examples of one update.
            strategy: the strategy that trains.
            micro_batches: parts that each replica takes one after the other.

        Raises:
            ValueError: the parts would not be equal.
        """
        parts = strategy.num_replicas_in_sync * micro_batches
        if global_batch < 1 or global_batch % parts:
            raise ValueError(
                f"the global batch of {global_batch} must be a multiple of {parts} = {strategy.num_replicas_in_sync} "
                f"replicas x {micro_batches} micro-batches. Try {max(1, round(global_batch / parts)) * parts}."
            )
        return cls(global_batch // parts, strategy.num_replicas_in_sync, micro_batches)

    @property
    def global_batch(self) -> int:
        """Examples of one update, over all replicas and micro-batches: what a dataset is batched by."""
        return self.rows * self.replicas * self.micro_batches

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {self.rows} rows x {self.replicas} replicas x "
            f"{self.micro_batches} micro-batches"
        )


def is_tpu(strategy: tf.distribute.Strategy) -> bool:
    """Whether a strategy's replicas are TPU cores."""
    return isinstance(strategy, tf.distribute.TPUStrategy)


def compiles_by_default() -> bool:
    """Whether training steps are compiled with XLA where nobody says: on GPUs only."""
    return bool(tf.config.list_physical_devices("GPU"))


def has_only_gpus(strategy: tf.distribute.Strategy) -> bool:
    """Whether all of a strategy's replicas on this worker are GPUs."""
    return all("GPU" in device for device in strategy.extended.worker_devices)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes files for all."""
    return bool(strategy.extended.should_checkpoint)


def num_workers(strategy: tf.distribute.Strategy) -> int:
    """How many processes train together."""
    return int(getattr(strategy.extended, "_num_workers", 1))


def wait_for_all(strategy: tf.distribute.Strategy) -> None:
    """Returns once every worker has come here."""
    if num_workers(strategy) == 1:
        return

    @tf.function(autograph=False)
    def meet() -> Any:
        return strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("sum", tf.constant(1.0)))

    strategy.experimental_local_results(meet())[0].numpy()


def spread(batch: Any, strategy: tf.distribute.Strategy) -> Any:
    """Gives each replica its share of a global batch that is not distributed yet, as a distributed dataset does.

    Shapes: every leaf is [B, ...]; replica r of R gets rows floor(r * B / R) up to floor((r + 1) * B / R).

    Args:
        batch: nested structure of arrays, tensors and None, the same on every worker.
        strategy: the strategy that the values are for.
    """
    replicas = strategy.num_replicas_in_sync

    def share(leaf: Any) -> Any:
        if leaf is None:
            return None
        leaf = tf.convert_to_tensor(leaf)
        if replicas == 1:
            return leaf
        rows = leaf.shape[0]

        def of_replica(context: tf.distribute.ReplicaContext) -> tf.Tensor:
            index = context.replica_id_in_sync_group
            return leaf[index * rows // replicas : (index + 1) * rows // replicas]

        return strategy.experimental_distribute_values_from_function(of_replica)

    return keras.tree.map_structure(share, batch)


def spec_of_one_replica(spec: Any) -> Any:
    """Returns the TensorSpec of one replica's values, from that of a distributed dataset (or of a plain one)."""
    return spec._value_specs[0] if hasattr(spec, "_value_specs") else spec


def _detect(resolver: str) -> str:
    if cluster_size() > 1 or resolver in RESOLVERS[2:] or _slurm_tasks() > 1:
        return "multiworker"
    if os.environ.get("TPU_NAME") or tf.config.list_physical_devices("TPU"):
        return "tpu"
    return "mirrored" if len(tf.config.list_physical_devices("GPU")) > 1 else "one"


def _slurm_tasks() -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def _cluster_resolver(name: str, options: dict[str, Any]) -> Any:
    resolvers = tf.distribute.cluster_resolver
    if name == "auto":
        if not os.environ.get("TF_CONFIG") and _slurm_tasks() < 2:
            raise ValueError(
                "strategy 'multiworker' finds neither TF_CONFIG nor a Slurm step of several tasks in the environment. "
                "Set TF_CONFIG, start with srun, or name a resolver: gce or kubernetes."
            )
        name = "tf_config" if os.environ.get("TF_CONFIG") else "slurm"
    if name == "kubernetes":
        # This one alone takes its own place in the cluster as attributes.
        task = {key: options.pop(key) for key in ("task_type", "task_id") if key in options}
        found = resolvers.KubernetesClusterResolver(**options)
        for key, value in task.items():
            setattr(found, key, value)
        return found
    return {
        "tf_config": resolvers.TFConfigClusterResolver,
        "slurm": resolvers.SlurmClusterResolver,
        "gce": resolvers.GCEClusterResolver,
    }[name](**options)


def _tpu_strategy(options: dict[str, Any]) -> tf.distribute.TPUStrategy:
    # "local" is the TPU that this very machine (a TPU VM) is attached to.
    options.setdefault("tpu", os.environ.get("TPU_NAME", "local"))
    cluster = tf.distribute.cluster_resolver.TPUClusterResolver(**options)
    if options["tpu"] != "local":
        tf.config.experimental_connect_to_cluster(cluster)
    tf.tpu.experimental.initialize_tpu_system(cluster)
    return tf.distribute.TPUStrategy(cluster)


def _split_cpu(count: int) -> None:
    if count < 1:
        raise ValueError(f"virtual_cpus must be 1 or more, but is {count}.")
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        raise ValueError(
            "virtual_cpus must be set before TensorFlow is used: call make_strategy first of all."
        ) from error
