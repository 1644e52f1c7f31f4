"""The table of architectures, and what goes through it."""

from __future__ import annotations

import pytest

from lmzoo.models import ARCHITECTURES, find_preset


def test_every_preset_is_found_by_its_name(architecture):
    model_class = ARCHITECTURES[architecture]
    for name in model_class.config_class.PRESETS:
        assert find_preset(name) == (model_class, model_class.config_class.preset(name))


def test_an_unknown_preset_names_the_nearest_of_all_architectures():
    with pytest.raises(ValueError, match=r"no preset 'gpt2-nanno'. Did you mean 'gpt2-nano'\? Known: gpt2-nano, "):
        find_preset("gpt2-nanno")


def test_counts_need_no_model(model):
    """Published counts leave heads out."""
    assert model.count_params() == model.config.count_params() + model.config.head_params
    assert model.built
