import keras
import numpy as np
import pytest

from lmzoo.engine.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    InverseSquareRoot,
    Linear,
    WarmupStableDecay,
    make_schedule,
)


def values(schedule, *steps):
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"inverse_sqrt_flat"}))
def test_warm_up_is_a_line_to_the_peak(name):
    schedule = make_schedule(name, peak=0.4, total_steps=100, warmup_steps=4)
    np.testing.assert_allclose(values(schedule, 0, 1, 2, 3), [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    assert max(values(schedule, *range(4, 120))) <= 0.4 * (1 + 1e-6)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_no_warm_up_starts_next_to_the_peak(name):
    assert float(make_schedule(name, 0.4, total_steps=1000)(0)) == pytest.approx(0.4, rel=2e-3)


def test_cosine():
    schedule = Cosine(1.0, total_steps=12, warmup_steps=2, final=0.2)
    np.testing.assert_allclose(values(schedule, 6, 11, 50), [0.6, 0.2, 0.2], rtol=1e-6)
    assert float(schedule(3)) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * 0.2)), rel=1e-6)


def test_linear():
    np.testing.assert_allclose(values(Linear(1.0, 12, 2, final=0.0), 6, 11, 50), [0.5, 0.0, 0.0], atol=1e-7)


def test_stable_decay():
    schedule = WarmupStableDecay(1.0, total_steps=20, warmup_steps=2, final=0.0, decay_steps=4)
    np.testing.assert_allclose(values(schedule, 2, 15, 16, 17, 19, 30), [1, 1, 0.75, 0.5, 0, 0], atol=1e-6)
    assert WarmupStableDecay(1.0, total_steps=200).decay_steps == 20


def test_inverse_square_root():
    schedule = InverseSquareRoot(0.5, warmup_steps=4)
    np.testing.assert_allclose(values(schedule, 3, 15, 35), [0.5, 0.25, 0.5 / 3], rtol=1e-6)
    assert float(Constant(0.5, 4)(1000)) == 0.5


def test_the_one_of_t5():
    schedule = make_schedule("inverse_sqrt_flat", 0.01, total_steps=500, warmup_steps=10_000)
    for step in (0, 500, 9_999, 10_000, 123_456):
        assert float(schedule(step)) == pytest.approx(1 / np.sqrt(max(step + 1, 10_000)), rel=1e-6)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_comes_back_from_its_config(name):
    schedule = make_schedule(name, 0.3, total_steps=50, warmup_steps=7, final=0.25, decay_steps=11)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    assert type(copy) is type(schedule)
    assert values(copy, *range(0, 60, 7)) == values(schedule, *range(0, 60, 7))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_schedule("step", 1.0, 10), "schedule must be one of constant, .*, but is 'step'"),
        (lambda: Constant(0.0), "peak must be above 0, but is 0"),
        (lambda: Constant(1.0, -1), "warmup_steps must be 0 or more, but is -1"),
        (lambda: Cosine(1.0, 10, 10), "total_steps must be above warmup_steps=10, but is 10"),
        (lambda: Linear(1.0, 10, final=1.5), "final must be a share of peak from 0 to 1, but is 1.5"),
        (lambda: WarmupStableDecay(1.0, 10, 4, decay_steps=7), "decay_steps must be from 1 to .* = 6, but is 7"),
        (lambda: InverseSquareRoot(1.0, 0), "warmup_steps must be 1 or more"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
