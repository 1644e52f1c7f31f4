import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny_models import LinearModel, TokenModel, flat_weights, mean_loss, token_data

from lmzoo.engine.metrics import GlobalMean
from lmzoo.engine.model import ReplicatedModel


def adamw(**kwargs):
    return keras.optimizers.AdamW(1e-2, **{"global_clipnorm": 0.3, **kwargs})


def trained(optimizer=None, epochs=2, rows=40, batch_size=8, **compile_arguments):
    """A model after some steps on weighted data, and its history."""
    model = TokenModel()
    model.compile(optimizer or adamw(), **compile_arguments)
    ids, labels, weights = token_data(rows)
    history = model.fit(
        ids, labels, sample_weight=weights, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0
    )
    return model, history.history


def take_step(model, rows, weights=None):
    """One training step of a LinearModel on rows of x; returns the logs."""
    rows = np.asarray(rows, "float32")
    weights = None if weights is None else np.asarray(weights, "float32")
    return model.train_on_batch(rows, rows, sample_weight=weights, return_dict=True)


def linear(optimizer=None, **compile_arguments):
    model = LinearModel()
    model.compile(optimizer or keras.optimizers.SGD(1.0), **compile_arguments)
    return model


@pytest.fixture(scope="module")
def reference():
    return trained()


class TestSameAsKeras:
    """On one device and with equal weights, nothing but Keras's own fit."""

    def build(self, cls):
        class Network(cls):
            def __init__(self):
                super().__init__()
                self.inner = keras.layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(seed=5))
                self.inner.build((None, 4))

            def call(self, inputs):
                return self.inner(inputs)

        return Network()

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda: adamw(),
            lambda: keras.optimizers.Adam(1e-2, clipnorm=0.05),
            lambda: keras.optimizers.Adam(1e-2, clipvalue=0.01),
            lambda: keras.optimizers.Muon(1e-2, weight_decay=0.1),
            lambda: keras.optimizers.Nadam(1e-2, global_clipnorm=0.3),
            lambda: keras.optimizers.SGD(1e-2, momentum=0.9, loss_scale_factor=64.0),
            lambda: adamw(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3),
            lambda: adamw(gradient_accumulation_steps=2),
        ],
        ids=["adamw", "clipnorm", "clipvalue", "muon", "nadam", "loss_scale_factor", "ema", "accumulation"],
    )
    def test_weights_and_history(self, optimizer):
        generator = np.random.default_rng(0)
        x = generator.normal(size=(40, 4)).astype("float32")
        y = generator.normal(size=(40, 3)).astype("float32")
        histories, weights = [], []
        for cls in (keras.Model, ReplicatedModel):
            model = self.build(cls)
            model.compile(optimizer(), loss="mse", metrics=["mae"])
            fit = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, validation_split=0.2)
            histories.append(fit.history)
            weights.append(np.concatenate([variable.numpy().ravel() for variable in model.weights]))
        np.testing.assert_allclose(weights[1], weights[0], atol=2e-6)
        assert set(histories[1]) == {*histories[0], "gradient_norm"}
        for name, values in histories[0].items():
            np.testing.assert_allclose(histories[1][name], values, rtol=1e-5, err_msg=name)

    def test_class_weight(self):
        x = np.eye(2, dtype="float32")
        labels = np.array([0, 1])
        model = linear(loss=lambda y, outputs: outputs)
        model.fit(x, labels, batch_size=2, class_weight={0: 3.0, 1: 1.0}, verbose=0)
        np.testing.assert_allclose(model.kernel.numpy(), [0.75, 0.25])


class TestMean:
    def test_gradient_is_that_of_the_weighted_mean(self):
        model = linear()
        logs = take_step(model, [[1, 0], [0, 1], [5, 5]], [3.0, 1.0, 0.0])
        np.testing.assert_allclose(model.kernel.numpy(), [0.75, 0.25])
        assert logs["gradient_norm"] == pytest.approx(np.hypot(0.75, 0.25))

    @pytest.mark.parametrize("count", [2, 3, 8])
    def test_micro_batches_change_nothing(self, reference, count):
        model, history = trained(micro_batches=count)
        np.testing.assert_allclose(flat_weights(model), flat_weights(reference[0]), atol=1e-6)
        for name, values in reference[1].items():
            np.testing.assert_allclose(history[name], values, rtol=1e-5, err_msg=name)

    def test_micro_batches_of_an_uneven_last_batch(self):
        plain, split = trained(rows=37), trained(rows=37, micro_batches=6)
        np.testing.assert_allclose(flat_weights(split[0]), flat_weights(plain[0]), atol=1e-6)
        np.testing.assert_allclose(split[1]["loss"], plain[1]["loss"], rtol=1e-5)

    def test_epoch_means_are_over_examples_not_batches(self):
        model = TokenModel()
        model.compile(keras.optimizers.SGD(0.0))
        ids, labels, weights = token_data(37)
        logs = model.evaluate(ids, labels, sample_weight=weights, batch_size=8, verbose=0, return_dict=True)
        expected = mean_loss(model, ids, labels, weights)
        assert logs["loss"] == pytest.approx(expected, rel=1e-5)
        assert logs["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
        history = model.fit(ids, labels, sample_weight=weights, batch_size=8, verbose=0).history
        assert history["loss"][0] == pytest.approx(expected, rel=1e-5)

    def test_a_step_without_weight_changes_nothing(self):
        model = linear(keras.optimizers.AdamW(0.1, weight_decay=0.5))
        take_step(model, [[1, 2]])
        before = [variable.numpy() for variable in [*model.weights, *model.optimizer.variables]]
        logs = take_step(model, [[1, 2]], [0.0])
        after = [variable.numpy() for variable in [*model.weights, *model.optimizer.variables]]
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old, new)
        assert np.isnan(logs["loss"])
        assert model.skipped_steps == 0

    def test_regularizers_count_once(self):
        model = LinearModel()
        model.penalised = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.5), use_bias=False)
        model.penalised.build((None, 2))
        model.compile(keras.optimizers.SGD(1.0), micro_batches=2)
        before = model.penalised.kernel.numpy()
        logs = take_step(model, [[1, 0]] * 4, [1.0, 1.0, 5.0, 5.0])
        np.testing.assert_allclose(model.penalised.kernel.numpy(), before - before, atol=1e-6)
        assert logs["loss"] == pytest.approx(0.5 * float((before**2).sum()), rel=1e-5)


class TestWhatRunsAskFor:
    def test_recent_loss_is_that_of_the_steps_since_it_was_taken(self):
        model = linear(keras.optimizers.SGD(0.0))
        model.kernel.assign([1.0, 0.0])
        assert np.isnan(model.take_recent_loss())
        take_step(model, [[1, 0], [3, 0]], [3.0, 1.0])
        take_step(model, [[2, 0]], [4.0])
        assert model.take_recent_loss() == pytest.approx(-(3 + 3 + 8) / 8)
        take_step(model, [[np.nan, 0]])
        assert np.isnan(model.take_recent_loss())
        take_step(model, [[5, 0]])
        assert model.take_recent_loss() == pytest.approx(-5.0)

    def test_a_wish_to_stop_is_seen_with_the_next_step(self):
        model = linear(keras.optimizers.SGD(0.0))
        take_step(model, [[1, 0]])
        assert not model.is_asked_to_stop
        model.ask_to_stop()
        assert not model.is_asked_to_stop
        take_step(model, [[1, 0]])
        assert model.is_asked_to_stop


class TestNotFinite:
    @pytest.mark.parametrize("optimizer", ["adamw", "nadam"])
    def test_no_variable_changes_and_the_step_is_counted(self, optimizer):
        model = linear(optimizer)
        take_step(model, [[1, 2]])
        before = [variable.numpy() for variable in [*model.weights, *model.optimizer.variables]]
        logs = take_step(model, [[1, 2], [np.inf, 0]])
        after = [variable.numpy() for variable in [*model.weights, *model.optimizer.variables]]
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old, new)
        assert model.skipped_steps == 1
        assert not np.isfinite(logs["gradient_norm"])
        take_step(model, [[1, 2]])
        assert (model.kernel.numpy() != before[0]).all()
        assert model.skipped_steps == 1

    def test_the_mean_of_the_epoch_leaves_the_step_out(self):
        model = linear(keras.optimizers.SGD(0.0))
        model.kernel.assign([1.0, 1.0])
        x = np.array([[1, 2], [np.nan, 0], [3, 4]], "float32")
        history = model.fit(x, x, batch_size=1, shuffle=False, verbose=0).history
        assert history["loss"] == [pytest.approx(-5.0)]
        assert np.isnan(model.evaluate(x, x, batch_size=1, verbose=0))

    def test_a_loss_that_is_not_finite_though_its_gradient_is(self):
        model = linear(loss=lambda labels, outputs: outputs + tf.stop_gradient(labels))
        rows = np.array([[1.0, 2.0]], "float32")
        model.train_on_batch(rows, np.array([np.inf], "float32"))
        np.testing.assert_array_equal(model.kernel.numpy(), [0.0, 0.0])
        assert {name: variable.numpy().tolist() for name, variable in model.training_state.items()} == {
            "skipped_steps": 1,
            "skipped_in_a_row": 1,
            "recent_loss": [0.0, 0.0],
            "accumulated_weight": 0.0,
        }

    def test_skipped_steps_in_a_row_are_those_since_the_last_good_one(self):
        model = linear(keras.optimizers.SGD(1.0))
        counts = []
        for value in (np.nan, np.inf, 1.0, np.nan, 1.0):
            take_step(model, [[1, value]])
            counts.append(model.skipped_in_a_row)
        assert counts == [1, 2, 0, 1, 0]
        assert model.skipped_steps == 3

    def test_loss_scale_halves_and_doubles(self):
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(1.0), initial_scale=8.0, dynamic_growth_steps=2
        )
        model = linear(optimizer)
        scales = []
        for row in ([1, 0], [np.inf, 0], [1, 0], [1, 0], [1, 0], [1, 0]):
            take_step(model, [row])
            scales.append(float(optimizer.dynamic_scale.numpy()))
        assert scales == [8.0, 4.0, 4.0, 8.0, 8.0, 16.0]
        np.testing.assert_allclose(model.kernel.numpy(), [5.0, 0.0])
        assert int(optimizer.iterations.numpy()) == 5

    def test_float16_trains(self):
        model = TokenModel(dtype="mixed_float16")
        model.compile(adamw(), micro_batches=2)
        ids, labels, weights = token_data(64)
        history = model.fit(ids, labels, sample_weight=weights, batch_size=16, epochs=10, verbose=0).history
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert history["loss"][-1] < 0.8 * history["loss"][0]
        assert model.skipped_steps == 0

    def test_float16_gradient_of_many_tokens_does_not_overflow(self):
        model = LinearModel()
        model.compile(keras.optimizers.SGD(1.0, loss_scale_factor=2.0**15))

        def compute_sums(inputs, labels, weights, training):
            total = tf.cast(tf.shape(inputs)[0], tf.float32)
            return {"loss": (tf.cast(tf.reduce_sum(tf.cast(model(inputs), tf.float16)), tf.float32), total)}

        model.compute_sums = compute_sums
        take_step(model, np.full([512, 2], 1.0))
        np.testing.assert_allclose(model.kernel.numpy(), [1.0, 1.0])


class TestAccumulation:
    """Keras's own gradient_accumulation_steps."""

    def test_two_steps_are_the_mean_over_their_examples(self):
        model = linear(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2))
        take_step(model, [[1, 0], [0, 1]], [1.0, 1.0])
        np.testing.assert_array_equal(model.kernel.numpy(), [0.0, 0.0])
        take_step(model, [[4, 0]], [6.0])
        np.testing.assert_allclose(model.kernel.numpy(), [25 / 8, 1 / 8])
        take_step(model, [[1, 1]])
        take_step(model, [[1, 1]])
        np.testing.assert_allclose(model.kernel.numpy(), [33 / 8, 9 / 8])
        assert int(model.optimizer.iterations.numpy()) == 2

    def test_clipping_acts_on_the_mean(self):
        model = linear(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2, global_clipnorm=1.0))
        take_step(model, [[6, 0]])
        logs = take_step(model, [[0, 8]])
        np.testing.assert_allclose(model.kernel.numpy(), [0.6, 0.8], rtol=1e-6)
        assert logs["gradient_norm"] == pytest.approx(5.0)

    def test_a_step_that_is_not_finite_leaves_no_trace(self):
        model = linear(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2))
        take_step(model, [[2, 0]])
        take_step(model, [[np.nan, 0]])
        np.testing.assert_array_equal(model.kernel.numpy(), [0.0, 0.0])
        take_step(model, [[0, 2]])
        np.testing.assert_allclose(model.kernel.numpy(), [1.0, 1.0])
        assert model.skipped_steps == 1


class TestOptimizerFeatures:
    def test_ema_is_written_back_at_the_end(self):
        model = linear(keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5))
        x = np.array([[1, 0], [2, 0], [4, 0]], "float32")
        model.fit(x, x, batch_size=1, shuffle=False, verbose=0)
        average = 0.5 * (0.5 * 1.0 + 0.5 * 3.0) + 0.5 * 7.0
        np.testing.assert_allclose(model.kernel.numpy(), [average, 0.0])

    def test_constraint(self):
        model = LinearModel()
        model.kernel.constraint = keras.constraints.MaxNorm(0.5, axis=0)
        model.compile(keras.optimizers.SGD(1.0))
        take_step(model, [[3, 4]])
        np.testing.assert_allclose(model.kernel.numpy(), [0.3, 0.4], rtol=1e-5)

    def test_a_weight_that_the_loss_does_not_use_stays(self):
        model = LinearModel()
        model.unused = model.add_weight(name="unused", shape=(2, 2), initializer="ones")
        model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), micro_batches=2)
        with pytest.warns(UserWarning, match="the loss does not depend on .*unused"):
            take_step(model, [[1, 0], [0, 1]])
        np.testing.assert_array_equal(model.unused.numpy(), np.ones([2, 2]))
        assert (model.kernel.numpy() != 0).all()

    def test_frozen_layer(self):
        model = TokenModel()
        model.hidden.trainable = False
        model.compile(adamw())
        before = model.hidden.kernel.numpy()
        ids, labels, weights = token_data(8)
        model.train_on_batch(ids, labels, weights)
        np.testing.assert_array_equal(model.hidden.kernel.numpy(), before)


class TestExecution:
    @pytest.mark.parametrize(
        "arguments",
        [
            {"steps_per_execution": 3},
            {"run_eagerly": True},
            {"run_eagerly": True, "micro_batches": 2, "steps_per_execution": 2},
            {"jit_compile": True},
            {"jit_compile": True, "micro_batches": 4},
        ],
        ids=str,
    )
    def test_every_way_to_run_gives_the_same(self, reference, arguments):
        model = TokenModel()
        model.compile(adamw(), **arguments)
        ids, labels, weights = token_data(40)
        dataset = tf.data.Dataset.from_tensor_slices((ids, labels, weights)).batch(8, drop_remainder=True)
        history = model.fit(dataset, epochs=2, shuffle=False, verbose=0).history
        np.testing.assert_allclose(flat_weights(model), flat_weights(reference[0]), atol=1e-6)
        np.testing.assert_allclose(history["loss"], reference[1]["loss"], rtol=1e-5)
        assert int(model.optimizer.iterations.numpy()) == 10

    def test_steps_per_execution_covers_the_rest_of_the_epoch(self):
        calls = []
        counter = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: calls.append((batch, logs)))
        model = TokenModel()
        model.compile(adamw(), steps_per_execution=3)
        ids, labels, weights = token_data(40)
        model.fit(ids, labels, sample_weight=weights, batch_size=8, callbacks=[counter], verbose=0)
        assert [batch for batch, _ in calls] == [2, 5]  # Keras names the steps it asked for
        assert all(logs["gradient_norm"] > 0 for _, logs in calls)
        assert int(model.optimizer.iterations.numpy()) == 5

    def test_one_trace_for_an_epoch(self):
        traces = []

        class Counted(TokenModel):
            def compute_sums(self, *args, **kwargs):
                traces.append(1)
                return super().compute_sums(*args, **kwargs)

        model = Counted()
        model.compile(adamw(), micro_batches=2)
        ids, labels, weights = token_data(37)
        model.fit(ids, labels, sample_weight=weights, batch_size=8, epochs=2, verbose=0)
        assert len(traces) == 1

    def test_the_step_holds_nothing_that_a_tpu_cannot_run(self):
        model = TokenModel(dropout_rate=0.1)
        model.compile(adamw(use_ema=True), micro_batches=2, jit_compile=True)
        model.make_train_function()
        spec = tf.TensorSpec([8, 4], tf.int32)
        step = tf.function(model._train_replica, autograph=False)
        graph = step.get_concrete_function((spec, spec, tf.TensorSpec([8, 4]))).graph
        definition = graph.as_graph_def(add_shapes=True)
        nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
        stateful_random = {"RandomUniform", "RandomStandardNormal", "TruncatedNormal", "RandomUniformInt"}
        assert {node.op for node in nodes}.isdisjoint(stateful_random | {"Where", "Unique", "PyFunc", "EagerPyFunc"})
        types = {value.type for node in nodes for value in node.attr.values() if value.type}
        assert tf.string.as_datatype_enum not in types
        shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
        assert shapes
        assert not any(shape.unknown_rank or any(dim.size < 0 for dim in shape.dim) for shape in shapes)

    def test_dropout_differs_between_steps_and_is_off_in_evaluation(self):
        model = TokenModel(dropout_rate=0.5)
        model.compile(keras.optimizers.SGD(0.0), micro_batches=2)
        ids, labels, weights = token_data(8)
        losses = [model.train_on_batch(ids, labels, weights)[0] for _ in range(2)]
        assert losses[0] != losses[1]
        assert model.test_on_batch(ids, labels, weights) == model.test_on_batch(ids, labels, weights)


class TestCompiledLoss:
    def test_sample_weights_weight_the_mean(self):
        model = linear(loss=lambda y, outputs: outputs)
        logs = take_step(model, [[1, 0], [0, 1], [5, 5]], [3.0, 1.0, 0.0])
        np.testing.assert_allclose(model.kernel.numpy(), [0.75, 0.25])
        assert set(logs) == {"loss", "gradient_norm"}

    def test_metrics_beside_the_models_own_objective(self):
        model = TokenModel()
        model.compile(adamw(), metrics=["sparse_categorical_accuracy"], micro_batches=2)
        ids, labels, weights = token_data(37)
        logs = model.evaluate(ids, labels, sample_weight=weights, batch_size=8, verbose=0, return_dict=True)
        guesses = model.predict(ids, verbose=0).argmax(axis=-1)
        assert logs["sparse_categorical_accuracy"] == pytest.approx((guesses == labels).mean(), rel=1e-5)
        assert logs["accuracy"] == pytest.approx(((guesses == labels) * weights).sum() / weights.sum(), rel=1e-5)
        model.fit(ids, labels, sample_weight=weights, batch_size=8, verbose=0)

    def test_keras_mask(self):
        model = keras.Sequential([keras.layers.Embedding(5, 1, mask_zero=True)])

        class Masking(ReplicatedModel):
            def __init__(self):
                super().__init__()
                self.inner = model
                self(np.zeros((1, 3), "int32"))

            def call(self, inputs):
                return self.inner(inputs)

        masked = Masking()
        masked.compile("sgd", loss="mse")
        masked.inner.layers[0].embeddings.assign([[9.0], [1.0], [2.0], [0.0], [0.0]])
        ids = np.array([[1, 2, 0], [1, 0, 0]])
        assert masked.evaluate(ids, np.zeros([2, 3, 1]), verbose=0) == pytest.approx((1 + 4 + 1) / 3)


class TestSaving:
    def test_a_loaded_model_goes_on_where_the_saved_one_stopped(self, tmp_path):
        model, _ = trained(micro_batches=2, steps_per_execution=2)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert loaded.get_compile_config()["micro_batches"] == 2
        ids, labels, weights = token_data(8)
        first = [each.train_on_batch(ids, labels, weights) for each in (model, loaded)]
        second = [each.train_on_batch(ids, labels, weights) for each in (model, loaded)]
        assert first[0] == first[1]
        assert second[0] == second[1]
        np.testing.assert_array_equal(flat_weights(loaded), flat_weights(model))

    def test_training_adds_no_weights(self):
        model = TokenModel()
        before = model.count_params()
        model.compile(adamw(gradient_accumulation_steps=2))
        ids, labels, weights = token_data(8)
        model.train_on_batch(ids, labels, weights)
        assert model.count_params() == before


class TestErrors:
    def test_model_without_objective(self):
        class Network(ReplicatedModel):
            def __init__(self):
                super().__init__()
                self.inner = keras.layers.Dense(1)
                self.inner.build((None, 1))

        model = Network()
        model.compile("sgd")
        with pytest.raises(NotImplementedError, match=r"Network has no compute_sums\(\)"):
            model.train_on_batch(np.zeros([1, 1]), np.zeros([1, 1]))

    def test_undeclared_name(self):
        class Network(LinearModel):
            def compute_sums(self, *args, **kwargs):
                return {**super().compute_sums(*args, **kwargs), "extra": (tf.constant(1.0), tf.constant(1.0))}

        model = Network()
        model.compile("sgd")
        with pytest.raises(ValueError, match=r"returned \['extra', 'loss'\], but sum_metrics\(\) declares \['loss'\]"):
            take_step(model, [[1, 1]])

    def test_no_loss_among_the_metrics(self):
        class Network(LinearModel):
            def sum_metrics(self):
                return {"other": GlobalMean(name="other")}

        with pytest.raises(ValueError, match='must name "loss", but names'):
            Network().compile("sgd")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"micro_batches": 0}, "micro_batches must be an integer of 1 or more, but is 0"),
            ({"micro_batches": 2.0}, "micro_batches must be an integer of 1 or more, but is 2.0"),
            ({"loss": ["mse", "mae"]}, "loss must be one loss for one output"),
            ({"loss": "mse", "loss_weights": [1.0]}, "loss must be one loss for one output"),
            ({"loss": keras.losses.MeanSquaredError(reduction="sum")}, "reduction='sum'"),
        ],
    )
    def test_compile(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LinearModel().compile("sgd", **arguments)

    def test_no_weights(self):
        class Empty(ReplicatedModel):
            pass

        model = Empty()
        model.compile("sgd")
        with pytest.raises(ValueError, match="Empty has no trainable weights"):
            model.train_on_batch(np.zeros([1, 1]))

    def test_loss_that_depends_on_no_weight(self):
        model = LinearModel()
        model.compile("sgd", loss=lambda y, outputs: tf.stop_gradient(outputs))
        with pytest.raises(ValueError, match="does not depend on any trainable weight"):
            take_step(model, [[1, 1]])

    def test_accumulation_with_an_optimizer_that_orders_its_own_step(self):
        model = linear(keras.optimizers.Nadam(gradient_accumulation_steps=2))
        with pytest.raises(ValueError, match="gradient_accumulation_steps does not work with Nadam"):
            take_step(model, [[1, 1]])

    def test_micro_batches_under_xla_need_known_rows(self):
        model = linear(micro_batches=2, jit_compile=True)
        with pytest.raises(ValueError, match="each replica gets 3 rows"):
            take_step(model, [[1, 1]] * 3)
