"""Freezing, layer-wise learning rates, decay towards the start, and the ways to train that change no result."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from examples import TASKS, WITH_HEADS, make_batch, make_task, quick
from lmzoo.engine.optimizers import make_optimizer

TESTED = ("bert",)


def values_of(task):
    return {variable.path: keras.ops.convert_to_numpy(variable) for variable in task.weights}


def step(task, optimizer, **arguments):
    """Values of the weights before and after a step, by path."""
    task.compile(optimizer, run_eagerly=True, **arguments)
    before = values_of(task)
    task.train_on_batch(*make_batch("single_label"))
    return before, values_of(task)


@pytest.mark.parametrize("architecture", WITH_HEADS, indirect=True)
def test_depths(make_model):
    task = make_task("single_label", make_model())
    depths = task.layer_depths()
    assert set(depths) == {variable.path for variable in task.trainable_variables}
    top = len(task.encoder.blocks) + 1
    for path, depth in depths.items():
        if "block_" in path:
            assert depth == 1 + int(path.split("block_")[1].split("/")[0])
        elif "embedding" in path:
            assert depth == 0
        else:
            assert depth == top
            assert any(part in path for part in ("pooler", "dense", "output", "final_norm"))
    assert set(depths.values()) == set(range(top + 1))


@pytest.mark.parametrize(("frozen", "remat"), [(None, None), (0, None), (1, "block"), ("all", "block")])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "albert"], indirect=True)
def test_what_is_frozen_stays(make_model, frozen, remat):
    task = make_task("single_label", make_model())
    depths = task.layer_depths()
    deepest = {None: -1, "all": len(task.encoder.blocks) + 1}.get(frozen, frozen)
    in_head = {path for path in depths if path.startswith(task.name)}
    expected = {path for path, depth in depths.items() if depth > deepest} | in_head
    task.freeze(frozen)
    assert {variable.path for variable in task.trainable_variables} == expected
    before, after = step(task, keras.optimizers.SGD(0.5), remat=remat)
    moved = {path for path in depths if np.abs(after[path] - before[path]).max() > 0}
    assert moved <= expected
    assert {path for path in expected - moved if not path.endswith("bias")} == set()


def test_frozen_weights_have_no_optimizer_state(make_model):
    sizes = []
    for frozen in (None, 2, "all"):
        task = make_task("single_label", make_model())
        task.freeze(frozen)
        step(task, make_optimizer("adamw", 1e-3))
        state = sum(int(np.prod(each.shape)) for each in task.optimizer.variables) - 2
        trainable = sum(int(np.prod(each.shape)) for each in task.trainable_variables)
        assert state == 2 * trainable
        sizes.append(trainable)
    assert sizes[0] > sizes[1] > sizes[2] == 16 * 3 + 3


def test_freezing_after_the_first_step_is_refused(make_model):
    task = make_task("single_label", make_model())
    task.freeze(1)
    step(task, None)
    with pytest.raises(ValueError, match="freeze before training begins"):
        task.freeze(None)


@pytest.mark.parametrize("num_layers", [-1, 3, "some"])
def test_freezing_what_there_is_not(make_model, num_layers):
    with pytest.raises(ValueError, match=f'num_layers is {num_layers!r}, but must be "all", None or'):
        make_task("single_label", make_model()).freeze(num_layers)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_layers_learn_at_their_own_rates(make_model, name):
    """The first step of either is as long as its learning rate says."""
    moves = []
    for decay in (1.0, 0.5):
        task = make_task("single_label", make_model())
        factors = task.learning_rate_factors(decay)
        optimizer = make_optimizer(name, 1e-3, weight_decay=0.0, learning_rate_factors=factors)
        before, after = step(task, optimizer)
        moves.append(
            [(depth, np.abs(after[path] - before[path]).mean()) for path, depth in task.layer_depths().items()]
        )
    for (depth, whole), (_, part) in zip(*moves, strict=True):
        assert part == pytest.approx(0.5 ** (3 - depth) * whole, rel=1e-2, abs=1e-9)
    assert {depth for depth, _ in moves[0]} == {0, 1, 2, 3}


@pytest.mark.parametrize("decay", [0.0, 1.1])
def test_a_decay_outside_its_range(make_model, decay):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        make_task("single_label", make_model()).learning_rate_factors(decay)


def test_decay_towards_the_start_is_the_encoders(make_model):
    """A learning rate of 0.01 times a factor of 100 takes the encoder all the way back before its second step."""
    batch = make_batch("single_label")
    after = []
    for factor in (0.0, 100.0):
        task = make_task("single_label", make_model(num_layers=1), name="task")
        task.output_layer.kernel.assign(np.random.default_rng(0).normal(size=(16, 3)))
        task.compile(make_optimizer("adamw", 0.01, weight_decay=0.0, start_decay=task.start_decay(factor)))
        before = {variable.path: variable.numpy() for variable in task.trainable_variables}
        moves = []
        for _ in range(2):
            task.train_on_batch(*batch)
            moves.append([np.abs(each.numpy() - before[each.path]).max() for each in task.trainable_variables])
        after.append((moves, [each.path.startswith("task/") for each in task.trainable_variables]))
    (free, in_head), (held, _) = after
    np.testing.assert_allclose(held[0], free[0], rtol=1e-4)  # Nothing has moved before the first step.
    for far, near, is_head in zip(free[1], held[1], in_head, strict=True):
        assert near < 0.012 if not is_head else near == pytest.approx(far, rel=0.2)
        assert far > 0.015 or not is_head
    with pytest.raises(ValueError, match="must be 0 or more"):
        task.start_decay(-1.0)


@pytest.mark.parametrize("name", quick("tokens"))
def test_ways_to_train_that_change_nothing(make_model, name):
    results = []
    ways = [{}, {"remat": "block"}, {"steps_per_execution": 2}]
    if name != "contrastive":  # A micro-batch has its own negatives.
        ways.append({"micro_batches": 3})
    for arguments in ways:
        keras.utils.set_random_seed(1)
        task = make_task(name, make_model(num_layers=1))
        task.compile(keras.optimizers.SGD(0.1), **arguments)
        inputs, labels, weights = make_batch(name, rows=12)
        history = task.fit(inputs, labels, sample_weight=weights, batch_size=6, shuffle=False, verbose=0).history
        results.append((history["loss"][0], values_of(task)))
    for loss, values in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-4)
        for value, expected in zip(values.values(), results[0][1].values(), strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("architecture", ["bert"], indirect=True)
def test_xla_gives_the_same(make_model, name):
    results = []
    for jit in (False, True):
        keras.utils.set_random_seed(1)
        task = make_task(name, make_model(num_layers=1))
        task.compile(keras.optimizers.SGD(0.01), jit_compile=jit)
        results.append(task.train_on_batch(*make_batch(name), return_dict=True))
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def test_dropout_before_the_output(model):
    """Drops in training alone, and scales by what it says."""
    inputs, _, _ = make_batch("tokens")
    task = make_task("tokens", model, dropout_rate=0.5)
    keras.utils.set_random_seed(0)
    outputs = [np.asarray(task(inputs, training=training)) for training in (False, True, True)]
    assert np.abs(outputs[1] - outputs[2]).max() > 1e-3
    np.testing.assert_array_equal(outputs[0], task(inputs))


def test_mixed_float16_trains(make_model):
    task = make_task("single_label", make_model(dtype="mixed_float16"))
    task.compile()
    logs = task.train_on_batch(*make_batch("single_label"), return_dict=True)
    assert np.isfinite(logs["loss"])
    assert task.skipped_steps == 0
