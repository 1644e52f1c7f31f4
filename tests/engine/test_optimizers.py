import keras
import numpy as np
import pytest
from tiny_models import LinearModel, TokenModel, token_data

from lmzoo.engine.optimizers import OPTIMIZERS, Adafactor, AdamW, Lamb, make_optimizer
from lmzoo.engine.schedules import make_schedule


def fitted(optimizer, steps=20):
    model = TokenModel()
    model.compile(optimizer)
    ids, labels, weights = token_data(16)
    losses = [model.train_on_batch(ids, labels, weights, return_dict=True)["loss"] for _ in range(steps)]
    return model, losses


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_learns_saves_and_goes_on(name, tmp_path):
    options = {"smallest_factored": 8} if name == "adafactor" else {}
    schedule = make_schedule("cosine", 0.03, total_steps=60, warmup_steps=4)
    optimizer = make_optimizer(name, schedule, learning_rate_factors={"embedding": 0.5}, no_decay=["head"], **options)
    model, losses = fitted(optimizer)
    assert losses[-1] < 0.97 * losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == optimizer.get_config()
    ids, labels, weights = token_data(16)
    for _ in range(2):
        assert loaded.train_on_batch(ids, labels, weights) == model.train_on_batch(ids, labels, weights)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_only_matrices_decay(name):
    changes = []
    for decay in (0.0, 0.5):
        model, _ = fitted(make_optimizer(name, 0.01, weight_decay=decay, no_decay=["head"]), steps=1)
        changes.append({variable.path.split("/", 1)[1]: variable.numpy() for variable in model.trainable_variables})
    differs = {path for path in changes[0] if not np.array_equal(changes[0][path], changes[1][path])}
    assert differs == {"embedding/embeddings", "hidden/kernel"}


def test_a_bias_of_rank_two_does_not_decay():
    optimizer = AdamW(0.1)
    matrix, bias, norm = (
        keras.Variable(np.ones(shape), name=name)
        for shape, name in (([2, 2], "kernel"), ([2, 2], "query_bias"), ([2], "scale"))
    )
    assert [optimizer.decays(each) for each in (matrix, bias, norm)] == [True, False, False]


def test_adamw_decays_by_learning_rate_times_decay():
    model = LinearModel()
    model.matrix = model.add_weight(name="matrix", shape=(2, 2), initializer="ones")
    model.compile(AdamW(0.1, weight_decay=0.5, learning_rate_factors={"matrix": 0.2}))
    model.compute_sums = lambda inputs, labels, weights, training: {
        "loss": (0.0 * keras.ops.sum(model.matrix) + keras.ops.sum(model(inputs)), keras.ops.cast(1.0, "float32"))
    }
    model.train_on_batch(np.ones([1, 2], "float32"))
    np.testing.assert_allclose(model.matrix.numpy(), np.full([2, 2], 1 - 0.1 * 0.2 * 0.5), rtol=1e-6)


def test_learning_rate_factor_scales_the_update():
    kernels = []
    for factor in (1.0, 0.25):
        model = LinearModel()
        model.compile(make_optimizer("adamw", 0.1, learning_rate_factors={"nothing": 9.0, "kern": factor}))
        model.train_on_batch(np.ones([1, 2], "float32"))
        kernels.append(model.kernel.numpy())
    np.testing.assert_allclose(kernels[1], 0.25 * kernels[0], rtol=1e-6)


def steps_of(optimizer, start, gradients):
    """What an optimizer makes of a matrix, given its gradients."""
    variable = keras.Variable(start.astype("float32"), name="kernel")
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient.astype("float32"))], [variable])
    return variable.numpy()


def test_lamb_is_the_papers():
    generator = np.random.default_rng(0)
    weights, gradients = generator.normal(size=(4, 3)), generator.normal(size=(5, 4, 3))
    actual = steps_of(Lamb(0.1, weight_decay=0.3, beta_1=0.9, beta_2=0.99, epsilon=1e-6), weights, gradients)
    m = v = np.zeros_like(weights)
    for step, gradient in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.99 * v + 0.01 * gradient**2
        update = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-6) + 0.3 * weights
        weights = weights - 0.1 * np.linalg.norm(weights) / np.linalg.norm(update) * update
    np.testing.assert_allclose(actual, weights, rtol=1e-4)


def test_decay_towards_the_start():
    """AdamW moves by its own step and, of the way back, by learning rate times factor; a vector decays so, too."""
    optimizer = AdamW(0.1, weight_decay=0.5, start_decay={"held": 2.0}, learning_rate_factors={"slow": 0.5})
    variables = [keras.Variable(np.full([2], 3.0, "float32"), name=name) for name in ("held", "held_slow", "free")]
    variables.append(keras.Variable(np.full([2, 2], 3.0, "float32"), name="free_kernel"))
    optimizer.build(variables)
    for variable in variables:
        variable.assign(variable + 1.0)
    optimizer.apply([keras.ops.zeros_like(variable) for variable in variables], variables)
    values = [float(variable.numpy().ravel()[0]) for variable in variables]
    assert values == pytest.approx([4 - 0.1 * 2.0 * 1, 4 - 0.1 * 0.5 * 2.0 * 1, 4, 4 - 0.1 * 0.5 * 4])


def test_lamb_takes_the_way_back_into_its_step():
    generator = np.random.default_rng(0)
    start, gradient = generator.normal(size=(4, 3)), generator.normal(size=(4, 3))
    variable = keras.Variable(start.astype("float32"), name="kernel")
    optimizer = Lamb(0.1, weight_decay=0.3, start_decay={"kernel": 0.7}, epsilon=1e-6)
    optimizer.build([variable])
    weights = start + 1.0
    variable.assign(weights.astype("float32"))
    optimizer.apply([keras.ops.convert_to_tensor(gradient.astype("float32"))], [variable])
    update = np.sign(gradient) + 0.7 * (weights - start)
    expected = weights - 0.1 * np.linalg.norm(weights) / np.linalg.norm(update) * update
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-3)


def test_the_start_is_part_of_the_state(tmp_path):
    model, _ = fitted(make_optimizer("adamw", 0.01, start_decay={"hidden": 5.0}), steps=3)
    assert [variable.path for variable in model.optimizer.variables if "start" in variable.path]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    ids, labels, weights = token_data(16)
    for each in (model, loaded):
        each.train_on_batch(ids, labels, weights)
    for one, other in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("smallest_factored", [3, 100])
def test_adafactor_is_the_papers(smallest_factored):
    generator = np.random.default_rng(0)
    weights, gradients = generator.normal(size=(2, 4, 3)), generator.normal(size=(5, 2, 4, 3))
    actual = steps_of(Adafactor(0.1, smallest_factored=smallest_factored), weights, gradients)
    moment = np.zeros_like(weights)
    row, column = np.zeros([2, 4]), np.zeros([2, 3])
    for step, gradient in enumerate(gradients, start=1):
        beta = 1 - step**-0.8
        square = gradient**2 + 1e-30
        moment = beta * moment + (1 - beta) * square
        row = beta * row + (1 - beta) * square.mean(axis=2)
        column = beta * column + (1 - beta) * square.mean(axis=1)
        if smallest_factored == 3:
            moment = row[:, :, None] * column[:, None, :] / row.mean(axis=1)[:, None, None]
        update = gradient / np.sqrt(moment)
        update /= max(1.0, np.sqrt((update**2).mean()))
        weights = weights - 0.1 * max(1e-3, np.sqrt((weights**2).mean())) * update
    np.testing.assert_allclose(actual, weights, rtol=1e-4)


def test_adafactor_keeps_a_row_and_a_column_of_the_largest_axes():
    optimizer = Adafactor(smallest_factored=4)
    optimizer.build([keras.Variable(np.ones(shape), name="kernel") for shape in ([8, 2, 5], [6, 3], [7])])
    shapes = [[tuple(moment.shape) for moment in moments] for moments in optimizer._moments]
    assert shapes == [[(8, 2), (2, 5)], [(6, 3)], [(7,)]]


def test_adafactor_without_relative_step():
    weights = np.full([2, 2], 4.0)
    actual = steps_of(Adafactor(0.1, relative_step=False), weights, [np.ones([2, 2])])
    np.testing.assert_allclose(actual, weights - 0.1, rtol=1e-6)


def test_unknown_name():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adafactor, lamb, lion, muon, but is 'adam'"):
        make_optimizer("adam", 0.1)


def test_ema():
    assert make_optimizer("lion", 0.1, ema_momentum=0.5).get_config()["use_ema"] is True
    assert make_optimizer("lion", 0.1).use_ema is False


def test_muon_makes_orthogonal_in_bfloat16_too():
    matrix = np.random.default_rng(0).normal(0.0, 1e-3, (24, 64)).astype("float32")
    exact, quick = (
        keras.ops.convert_to_numpy(
            make_optimizer("muon", 0.1, **settings).zeropower_via_newtonschulz5(keras.ops.convert_to_tensor(matrix), 5)
        )
        for settings in ({}, {"orthogonal_dtype": "bfloat16"})
    )
    assert quick.dtype == np.float32
    difference = np.linalg.norm(quick - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 0.1
    assert np.linalg.svd(quick, compute_uv=False).min() > 0.5
