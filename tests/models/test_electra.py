"""ELECTRA's own objective: what the generator draws, what the discriminator has to tell, and both as one checkpoint."""

from __future__ import annotations

import json
import math
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forward import CHECKS

from lmzoo.models import find_preset, load_pretrained
from lmzoo.models.electra import ElectraConfig, ElectraGenerator, ElectraGeneratorConfig, ElectraModel, replaced_tokens
from lmzoo.training.checkpointing import CheckpointStore, Progress

# As transformers' ElectraModel counts them.
PUBLISHED = {
    "electra-small": 13_483_008,
    "electra-base": 108_891_648,
    "electra-large": 334_092_288,
    "electra-small-discriminator": 13_483_008,
    "electra-base-discriminator": 108_891_648,
    "electra-large-discriminator": 334_092_288,
    "electra-small-generator": 13_483_008,
    "electra-base-generator": 33_511_168,
    "electra-large-generator": 50_999_552,
}
SHAPE = {
    "vocab_size": 40,
    "context_length": 24,
    "num_layers": 2,
    "num_heads": 2,
    "model_dim": 16,
    "embedding_dim": 12,
    "feedforward_dim": 20,
    "dropout_rate": 0.0,
}


def made(seed=0, **options):
    """A pair whose every weight matters."""
    keras.utils.set_random_seed(seed)
    model = ElectraModel(ElectraConfig(**{**SHAPE, "generator_size": 0.5, **options}))
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign_add(random.normal(0.0, 0.25, variable.shape))
    return model


@pytest.fixture(scope="module")
def pair():
    """For tests that leave it as it is."""
    return made()


def make_batch(rows=4, length=10, hidden=3, seed=0):
    """Rows padded on the right to different lengths; the last place of some hidden tokens is a filler."""
    random = np.random.default_rng(seed)
    lengths = random.integers(hidden + 2, length + 1, rows)
    places = np.sort(np.stack([random.choice(size, hidden, replace=False) for size in lengths]), axis=1)
    weights = np.ones((rows, hidden), "float32")
    weights[::2, -1] = places[::2, -1] = 0
    inputs = {
        "token_ids": random.integers(0, 40, (rows, length)).astype("int32"),
        "padding_mask": np.arange(length) < lengths[:, None],
        "mask_positions": places.astype("int32"),
    }
    return inputs, random.integers(0, 40, (rows, hidden)).astype("int32"), weights


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_presets_have_the_published_size(name, count):
    model_class, config = find_preset(name)
    assert config.count_params() == count
    assert (model_class is ElectraGenerator) == name.endswith("generator")


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_the_generator_of_a_preset_is_the_released_one(size):
    _, pair = find_preset(f"electra-{size}")
    assert pair.generator == find_preset(f"electra-{size}-generator")[1].replace(feedforward_dim=1024)
    assert pair.replace(generator_size=None) == find_preset(f"electra-{size}-discriminator")[1]


@st.composite
def configs(draw):
    config_class = draw(st.sampled_from([ElectraConfig, ElectraGeneratorConfig]))
    num_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    generator = {}
    if config_class is ElectraConfig:
        generator["generator_size"] = draw(st.none() | st.floats(0.01, 1.0))
    return config_class(
        vocab_size=draw(st.integers(8, 97)),
        context_length=draw(st.integers(2, 24)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=num_heads,
        model_dim=num_heads * head_dim,
        embedding_dim=draw(st.sampled_from([num_heads * head_dim, 5])),
        feedforward_dim=draw(st.integers(1, 40)),
        num_token_types=draw(st.integers(1, 3)),
        activation=draw(st.sampled_from(["gelu_tanh", "gelu", "relu"])),
        norm_epsilon=draw(st.sampled_from([1e-12, 1e-5])),
        **generator,
    )


@given(configs())
def test_hugging_face_round_trip(config):
    assert type(config).from_hugging_face(json.loads(json.dumps(config.to_hugging_face()))) == config


@settings(max_examples=8)
@given(configs())
def test_the_count_is_that_of_the_weights(config):
    model_class = ElectraModel if isinstance(config, ElectraConfig) else ElectraGenerator
    assert model_class(config).count_params() == config.count_params() + config.head_params


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("generator_size", 0.0, r"must be None or lie in \(0, 1\]"),
        ("generator_size", 1.5, r"must be None or lie in \(0, 1\]"),
        ("embedding_dim", 0, "an integer of 1 or more"),
        ("pooler", True, "must be False"),
    ],
)
def test_an_error_names_field_value_and_rule(field, value, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        ElectraConfig(**{**SHAPE, field: value})
    assert str(caught.value).startswith(f"ElectraConfig.{field} is {value!r}, but ")


# -- What the discriminator reads, and what it has to tell.


def test_tokens_drawn_take_the_places_of_hidden_ones():
    """One drawn as it was is an original; a place without weight is a filler, here that of the first token."""
    batch = {"token_ids": np.array([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]], "int32")}
    batch["mask_positions"] = np.array([[1, 3, 0], [4, 0, 2]], "int32")
    labels = np.array([[31, 32, 33], [34, 35, 36]], "int32")
    samples = np.array([[31, 5, 6], [7, 8, 36]], "int32")
    weights = np.array([[1, 0.5, 0], [1, 1, 1]], "float32")
    token_ids, is_replaced = replaced_tokens(batch, labels, weights, samples)
    np.testing.assert_array_equal(token_ids, [[10, 31, 12, 5, 14], [8, 21, 36, 23, 7]])
    np.testing.assert_array_equal(is_replaced, [[0, 0, 0, 1, 0], [1, 0, 0, 0, 1]])


def test_labels_for_all_places():
    """Without `mask_positions`, those with a weight are the hidden ones."""
    batch = {"token_ids": np.array([[10, 11, 12]], "int32")}
    token_ids, is_replaced = replaced_tokens(
        batch, np.array([[1, 2, 3]]), np.array([[0, 1, 1]], "float32"), np.array([[7, 8, 3]])
    )
    np.testing.assert_array_equal(token_ids, [[10, 8, 3]])
    np.testing.assert_array_equal(is_replaced, [[0, 1, 0]])


def test_tokens_are_drawn_as_often_as_the_generator_holds_them_likely():
    model = made()
    inputs = {
        "token_ids": np.tile(np.arange(8, dtype="int32"), (4000, 1)),
        "mask_positions": np.full((4000, 1), 3, "int32"),
    }
    labels = np.zeros((4000, 1), "int32")
    _, samples = model.generator.sums_and_samples(inputs, labels, np.ones((4000, 1), "float32"), True, 1)
    expected = np.asarray(tf.nn.softmax(model.generator({name: each[:1] for name, each in inputs.items()})))[0, 0]
    found = np.bincount(np.asarray(samples).ravel(), minlength=40) / 4000
    assert expected.max() > 0.1
    assert np.abs(found - expected).max() < 5 * 0.5 / math.sqrt(4000)
    assert np.abs(found - expected).sum() < 0.15


# -- The objective.


def fixed_samples(model, monkeypatch):
    """Has the generator "draw" what labels say, but each second token another."""
    real = model.generator.sums_and_samples

    def draw(inputs, labels, *rest):
        sums, _ = real(inputs, labels, *rest)
        return sums, (labels + np.arange(labels.shape[1]) % 2) % 40

    monkeypatch.setattr(model.generator, "sums_and_samples", draw)
    return draw


def expected_logs(model, inputs, labels, weights, samples):
    """In numpy, row by row, from the scores of both halves."""
    log_p = np.asarray(tf.nn.log_softmax(model.generator(inputs)))
    losses = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    masked = (weights * losses).sum() / weights.sum()
    detection = correct = 0.0
    for row in range(len(labels)):
        size = inputs["padding_mask"][row].sum()
        ids, replaced = inputs["token_ids"][row, :size].copy(), np.zeros(size)
        for place, label, sample, weight in zip(
            inputs["mask_positions"][row], labels[row], samples[row], weights[row], strict=True
        ):
            if weight:
                ids[place], replaced[place] = sample, sample != label
        p = 1 / (1 + np.exp(-np.asarray(model(ids[None]), "float64")[0]))
        share = weights[row].sum() / weights.sum()
        detection -= share * np.where(replaced, np.log(p), np.log1p(-p)).mean()
        correct += share * ((p > 0.5) == replaced).mean()
    return {
        "loss": masked + 50 * detection,
        "masked_lm_loss": masked,
        "perplexity": np.exp(masked),
        "accuracy": (weights * (log_p.argmax(-1) == labels)).sum() / weights.sum(),
        "replaced_token_loss": detection,
        "replaced_token_accuracy": correct,
    }


def test_evaluation_equals_numpy(monkeypatch):
    """Over batches of 3 and 1 rows, of different lengths and weights."""
    model = made()
    inputs, labels, weights = make_batch()
    samples = (labels + np.arange(3) % 2) % 40
    expected = expected_logs(model, inputs, labels, weights, samples)
    fixed_samples(model, monkeypatch)
    model.compile()
    logs = model.evaluate(inputs, labels, sample_weight=weights, batch_size=3, return_dict=True, verbose=0)
    assert logs == pytest.approx(expected, rel=1e-4)
    logs = model.train_on_batch(inputs, labels, weights, return_dict=True)
    assert logs.pop("gradient_norm") > 0
    assert set(logs) == set(expected)


def test_padding_of_packed_rows_does_not_count():
    model = made()
    inputs, _, weights = make_batch()
    mask = inputs.pop("padding_mask")
    inputs |= {"segment_ids": mask.astype("int32"), "positions": np.tile(np.arange(10, dtype="int32"), (4, 1))}
    is_replaced = (inputs["token_ids"] % 2).astype("float32")
    before = model.detection_sums(inputs, is_replaced, weights.sum(1), False)
    inputs["token_ids"] = np.where(mask, inputs["token_ids"], 1)
    np.testing.assert_allclose(model.detection_sums(inputs, 1 * is_replaced + ~mask, weights.sum(1), False), before)


def test_the_parts_of_a_batch_add_up(monkeypatch):
    inputs, labels, weights = make_batch()
    results = []
    for micro_batches in (1, 2):
        model = made()
        fixed_samples(model, monkeypatch)
        model.compile(keras.optimizers.SGD(0.01), micro_batches=micro_batches)
        logs = model.train_on_batch(inputs, labels, weights, return_dict=True)
        results.append((logs, [variable.numpy() for variable in model.trainable_variables]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_detection_sends_no_gradient_through_what_is_drawn():
    """The generator's own weights learn masked LM alone, those of the discriminator detection alone, 50 times."""
    model = made()
    inputs, labels, weights = make_batch()
    with tf.GradientTape(persistent=True) as tape:
        sums = model.compute_sums(inputs, labels, weights, training=True)
        both, masked_lm, detection = (sums[name][0] for name in ("loss", "masked_lm_loss", "replaced_token_loss"))
    halves = (model.generator.blocks[0], masked_lm, 1.0), (model.blocks[0], detection, 50.0)
    for block, loss, factor in halves:
        kernel = block.feedforward.up.kernel.value
        np.testing.assert_allclose(tape.gradient(both, kernel), factor * tape.gradient(loss, kernel), rtol=1e-4)
    table = model.token_embedding.embeddings.value
    gradients = [tf.convert_to_tensor(tape.gradient(each, table)).numpy() for each in (both, masked_lm, detection)]
    np.testing.assert_allclose(gradients[0], gradients[1] + 50 * gradients[2], rtol=1e-3, atol=1e-4)
    assert all(np.abs(gradient).max() > 0 for gradient in gradients)


def texts(rows, random):
    """Eight tokens, each of its own four, of which all tokens of a row take the same one."""
    return (random.integers(0, 4, (rows, 1)) + 4 * np.arange(8)).astype("int32")


def test_replaced_tokens_are_found():
    """In texts that nobody has seen, of which any token but one is right, the one gets the highest score."""
    keras.utils.set_random_seed(0)
    shape = {**SHAPE, "num_layers": 1, "model_dim": 32, "embedding_dim": 32, "feedforward_dim": 128}
    model = ElectraModel(ElectraConfig(**shape, generator_size=0.5))
    model.compile(keras.optimizers.Adam(3e-3))
    random = np.random.default_rng(0)
    originals = texts(1024, random)
    places = np.sort(np.stack([random.choice(8, 2, replace=False) for _ in originals]), axis=1).astype("int32")
    labels, hidden = np.take_along_axis(originals, places, axis=1), originals.copy()
    np.put_along_axis(hidden, places, 39, axis=1)
    inputs = {"token_ids": hidden, "mask_positions": places}
    losses = model.fit(inputs, labels, epochs=4, verbose=0).history["replaced_token_loss"]
    assert losses[-1] < 0.75 * losses[0]
    ids, places = texts(256, random), random.integers(0, 8, 256)
    ids[np.arange(256), places] = (ids[np.arange(256), places] + random.integers(1, 32, 256)) % 32
    found = np.asarray(model(ids)).argmax(1) == places
    assert found.mean() > 0.8


def test_evaluation_draws_the_same_each_time_and_training_does_not():
    """Else what a run does would depend on how often it was evaluated."""
    model = made()
    model.compile(keras.optimizers.SGD(0.0))
    batch = make_batch(hidden=4)
    state = model.sampling_seed.state.numpy()
    one, other = (model.test_on_batch(*batch, return_dict=True) for _ in range(2))
    assert one["replaced_token_loss"] == other["replaced_token_loss"]
    np.testing.assert_array_equal(model.sampling_seed.state, state)
    losses = set()
    for _ in range(3):
        model.reset_metrics()
        losses.add(model.train_on_batch(*batch, return_dict=True)["replaced_token_loss"])
    assert len(losses) == 3
    assert "seed_generator_state" in {variable.name for variable in model.variables}  # Which replicas make their own.


def test_remat_is_for_both_halves():
    results = []
    for remat in (None, "block"):
        model = made(dropout_rate=0.1)
        model.compile(keras.optimizers.SGD(0.01), remat=remat, label_smoothing=0.1)
        assert model.generator.remat == remat
        assert model.generator._label_smoothing == 0.1
        model.train_on_batch(*make_batch())
        results.append([variable.numpy() for variable in model.variables if "float" in variable.dtype])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_without_a_generator_there_is_nothing_to_learn_from():
    model = made(generator_size=None)
    with pytest.raises(ValueError, match=r"has no generator \(generator_size=None\)"):
        model.compute_sums(*make_batch(), training=True)
    with pytest.raises(ValueError, match="take its generator"):
        model.head()
    with pytest.raises(ValueError, match="masked LM needs labels"):
        made().compute_sums(make_batch()[0], None, None, training=True)


# -- Both halves as one model.


@pytest.mark.parametrize("check", CHECKS)
@settings(max_examples=5)
@given(data=st.data())
def test_property_of_the_scores(pair, check, data):
    CHECKS[check](pair, data)


def test_shape_of_scores():
    model = made()
    ids = np.arange(12, dtype="int32").reshape(2, 6)
    assert model(ids).shape == (2, 6)
    assert model(np.zeros((0, 6), "int32")).shape == (0, 6)
    np.testing.assert_array_equal(model.logits(model.features(ids)), model(ids))


def test_the_embeddings_are_one():
    model = made()
    for name in ("token_embedding", "position_embedding", "token_type_embedding", "embedding_norm"):
        assert getattr(model, name) is getattr(model.generator, name)
    assert len({id(variable) for variable in model.weights}) == len(model.weights)
    alone = {variable.path for variable in model.generator.weights} - {variable.path for variable in model.weights}
    assert not alone


def test_an_encoder_has_neither_head_nor_generator(tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    ids = np.arange(12, dtype="int32").reshape(2, 6)
    for encoder in (model.without_head(), load_pretrained(tmp_path, output_head=False)):
        assert encoder.generator is None
        assert encoder.count_params() == model.config.count_params()
        np.testing.assert_array_equal(encoder.features(ids), model.features(ids))
        with pytest.raises(ValueError, match="output_head=False"):
            encoder(ids)


def weights_of(model):
    return [variable.numpy() for variable in model.weights]


def test_both_halves_are_saved_and_read(tmp_path, recwarn):
    model = made()
    model.save_pretrained(tmp_path)
    assert {path.name for path in (tmp_path / "generator").iterdir()} == {"config.json", "model.safetensors"}
    twin = load_pretrained(tmp_path)
    assert (type(twin), twin.config) == (ElectraModel, model.config)
    for one, other in zip(weights_of(twin), weights_of(model), strict=True):
        np.testing.assert_array_equal(one, other)
    generator = load_pretrained(tmp_path / "generator")
    assert type(generator) is ElectraGenerator
    inputs, _, _ = make_batch()
    np.testing.assert_allclose(generator(inputs), model.generator(inputs), rtol=1e-5, atol=1e-5)
    assert not [each for each in recwarn if "stay as they are" in str(each.message)]

    shutil.rmtree(tmp_path / "generator")
    alone = load_pretrained(tmp_path)
    assert alone.config == model.config.replace(generator_size=None)
    np.testing.assert_array_equal(alone(inputs), model(inputs))
    with pytest.warns(UserWarning, match="generator is missing: the generator's weights stay as they are"):
        twin.load_pretrained_weights(tmp_path)


def test_the_keras_file_holds_both(tmp_path):
    model = made()
    model.compile("sgd")
    model.train_on_batch(*make_batch())
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    for one, other in zip(weights_of(twin), weights_of(model), strict=True):
        np.testing.assert_array_equal(one, other)
    assert twin.generator.token_embedding is twin.token_embedding
    one, other = (each.test_on_batch(*make_batch(), return_dict=True) for each in (model, twin))
    model.reset_metrics()
    assert model.test_on_batch(*make_batch(), return_dict=True) == other


@pytest.mark.slow
def test_a_run_goes_on_as_if_never_stopped(tmp_path):
    """Weights of both, optimizer, dropout and what is drawn."""
    batches = [make_batch(seed=seed) for seed in range(4)]
    model = made(dropout_rate=0.2, num_layers=1)
    model.compile("adamw")
    model.optimizer.build(model.trainable_variables)
    for batch in batches[:2]:
        model.train_on_batch(*batch)
    store = CheckpointStore(tmp_path)
    store.save(model, Progress(step=2))
    twin = made(seed=1, dropout_rate=0.2, num_layers=1)
    twin.compile("adamw")
    twin.optimizer.build(twin.trainable_variables)
    assert store.restore(twin).step == 2
    for each in (model, twin):
        each.reset_metrics()
    for batch in batches[2:]:
        assert twin.train_on_batch(*batch, return_dict=True) == model.train_on_batch(*batch, return_dict=True)
    for one, other in zip(weights_of(twin), weights_of(model), strict=True):
        np.testing.assert_array_equal(one, other)
