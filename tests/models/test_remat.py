"""Recomputing blocks saves memory, and changes neither the gradient nor what is random."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CAUSAL, SEQ2SEQ, TINY, inputs_for

from lmzoo.engine.recompute import recomputed
from lmzoo.models import ARCHITECTURES

TESTED = ("gpt2", "t5")


def train(make_model, dtype=None, remat=None, **arguments):
    """Losses, trainable and other variables after four steps with dropout."""
    model = make_model(dtype, dropout_rate=0.1)
    model.compile(keras.optimizers.SGD(0.1), remat=remat, **arguments)
    random = np.random.default_rng(0)
    ids, labels = random.integers(0, model.config.vocab_size, (2, 8, 9)).astype("int32")
    weights = random.random((8, 9)).astype("float32")
    history = model.fit(ids, labels, sample_weight=weights, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    values = [[each.numpy() for each in group] for group in (model.trainable_variables, model.non_trainable_variables)]
    return history["loss"], *values


@pytest.mark.parametrize(
    ("dtype", "arguments", "tolerance"),
    [
        ("float32", {}, 1e-6),
        pytest.param("float32", {"jit_compile": True}, 1e-6, marks=pytest.mark.slow),
        pytest.param("float32", {"run_eagerly": True}, 1e-6, marks=pytest.mark.slow),
        ("float32", {"micro_batches": 2}, 1e-6),
        pytest.param("float32", {"steps_per_execution": 2}, 1e-6, marks=pytest.mark.slow),
        ("mixed_bfloat16", {}, 2e-2),
    ],
)
def test_training_is_the_same(make_model, dtype, arguments, tolerance):
    plain, remat = (train(make_model, dtype, choice, **arguments) for choice in (None, "block"))
    np.testing.assert_allclose(remat[0], plain[0], rtol=10 * tolerance)
    for actual, expected in zip(remat[1], plain[1], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
    for actual, expected in zip(remat[2], plain[2], strict=True):  # The states of the seeds.
        np.testing.assert_array_equal(actual, expected)
    assert plain[2]


def compiled(make_model, remat):
    """What XLA makes of the sums and gradients of a model in training."""
    model = make_model(dropout_rate=0.1)
    model.compile(remat=remat)
    ids = tf.zeros((2, 8), tf.int32)

    @tf.function(jit_compile=True, autograph=False)
    def gradients(ids):
        with tf.GradientTape() as tape:
            loss, _ = model.compute_sums(ids, ids, None, training=True)["loss"]
        return tape.gradient(loss, [each.value for each in model.trainable_variables])

    return gradients.experimental_get_compiler_ir(ids)(stage="optimized_hlo")


@pytest.mark.slow
def test_no_compiler_merges_the_second_forward_pass_with_the_first(make_model):
    """What is merged is kept. The products of a block are there twice, but for the last one, which nothing needs."""
    plain, remat = (compiled(make_model, choice) for choice in (None, "block"))
    blocks = make_model().config.num_layers
    assert remat.count(" dot(") >= plain.count(" dot(") + 4 * blocks


def test_the_choice_is_kept(make_model, tmp_path):
    model = make_model()
    model.compile("adamw", remat="block")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_compile_config()["remat"] == "block"
    loaded.compile("adamw")
    assert loaded.get_compile_config()["remat"] is None


@pytest.mark.parametrize("remat", ["blocks", True, ""])
def test_another_choice_is_refused(make_model, remat):
    with pytest.raises(ValueError, match=r'remat is .*, but must be "block" or None'):
        make_model().compile(remat=remat)


@pytest.mark.parametrize("architecture", TINY, indirect=True)
def test_every_block_of_an_architecture_is_recomputed(make_model, architecture, monkeypatch):
    """And only in training: neither evaluation nor decoding pays for it."""
    ran = []
    monkeypatch.setattr(
        "lmzoo.models.base.recomputed", lambda block, *tensors, **more: ran.append(block) or block(*tensors, **more)
    )
    model = make_model()
    model.compile(remat="block")
    ids = np.ones((2, 4), "int32")
    inputs = inputs_for(model, ids)
    model(inputs)
    if architecture in (*CAUSAL, *SEQ2SEQ):
        model.generate(ids, max_new_tokens=2)
    assert not ran
    model(inputs, training=True)
    assert len(ran) == model.config.num_layers + getattr(model.config, "decoder_layers", 0)
    assert issubclass(ARCHITECTURES[architecture], type(model))


class Changing(keras.layers.Layer):
    """x * kernel * other, with a count of its calls; `other` and the outputs' second place may be None."""

    def build(self, shape):
        self.kernel = self.add_weight(name="kernel", shape=(), initializer="ones")
        self.count = self.add_weight(name="count", shape=(), initializer="zeros", trainable=False)

    def call(self, inputs, mask, other, lose=False):
        self.count.assign(self.count + 1)
        if lose:
            self.add_loss(keras.ops.sum(inputs))
        kept = keras.ops.where(mask, inputs * self.kernel * (1 if other is None else other), 0.0)
        return {"kept": kept, "nothing": None, "count": [keras.ops.identity(self.count.value)]}


class TestRecomputed:
    def make(self):
        layer = Changing()
        layer.build(None)
        layer.kernel.assign(3.0)
        return layer

    @pytest.mark.parametrize("in_graph", [False, True])
    def test_inputs_of_all_kinds(self, in_graph):
        layer = self.make()

        def run(inputs, mask, other):
            with tf.GradientTape() as tape:
                tape.watch([inputs, other])
                outputs = recomputed(layer, inputs, mask, other)
                loss = tf.reduce_sum(outputs["kept"] ** 2) + outputs["count"][0] * 0
            return tape.gradient(loss, [inputs, other, layer.kernel.value]), outputs

        run = tf.function(run) if in_graph else run
        (dx, dy, dk), outputs = run(tf.constant([1.0, 2.0]), tf.constant([True, False]), tf.constant([5.0, 7.0]))
        np.testing.assert_allclose(outputs["kept"], [15.0, 0.0])
        assert outputs["nothing"] is None
        np.testing.assert_allclose(dx, [2 * 15 * 15, 0])
        np.testing.assert_allclose(dy, [2 * 15 * 3, 0])
        np.testing.assert_allclose(dk, 2 * 15 * 5)
        assert float(layer.count.numpy()) == 1.0

    def test_none_and_no_rows(self):
        layer = self.make()
        inputs = tf.zeros((0, 2))
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = recomputed(layer, inputs, tf.zeros((0, 2), tf.bool), None)
        gradients = tape.gradient(outputs["kept"], [inputs, layer.kernel.value])
        assert gradients[0].shape == (0, 2)
        assert float(gradients[1]) == 0.0

    def test_an_infinite_gradient_gives_no_nan_by_itself(self):
        layer, inputs = self.make(), tf.constant([1.0])
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = recomputed(layer, inputs, tf.constant([True]), None)["kept"]
        assert float(tape.gradient(outputs, inputs, output_gradients=tf.constant([np.inf]))[0]) == np.inf

    @pytest.mark.parametrize("in_graph", [False, True])
    def test_only_what_the_layer_changes_is_assigned(self, in_graph, monkeypatch):
        layer, assigned = self.make(), []
        layer.trainable = False
        for name in ("kernel", "count"):
            variable = getattr(layer, name)
            monkeypatch.setattr(variable, "_direct_assign", lambda value, name=name: assigned.append(name))
        run = tf.function(lambda inputs, mask: recomputed(layer, inputs, mask, None)["kept"])
        (run if in_graph else run.python_function)(tf.ones((1,)), tf.constant([True]))
        assert assigned == ["count"]

    def test_a_lost_loss_is_an_error(self):
        with pytest.raises(ValueError, match="calls add_loss"):
            recomputed(self.make(), tf.ones((1,)), tf.constant([True]), None, lose=True)
