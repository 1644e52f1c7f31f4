"""GPT's own config: published shapes, rules, and the way to Hugging Face's names and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmzoo.models.gpt import GPTConfig, GPTModel

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@st.composite
def configs(draw, max_heads=4, max_head_dim=8):
    num_heads = draw(st.integers(1, max_heads))
    vocab_size = draw(st.integers(2, 97))
    token_id = st.none() | st.integers(0, vocab_size - 1)
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=draw(st.integers(2, 24)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=num_heads,
        model_dim=num_heads * draw(st.integers(1, max_head_dim)),
        feedforward_dim=draw(st.none() | st.integers(1, 40)),
        dropout_rate=draw(st.sampled_from([0.0, 0.1])),
        norm_epsilon=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        activation=draw(st.sampled_from(["gelu_tanh", "gelu", "relu", "silu", "tanh"])),
        eos_token_id=draw(token_id),
        pad_token_id=draw(token_id),
    )


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_presets_have_the_published_size(name, count):
    assert GPTConfig.preset(name).count_params() == count


@pytest.mark.parametrize(("name", "low", "high"), [("gpt2-nano", 0.8e6, 1.3e6), ("gpt2-micro", 8e6, 12e6)])
def test_small_presets_are_as_small_as_said(name, low, high):
    assert low < GPTConfig.preset(name).count_params() < high


@settings(max_examples=8)
@given(configs())
def test_the_count_is_that_of_the_weights(config):
    model = GPTModel(config)
    assert model.count_params() == config.count_params()
    assert sum(int(np.prod(each.shape)) for each in model.trainable_variables) == config.count_params()


def test_from_preset_takes_overrides():
    model = GPTModel.from_preset("gpt2-nano", num_layers=1, vocab_size=300, dtype="mixed_bfloat16")
    assert model.config == GPTConfig.preset("gpt2-nano", num_layers=1, vocab_size=300)
    assert model.compute_dtype == "bfloat16"
    with pytest.raises(ValueError, match="Did you mean 'gpt2-nano'"):
        GPTModel.from_preset("gpt-nano")


def test_weights_start_as_gpt2_says():
    """Normal of 0.02, output projections scaled by depth; norms at one, biases at zero."""
    model = GPTModel(GPTConfig(vocab_size=500, context_length=64, num_layers=8, num_heads=2, model_dim=64))
    for name, variable in model.checkpoint_variables().items():
        values = np.asarray(variable)
        if name.endswith(".bias"):
            assert not values.any(), name
        elif "ln_" in name:
            assert (values == 1).all(), name
        else:
            expected = 0.02 / 4 if "c_proj" in name else 0.02
            assert values.std() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("num_layers", 0, "an integer of 1 or more"),
        ("num_heads", -1, "an integer of 1 or more"),
        ("num_heads", 5, "must divide model_dim, which is 64"),
        ("model_dim", 64.0, "an integer of 1 or more"),
        ("feedforward_dim", 0, "an integer of 1 or more"),
        ("dropout_rate", 1.0, r"must lie in \[0, 1\)"),
        ("dropout_rate", -0.1, r"must lie in \[0, 1\)"),
        ("dropout_rate", float("nan"), r"must lie in \[0, 1\)"),
        ("dropout_rate", "0.1", r"must lie in \[0, 1\)"),
        ("norm_epsilon", 0.0, "a number above 0"),
        ("norm_epsilon", None, "a number above 0"),
        ("norm_epsilon", float("inf"), "a number above 0"),
        ("activation", "swiglu", "one of gelu, gelu_tanh, relu, silu, tanh"),
        ("eos_token_id", 100, r"None or an integer in \[0, vocab_size\), and vocab_size is 100"),
    ],
)
def test_an_error_names_field_value_and_rule(field, value, rule):
    shape = {"vocab_size": 100, "context_length": 8, "num_layers": 1, "num_heads": 2, "model_dim": 64}
    with pytest.raises(ValueError, match=rule) as caught:
        GPTConfig(**{**shape, field: value})
    assert str(caught.value).startswith(f"GPTConfig.{field} is {value!r}, but must")


@given(configs())
def test_hugging_face_round_trip(config):
    assert GPTConfig.from_hugging_face(json.loads(json.dumps(config.to_hugging_face()))) == config


def test_an_empty_config_is_the_smallest_gpt2():
    assert GPTConfig.from_hugging_face({"model_type": "gpt2"}) == GPTConfig.preset("gpt2")


@pytest.mark.parametrize("token_id", [50_256, 99, 20, -1])
def test_special_tokens_beyond_the_vocabulary_are_left_out(token_id):
    """Checkpoints of small models often name the ids of the large vocabulary they came from."""
    config = GPTConfig.from_hugging_face({"vocab_size": 20, "eos_token_id": token_id, "pad_token_id": token_id})
    assert (config.eos_token_id, config.pad_token_id) == (None, None)


EXOTIC = {
    "tie_word_embeddings": False,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "add_cross_attention": True,
    "activation_function": "mish",
}


@given(st.sets(st.sampled_from(sorted(EXOTIC)), min_size=1))
def test_what_gpt2_never_had_is_refused_and_all_of_it_named(names):
    with pytest.raises(ValueError, match="but GPTModel has only") as caught:
        GPTConfig.from_hugging_face({name: EXOTIC[name] for name in names})
    for name in EXOTIC:
        assert (f"{name} is {EXOTIC[name]!r}" in str(caught.value)) == (name in names)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"n_embd": "768"}, "model_dim"),
        ({"n_head": 7}, "num_heads"),
        ({"n_inner": 0}, "feedforward_dim"),
        ({"vocab_size": None}, "vocab_size"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"resid_pdrop": 2}, "dropout_rate"),
    ],
)
def test_nonsense_in_config_json_is_refused(values, field):
    with pytest.raises(ValueError, match=rf"GPTConfig\.{field} is"):
        GPTConfig.from_hugging_face(values)
    with pytest.raises(ValueError, match="activation_function is"):
        GPTConfig.from_hugging_face({"activation_function": ["relu"]})


def test_flops_are_six_a_weight_and_more_for_longer_rows():
    config = GPTConfig.preset("gpt2")
    weights = config.count_params() - config.context_length * config.model_dim
    assert config.training_flops_per_token(0) == 6 * weights
    assert config.training_flops_per_token(1024) - 6 * weights == 12 * 12 * 768 * 1024


def test_no_two_weights_begin_with_the_same_numbers():
    model = GPTModel(GPTConfig(vocab_size=40, context_length=16, num_layers=2, num_heads=2, model_dim=8))
    matrices = [np.asarray(weight).ravel()[:8] for weight in model.trainable_weights if len(weight.shape) > 1]
    assert len({tuple(numbers) for numbers in matrices}) == len(matrices) == 2 + 2 * 4
