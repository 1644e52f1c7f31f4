"""GPT-2 against transformers itself, on configurations that nobody chose, both ways."""

from __future__ import annotations

import json
import runpy
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpt2_golden import assert_parity

from lmzoo.models.gpt import GPTConfig, GPTModel

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
LEAST_WIDTH = 8

# From the script that makes the golden files, so that they and the live comparison are the same.
_SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "golden" / "make_gpt2_golden.py"))
make_model, make_batch, reference = (_SCRIPT[name] for name in ("make_model", "make_batch", "reference"))


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("torch")
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()


@st.composite
def shapes(draw):
    num_heads = draw(st.integers(1, 5))
    # Layer norm of two or three numbers divides by what may be next to nothing: float32 then differs from itself.
    narrowest = -(-LEAST_WIDTH // num_heads)
    return {
        "vocab_size": draw(st.integers(3, 200)),
        "n_positions": draw(st.integers(2, 40)),
        "n_layer": draw(st.integers(1, 4)),
        "n_head": num_heads,
        "n_embd": num_heads * draw(st.integers(narrowest, 16)),
        "n_inner": draw(st.none() | st.integers(1, 100)),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu", "silu", "tanh", "gelu_pytorch_tanh"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-3, 1e-5, 1e-6])),
    }


@st.composite
def cases(draw):
    shape, seed = draw(shapes()), draw(st.integers(0, 2**31))
    length = draw(st.integers(1, shape["n_positions"]))
    padding = draw(st.sampled_from([None, "left", "right"]))
    return shape, seed, make_batch(seed, shape["vocab_size"], draw(st.integers(1, 3)), length, padding)


def check_from_transformers(shape, seed, batch):
    theirs = make_model(seed, **shape)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = GPTModel.from_pretrained(directory, dropout_rate=0.0)
    assert ours.count_params() == ours.config.count_params() == theirs.num_parameters()
    assert_parity(ours, batch, reference(theirs, batch), TOLERANCE)


def check_to_transformers(shape, seed, batch):
    import transformers

    keras.utils.set_random_seed(seed)
    ours = GPTModel(GPTConfig.from_hugging_face({**shape, "eos_token_id": 0, "resid_pdrop": 0.0}))
    random = np.random.default_rng(seed)
    for variable in ours.trainable_variables:
        variable.assign_add(random.normal(0.0, 0.2, variable.shape))
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    assert_parity(ours, batch, reference(theirs.eval(), batch), TOLERANCE)


DIRECTIONS = {"from": check_from_transformers, "to": check_to_transformers}


@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=15)
@given(case=cases())
def test_random_configurations(direction, case):
    DIRECTIONS[direction](*case)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=30)
@given(case=cases())
def test_many_random_configurations(direction, case):
    DIRECTIONS[direction](*case)


SHAPE = {"vocab_size": 50, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "resid_pdrop": 0.0}


def test_shards_of_transformers(tmp_path):
    theirs = make_model(0, **SHAPE)
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    batch = make_batch(0, 50, 2, 9, None)
    assert_parity(GPTModel.from_pretrained(tmp_path, dropout_rate=0.0), batch, reference(theirs, batch), TOLERANCE)


def test_shards_of_lmzoo(tmp_path):
    import transformers

    ours = GPTModel(GPTConfig.from_hugging_face(SHAPE))
    ours.save_pretrained(tmp_path, max_shard_bytes=4000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = make_batch(0, 50, 2, 9, None)
    assert_parity(ours, batch, reference(theirs, batch), TOLERANCE)


def test_backbone_without_head(tmp_path):
    """`GPT2Model` writes bare names, `h.0...`."""
    theirs = make_model(0, **SHAPE)
    theirs.transformer.save_pretrained(tmp_path)
    batch = make_batch(0, 50, 2, 9, "left")
    assert_parity(GPTModel.from_pretrained(tmp_path, dropout_rate=0.0), batch, reference(theirs, batch), TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(tmp_path, dtype):
    """Both ways: the numbers in the file, read into float32, are the same for both."""
    import torch
    import transformers

    theirs = make_model(0, **SHAPE).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPTModel.from_pretrained(tmp_path / "theirs", dropout_rate=0.0)
    batch = make_batch(0, 50, 2, 9, "right")
    assert_parity(ours, batch, reference(theirs.float(), batch), TOLERANCE)

    half = GPTModel.from_pretrained(tmp_path / "theirs", dtype=dtype)
    half.save_pretrained(tmp_path / "ours")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert read.dtype == getattr(torch, dtype)
    assert_parity(ours, batch, reference(read.float(), batch), TOLERANCE)


def test_there_and_back_again(tmp_path):
    """lmzoo -> transformers -> lmzoo: no weight and no field of the config changes."""
    import transformers

    ours = GPTModel(GPTConfig.from_hugging_face({**SHAPE, "eos_token_id": 3}))
    ours.save_pretrained(tmp_path / "one")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    twin = GPTModel.from_pretrained(tmp_path / "two")
    assert twin.config == ours.config
    for one, other in zip(twin.weights, ours.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    theirs = json.loads((tmp_path / "two" / "config.json").read_text())
    assert {name: theirs[name] for name in ours.config.to_hugging_face()} == ours.config.to_hugging_face()


def test_greedy_generation_is_the_same(tmp_path):
    import torch

    theirs = make_model(4, **SHAPE)
    theirs.save_pretrained(tmp_path)
    ours = GPTModel.from_pretrained(tmp_path)
    prompts = np.random.default_rng(0).integers(1, 50, (4, 5))
    expected = theirs.generate(
        torch.tensor(prompts), attention_mask=torch.ones(4, 5), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    np.testing.assert_array_equal(ours.generate(prompts, max_new_tokens=8, temperature=0.0), expected[:, 5:])
