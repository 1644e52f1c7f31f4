"""Trains small models under one strategy and writes what came out: `scenarios.py KIND OUTPUT.npz [NAME ...]`.

KIND is one, mirrored (two virtual CPUs), multiworker (a worker of the cluster in TF_CONFIG). A process runs one
strategy only: after a failed collective, later strategies in the same process fail too. Names that start with keras_
do the same with plain Keras.
"""

import re
import sys
import traceback
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny_models import LinearModel, TokenModel, flat_weights, token_data

from lmzoo.engine.model import ReplicatedModel
from lmzoo.engine.strategy import make_strategy
from lmzoo.models.gpt import GPTConfig, GPTModel

BATCH = 16


def adamw(**kwargs):
    return keras.optimizers.AdamW(1e-2, **{"global_clipnorm": 0.3, **kwargs})


def copies(strategy, variables):
    """The values that each replica of this process holds, [replicas, values]."""
    per_variable = [strategy.experimental_local_results(each.value) for each in variables]
    return np.stack(
        [np.concatenate([part.numpy().ravel() for part in parts]) for parts in zip(*per_variable, strict=True)]
    )


def twenty_steps(make_optimizer, **compile_arguments):
    def run(strategy):
        with strategy.scope():
            model = TokenModel()
            model.compile(make_optimizer(), **compile_arguments)
        ids, labels, weights = token_data(5 * BATCH)
        history = model.fit(
            ids, labels, sample_weight=weights, batch_size=BATCH, epochs=4, shuffle=False, verbose=0
        ).history
        replicas = copies(strategy, model.weights)
        return {
            "weights": flat_weights(model),
            "gradient_norm": history["gradient_norm"],
            "loss": history["loss"],
            "iterations": int(model.optimizer.iterations.numpy()),
            "spread": np.abs(replicas - replicas[:1]).max(),
        }

    return run


def uneven(strategy):
    """37 rows in batches of 7: the last has 2, and every batch is odd; the middle one has weights on one side only."""
    with strategy.scope():
        model = TokenModel()
        model.compile(adamw(), micro_batches=2, steps_per_execution=4)
    ids, labels, weights = token_data(37)
    weights[18:21] = 0.0
    history = model.fit(ids, labels, sample_weight=weights, batch_size=7, epochs=3, shuffle=False, verbose=0).history
    evaluation = model.evaluate(ids, labels, sample_weight=weights, batch_size=7, verbose=0, return_dict=True)
    results = {"history": [history[name] for name in sorted(history)], "weights": flat_weights(model)}
    results["evaluation"] = [evaluation[name] for name in sorted(evaluation)]
    results["prediction"] = model.predict(ids, batch_size=7, verbose=0)
    results["prediction_on_batch"] = model.predict_on_batch(ids)
    results["train_on_batch"] = model.train_on_batch(ids, labels, weights)
    results["test_on_batch"] = model.test_on_batch(ids, labels, weights)
    return results


def one_row_left(strategy):
    """5 rows in batches of 4: the last batch leaves a replica without any row."""
    with strategy.scope():
        model = LinearModel()
        model.compile(keras.optimizers.SGD(1.0))
    rows = np.array([[1, 0], [2, 0], [3, 0], [2, 0], [0, 7]], "float32")
    history = model.fit(rows, rows, batch_size=4, shuffle=False, verbose=0).history
    return {"kernel": model.kernel.numpy(), "loss": history["loss"]}


def idle(strategy):
    """No weight at all in the second half of a batch."""
    with strategy.scope():
        model = LinearModel()
        model.compile(keras.optimizers.SGD(1.0))
    rows = np.array([[1, 0], [0, 1], [5, 5], [7, 7]], "float32")
    logs = model.train_on_batch(rows, rows, np.array([3.0, 1.0, 0.0, 0.0], "float32"), return_dict=True)
    return {"kernel": copies(strategy, [model.kernel]), "gradient_norm": logs["gradient_norm"]}


def negative(labels, outputs):
    return outputs


def one_step(base, optimizer, rows, **compile_arguments):
    """The kernel's copies after one step of fit on `rows`, and the optimizer; `base` is ours or Keras's model class."""

    def run(strategy):
        with strategy.scope():

            class Linear(base):
                def __init__(self):
                    super().__init__()
                    self.kernel = self.add_weight(name="kernel", shape=(2,), initializer="zeros")
                    self.built = True

                def call(self, inputs):
                    return -tf.linalg.matvec(inputs, self.kernel)

            model = Linear()
            model.compile(optimizer(), loss=negative, **compile_arguments)
        x = np.array(rows, "float32")
        history = model.fit(x, x[:, 0], batch_size=4, shuffle=False, verbose=0).history
        results = {"kernel": copies(strategy, [model.kernel]), "loss": history["loss"]}
        if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
            results["scale"] = copies(strategy, [model.optimizer.dynamic_scale])
            results["momentum"] = copies(strategy, model.optimizer.inner_optimizer.momentums)
        if base is ReplicatedModel:
            results["skipped"] = model.skipped_steps
        return results

    return run


def loss_scaled():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0, momentum=0.9), initial_scale=8.0)


CLIPPED = [[6, 0], [6, 0], [0, 8], [0, 8]]
ONE_INF = [[1, 1], [1, 1], [1, 1], [np.inf, 1]]
ODD = [[0, 0]] * 4 + [[1, 0], [1, 0], [0, 2]]  # Keras cannot start with a batch that its replicas cannot share equally.
EIGHT = [[1, 0], [1, 0], [0, 1], [0, 1], [3, 0], [3, 0], [0, 3], [0, 3]]
SAME_STEP = {
    "clip": (lambda: keras.optimizers.SGD(1.0, global_clipnorm=1.0), CLIPPED, {}),
    "inf": (loss_scaled, ONE_INF, {}),
    "odd": (lambda: keras.optimizers.SGD(1.0), ODD, {}),
    "accumulate": (lambda: keras.optimizers.SGD(1.0, gradient_accumulation_steps=2), EIGHT, {}),
    "ema": (
        lambda: keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
        EIGHT,
        {},
    ),
    "steps": (lambda: keras.optimizers.SGD(1.0), EIGHT, {"steps_per_execution": 2}),
    "jit": (lambda: keras.optimizers.SGD(1.0), CLIPPED, {"jit_compile": True}),
}


def compiled_metrics(strategy):
    """A compiled loss and metrics, with sample weights and an uneven last batch."""
    with strategy.scope():
        model = TokenModel()
        model.compile(
            adamw(),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["sparse_categorical_accuracy"],
            weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="entropy")],
            micro_batches=2,
        )
    ids, labels, weights = token_data(37)
    data = {"sample_weight": weights, "batch_size": 7, "verbose": 0}
    history = model.fit(ids, labels, epochs=2, shuffle=False, validation_data=(ids, labels, weights), **data).history
    evaluation = model.evaluate(ids, labels, return_dict=True, **data)
    return {
        "weights": flat_weights(model),
        "history": [history[name] for name in sorted(history)],
        "evaluation": [evaluation[name] for name in sorted(evaluation)],
    }


def own_dataset(strategy):
    """Each worker makes its own part of every global batch, as a pipeline that knows its place does."""
    with strategy.scope():
        model = TokenModel()
        model.compile(adamw(), micro_batches=2)
    ids, labels, weights = token_data(5 * BATCH)

    def part(context):
        rows = BATCH // context.num_input_pipelines
        index = np.arange(5 * BATCH).reshape(5, context.num_input_pipelines, rows)[:, context.input_pipeline_id].ravel()
        dataset = tf.data.Dataset.from_tensor_slices((ids[index], labels[index], weights[index])).repeat()
        return dataset.batch(context.get_per_replica_batch_size(BATCH), drop_remainder=True)

    dataset = strategy.distribute_datasets_from_function(part)
    history = model.fit(dataset, epochs=2, steps_per_epoch=10, shuffle=False, verbose=0).history
    return {"weights": flat_weights(model), "loss": history["loss"]}


def refused(strategy):
    """What must be an error: an optimizer or a metric that lives outside the strategy."""
    outside, metric = keras.optimizers.SGD(), keras.metrics.MeanSquaredError(name="outside")
    with strategy.scope():
        model = LinearModel()
    messages = []
    for arguments in ({"optimizer": outside}, {"optimizer": "sgd", "metrics": [metric]}):
        try:
            model.compile(**arguments)
            model.train_on_batch(np.ones([2, 2]), np.ones([2]))
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return {"messages": messages}


def memory(strategy):
    """By how many bytes the peak of this process grows with 8 micro-batches, and then with one."""

    class Wide(ReplicatedModel):
        def __init__(self):
            super().__init__()
            self.head = keras.layers.Dense(4096)
            self.head.build((None, 64))

        def compute_sums(self, inputs, labels, weights, training):
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, self.head(inputs))
            return {"loss": (tf.reduce_sum(losses), tf.cast(tf.size(losses), tf.float32))}

    inputs, labels = np.ones([8192, 64], "float32"), np.ones([8192], "int32")
    peaks = []
    for micro_batches, rows in ((8, 8), (8, 8192), (1, 8192)):
        model = Wide()
        model.compile(adamw(), micro_batches=micro_batches)
        for _ in range(2):
            model.train_on_batch(inputs[:rows], labels[:rows])
        # Not ru_maxrss, which begins with what the process that started this one held.
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
    return {"growth": np.diff(peaks)}


def dropout(base):
    """What three steps of one row a replica add to the kernel: the mean of the replicas' masks, 0 or 2 each.

    The last step is also taken by a second model that gets the first one's variables from before it.
    """

    def run(strategy):
        class Dropped(base):
            def __init__(self):
                super().__init__()
                self.kernel = self.add_weight(name="kernel", shape=(64,), initializer="zeros")
                self.dropout = keras.layers.Dropout(0.5, seed=7)
                self.built = True

            def call(self, inputs, training=None):
                return -tf.linalg.matvec(self.dropout(inputs, training=training), self.kernel)

        def make():
            with strategy.scope():
                model = Dropped()
                model.compile(keras.optimizers.SGD(1.0), loss=negative, jit_compile=False)
            return model

        def step(model):
            before = model.kernel.numpy()
            model.fit(rows, rows[:, 0], batch_size=len(rows), shuffle=False, verbose=0)
            return model.kernel.numpy() - before

        rows = np.ones([strategy.num_replicas_in_sync, 64], "float32")
        model, resumed = make(), make()
        steps = [step(model) for _ in range(2)]
        for variable, value in zip(resumed.variables, [each.numpy() for each in model.variables], strict=True):
            variable.assign(value)
        steps.append(step(model))
        return {
            "steps": steps,
            "resumed": step(resumed),
            "kernel": copies(strategy, [model.kernel]),
            "seed": copies(strategy, [model.dropout.seed_generator.state]),
        }

    return run


def remat(strategy):
    """Weights and states of a GPT after four steps with dropout, without and with remat, in whole and in parts."""
    ids, labels, weights = token_data(2 * BATCH)
    found = {}
    for name, micro_batches in {"whole": 1, "micro": 2}.items():
        for label, choice in {f"plain_{name}": None, name: "block"}.items():
            keras.utils.set_random_seed(0)
            with strategy.scope():
                model = GPTModel(GPTConfig(vocab_size=11, context_length=4, num_layers=2, num_heads=2, model_dim=8))
                model.compile(keras.optimizers.SGD(0.1), micro_batches=micro_batches, remat=choice)
            model.fit(ids, labels, sample_weight=weights, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
            found[f"{label}_weights"] = copies(strategy, model.trainable_variables)
            found[f"{label}_seeds"] = copies(strategy, model.non_trainable_variables)
    return found


def keras_remat(strategy):
    """fit of layers made under Keras's own scope for it."""
    with strategy.scope(), keras.RematScope(mode="full"):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        model.compile("sgd", "mse")
    rows = np.ones([4, 2], "float32")
    return {"loss": model.fit(rows, rows, verbose=0).history["loss"]}


def embedding(base):
    """The names of the ops of a training step of an embedding, all functions included."""

    def run(strategy):
        with strategy.scope():

            class Embedded(base):
                def __init__(self):
                    super().__init__()
                    self.embedding = keras.layers.Embedding(11, 8)
                    self.embedding.build()
                    self.built = True

                def call(self, inputs, training=None):
                    return tf.reduce_sum(self.embedding(inputs), axis=(1, 2))

            model = Embedded()
            model.compile("sgd", loss=negative, jit_compile=False)
            model.optimizer.build(model.trainable_variables)
        train = model._train_replica if base is ReplicatedModel else model.train_step
        batch = tf.constant([[1, 2], [2, 3]]), tf.constant([0.0, 0.0]), tf.constant([1.0, 1.0])
        graph = tf.function(lambda: strategy.run(train, args=(batch,)), autograph=False).get_concrete_function().graph
        definition = graph.as_graph_def()
        nodes = [definition.node, *(function.node_def for function in definition.library.function)]
        return {"ops": sorted({node.op for each in nodes for node in each})}

    return run


def keras_log(strategy):
    """What Keras's own loop logs for a train_step that returns a mean over its rows."""
    with strategy.scope():

        class Logged(keras.Model):
            def __init__(self):
                super().__init__()
                self.kernel = self.add_weight(name="kernel", shape=(2,), initializer="ones")
                self.built = True

            def train_step(self, data):
                rows, _ = data
                return {"value": tf.reduce_mean(tf.linalg.matvec(rows, self.kernel))}

        model = Logged()
        model.compile("sgd")
    x = np.array([[0, 0]] * 4 + [[1, 0], [1, 0], [4, 0]], "float32")
    return {"value": model.fit(x, x, batch_size=4, shuffle=False, verbose=0).history["value"]}


SCENARIOS = {
    "memory": memory,
    "adamw": twenty_steps(adamw),
    "adamw_micro": twenty_steps(adamw, micro_batches=2),
    "muon": twenty_steps(lambda: keras.optimizers.Muon(1e-2, weight_decay=0.1, global_clipnorm=0.3)),
    "lion_micro": twenty_steps(lambda: keras.optimizers.Lion(1e-3, weight_decay=0.1, clipnorm=0.1), micro_batches=2),
    "nadam": twenty_steps(lambda: keras.optimizers.Nadam(1e-2, global_clipnorm=0.3)),
    "accumulation": twenty_steps(lambda: adamw(gradient_accumulation_steps=2)),
    "average": twenty_steps(lambda: adamw(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)),
    "uneven": uneven,
    "one_row_left": one_row_left,
    "idle": idle,
    "compiled_metrics": compiled_metrics,
    "own_dataset": own_dataset,
    "refused": refused,
    **{name: one_step(ReplicatedModel, make, rows, **more) for name, (make, rows, more) in SAME_STEP.items()},
    "dropout": dropout(ReplicatedModel),
    "remat": remat,
    "embedding": embedding(ReplicatedModel),
    "keras_dropout": dropout(keras.Model),
    "keras_remat": keras_remat,
    "keras_embedding": embedding(keras.Model),
    "keras_log": keras_log,
    **{f"keras_{name}": one_step(keras.Model, make, rows, **more) for name, (make, rows, more) in SAME_STEP.items()},
}


def main():
    kind, output, *names = sys.argv[1:]
    strategy = make_strategy(kind, virtual_cpus=2 if kind == "mirrored" else None)
    results = {}
    for name in names:
        try:
            for field, value in SCENARIOS[name](strategy).items():
                results[f"{name}/{field}"] = np.asarray(value)
        except Exception:
            results[f"{name}/error"] = np.asarray(traceback.format_exc())
    np.savez(output, **results)


if __name__ == "__main__":
    main()
