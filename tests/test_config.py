"""The base of all configs, through a config of its own and through each architecture's."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmzoo.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config(ModelConfig):
    PRESETS: ClassVar = {"small": {"vocab_size": 10, "context_length": 4}, "large": {"vocab_size": 99, "depth": 2}}

    depth: int = 1


def test_a_preset_takes_overrides():
    assert _Config.preset("small", depth=3) == _Config(vocab_size=10, context_length=4, depth=3)


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"no preset 'smal'. Did you mean 'small'\? Known: small, large\."):
        _Config.preset("smal")


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match=r"no field 'dept'. Did you mean 'depth'\?"):
        _Config.preset("small", dept=3)


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="needs context_length: these fields have no default"):
        _Config.preset("large")


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.none() | st.integers(0, 10**6))
def test_a_config_survives_json(vocab_size, context_length, eos_token_id):
    if eos_token_id is not None and eos_token_id >= vocab_size:
        with pytest.raises(ValueError, match="eos_token_id"):
            _Config(vocab_size=vocab_size, context_length=context_length, eos_token_id=eos_token_id)
        return
    config = _Config(vocab_size=vocab_size, context_length=context_length, eos_token_id=eos_token_id)
    assert _Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_replace_validates_again_and_leaves_the_original():
    config = _Config.preset("small")
    assert config.replace(depth=7).depth == 7
    assert config.depth == 1
    with pytest.raises(ValueError, match="vocab_size is 0"):
        config.replace(vocab_size=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", True),
        ("vocab_size", 10.0),
        ("vocab_size", "10"),
        ("context_length", None),
        ("eos_token_id", 10),
        ("eos_token_id", -1),
        ("eos_token_id", [3]),
        ("pad_token_id", 1.5),
        ("pad_token_id", "3"),
    ],
)
def test_an_error_names_class_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"^_Config\.{field} is {re.escape(repr(value))}, but must be"):
        _Config.preset("small", **{field: value})


def test_the_base_promises_but_does_not_guess():
    config = _Config.preset("small")
    for call in (config.count_params, config.to_hugging_face, lambda: _Config.from_hugging_face({})):
        with pytest.raises(NotImplementedError):
            call()
