"""ALBERT's own config, and what sharing one block among all layers means."""

from __future__ import annotations

import itertools
import json

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmzoo.models import find_preset
from lmzoo.models.albert import AlbertConfig, AlbertModel

# As transformers' AlbertModel counts them.
PUBLISHED = {
    "albert-base-v1": 11_683_584,
    "albert-large-v1": 17_683_968,
    "albert-xlarge-v1": 58_724_864,
    "albert-xxlarge-v1": 222_595_584,
    "albert-base-v2": 11_683_584,
    "albert-large-v2": 17_683_968,
    "albert-xlarge-v2": 58_724_864,
    "albert-xxlarge-v2": 222_595_584,
}
SHAPE = {
    "vocab_size": 40,
    "context_length": 16,
    "num_layers": 3,
    "num_heads": 2,
    "model_dim": 16,
    "embedding_dim": 10,
    "feedforward_dim": 20,
    "dropout_rate": 0.0,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_presets_have_the_published_size(name, count):
    model_class, config = find_preset(name)
    assert model_class is AlbertModel
    assert config.count_params() == count
    assert set(PUBLISHED) == set(AlbertConfig.PRESETS)


@st.composite
def configs(draw):
    num_heads = draw(st.integers(1, 4))
    width = num_heads * draw(st.integers(1, 8))
    return AlbertConfig(
        vocab_size=draw(st.integers(8, 97)),
        context_length=draw(st.integers(2, 24)),
        num_layers=draw(st.integers(1, 4)),
        num_heads=num_heads,
        model_dim=width,
        embedding_dim=draw(st.sampled_from([width, 5])),
        feedforward_dim=draw(st.integers(1, 40)),
        pooler=draw(st.booleans()),
        num_token_types=draw(st.integers(1, 3)),
        activation=draw(st.sampled_from(["gelu_tanh", "gelu", "relu"])),
        dropout_rate=draw(st.sampled_from([0.0, 0.1])),
    )


@given(configs())
def test_hugging_face_round_trip(config):
    assert AlbertConfig.from_hugging_face(json.loads(json.dumps(config.to_hugging_face()))) == config


@pytest.mark.parametrize("options", [{}, {"pooler": False, "embedding_dim": 16, "num_token_types": 1}])
def test_the_count_is_that_of_the_weights(options):
    config = AlbertConfig(**{**SHAPE, **options})
    assert AlbertModel(config).count_params() == config.count_params() + config.head_params


@pytest.mark.parametrize(("name", "value"), [("num_hidden_groups", 2), ("inner_group_num", 2)])
def test_several_blocks_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is 2, but AlbertModel has only 1"):
        AlbertConfig.from_hugging_face({name: value})


def made(**options):
    """A model whose every weight matters."""
    keras.utils.set_random_seed(0)
    model = AlbertModel(AlbertConfig(**{**SHAPE, **options}))
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(random.normal(0.0, 0.25, variable.shape))
    return model


def make_batch(rows=4, length=10, hidden=3, seed=0):
    random = np.random.default_rng(seed)
    places = np.sort(np.stack([random.choice(length, hidden, replace=False) for _ in range(rows)]), axis=1)
    inputs = {
        "token_ids": random.integers(0, 40, (rows, length)).astype("int32"),
        "mask_positions": places.astype("int32"),
        "next_sentence_labels": random.integers(0, 2, rows).astype("int32"),
    }
    return inputs, random.integers(0, 40, (rows, hidden)).astype("int32"), np.ones((rows, hidden), "float32")


def test_all_layers_are_one_block():
    model = made()
    inputs, _, _ = make_batch()
    states = model.hidden_states(inputs)
    assert [state.shape for state in states] == [(4, 10, 16)] * 4
    (block,) = model.blocks
    for one, other in itertools.pairwise(states):
        np.testing.assert_allclose(block(one), other, rtol=1e-5, atol=1e-5)


def test_flops_count_every_layer():
    one, three = (AlbertConfig(**{**SHAPE, "num_layers": layers}) for layers in (1, 3))
    assert one.count_params() == three.count_params()
    more = three.training_flops_per_token(10) - one.training_flops_per_token(10)
    assert more == 2 * (6 * one.count_block_params() + 12 * 16 * 10)


@pytest.mark.parametrize("remat", [None, "block"])
def test_the_gradient_of_the_block_is_that_of_all_its_uses(remat):
    """By a small step along it: the loss falls by its square, with and without recomputing."""
    model = made()
    model.compile(keras.optimizers.SGD(1e-4), remat=remat)
    batch = make_batch()
    logs = model.train_on_batch(*batch, return_dict=True)
    assert set(logs) >= {"masked_lm_loss", "next_sentence_loss", "next_sentence_accuracy"}
    model.reset_metrics()
    fall = logs["loss"] - model.test_on_batch(*batch, return_dict=True)["loss"]
    assert fall == pytest.approx(1e-4 * logs["gradient_norm"] ** 2, rel=0.1)
