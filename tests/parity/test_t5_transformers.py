"""T5 of both generations and mT5 against transformers itself, on configurations that nobody chose, both ways."""

from __future__ import annotations

import json
import tempfile

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_t5_golden import SCRIPT, assert_parity, inputs_of

from lmzoo.layers import RelativePositionBias
from lmzoo.models import load_pretrained
from lmzoo.models.t5 import MT5Config, MT5Model, T5Config, T5Model

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
make_model, make_batch, reference, generated = (
    SCRIPT[name] for name in ("make_model", "make_batch", "reference", "generated")
)
KINDS = {"T5": (T5Model, T5Config), "MT5": (MT5Model, MT5Config)}


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("torch")
    logging = pytest.importorskip("transformers").utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # It warns of each head that is not tied, and uses it.


@st.composite
def shapes(draw):
    num_buckets = draw(st.sampled_from([4, 6, 8, 10, 32]))
    return {
        "kind": draw(st.sampled_from(list(KINDS))),
        "untied": draw(st.booleans()),
        "vocab_size": draw(st.integers(3, 120)),
        "d_model": draw(st.integers(8, 32)),
        "d_kv": draw(st.integers(1, 9)),
        "d_ff": draw(st.integers(1, 60)),
        "num_heads": draw(st.integers(1, 5)),
        "num_layers": draw(st.integers(1, 3)),
        "num_decoder_layers": draw(st.integers(1, 3)),
        "relative_attention_num_buckets": num_buckets,
        "relative_attention_max_distance": draw(st.integers(num_buckets // 2 + 1, 40)),
        "feed_forward_proj": draw(st.sampled_from(["relu", "gelu", "gelu_new", "gated-gelu", "gated-silu"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-3, 1e-6])),
        "decoder_start_token_id": draw(st.integers(0, 2)),
    }


@st.composite
def cases(draw):
    shape, seed = draw(shapes()), draw(st.integers(0, 2**31))
    rows, source, target = draw(st.integers(1, 3)), draw(st.integers(1, 24)), draw(st.integers(1, 16))
    padding = draw(st.sampled_from([None, "left", "right"]))
    return shape, seed, make_batch(seed, shape["vocab_size"], rows, source, target, padding)


def check_from_transformers(shape, seed, batch):
    """And with what is saved again: lmzoo's own files hold the same model, for both."""
    theirs = make_model(seed, **shape)
    answers = reference(theirs, batch)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = load_pretrained(directory)
    assert type(ours) is KINDS[shape["kind"]][0]
    assert ours.config.tied_head != shape["untied"]
    assert ours.count_params() == ours.config.count_params() == sum(each.numel() for each in theirs.parameters())
    assert_parity(ours, batch, answers, TOLERANCE)


def check_to_transformers(shape, seed, batch):
    import transformers

    keras.utils.set_random_seed(seed)
    shape = dict(shape)
    model_class, config_class = KINDS[shape.pop("kind")]
    config = config_class.from_hugging_face(
        {**shape, "tie_word_embeddings": not shape.pop("untied"), "dropout_rate": 0.0}
    )
    ours = model_class(config)
    random = np.random.default_rng(seed)
    for variable in ours.trainable_variables:
        variable.assign_add(random.normal(0.0, 0.2, variable.shape))
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        theirs, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, output_loading_info=True)
        twin = load_pretrained(directory)
    assert not any(report.values()), report
    assert twin.config == ours.config
    if not config.tied_head:
        np.testing.assert_array_equal(theirs.lm_head.weight.detach(), ours.head()[0])
        assert theirs.lm_head.weight is not theirs.shared.weight
    assert_parity(ours, batch, reference(theirs.eval(), batch), TOLERANCE)


DIRECTIONS = {"from": check_from_transformers, "to": check_to_transformers}


@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=12)
@given(case=cases())
def test_random_configurations(direction, case):
    DIRECTIONS[direction](*case)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@settings(max_examples=30)
@given(case=cases())
def test_many_random_configurations(direction, case):
    DIRECTIONS[direction](*case)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_every_kind_of_head(tmp_path, tied, scaled):
    """Tied or not, and scaled or not, are two things in files of transformers 5."""
    import transformers

    fields = {"vocab_size": 31, "model_dim": 8, "num_heads": 2, "head_dim": 3, "num_layers": 1, "feedforward_dim": 9}
    ours = T5Model(T5Config(**fields, tied_head=tied, scaled_head=scaled, dropout_rate=0.0))
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    batch = make_batch(0, 31, 2, 7, 5, "right")
    assert_parity(ours, batch, reference(theirs, batch), TOLERANCE)
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_pretrained(tmp_path / "theirs").config == ours.config


@pytest.mark.parametrize("num_buckets", [4, 6, 8, 16, 30, 32, 64])
@pytest.mark.parametrize("max_distance", [33, 40, 128, 129, 1000])
def test_buckets_of_all_distances(num_buckets, max_distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-max_distance - 50, max_distance + 51)
    for causal in (True, False):
        layer = RelativePositionBias(1, num_buckets=num_buckets, max_distance=max_distance, causal=causal)
        expected = T5Attention._relative_position_bucket(distances, not causal, num_buckets, max_distance)
        actual = np.pad(layer.buckets(), 50, mode="edge")
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(tmp_path, dtype):
    """Both ways: the numbers in the file, read into float32, are the same for both."""
    import torch
    import transformers

    shape = {**SCRIPT["SHAPE"], "untied": True, "feed_forward_proj": "gated-gelu"}
    theirs = make_model(0, **shape).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    batch = make_batch(0, 31, 2, 9, 6, "right")
    answers = reference(theirs.float(), batch)
    assert_parity(ours, batch, answers, TOLERANCE)
    half = load_pretrained(tmp_path / "theirs", dtype=dtype)
    half.save_pretrained(tmp_path / "ours")
    read = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert read.dtype == getattr(torch, dtype)
    assert_parity(ours, batch, reference(read.float(), batch), TOLERANCE)


def test_float16_where_transformers_overflows():
    """Sums that outgrow float16 are infinite there, or cut off at its end; ours are those of float32."""
    import torch

    shape = {**SCRIPT["SHAPE"], "untied": False, "d_model": 16, "d_ff": 64}
    theirs = make_model(3, **shape)
    with torch.no_grad():
        for stack in (theirs.encoder, theirs.decoder):
            for block in stack.block:
                block.layer[-1].DenseReluDense.wo.weight.mul_(3e4)
    batch = make_batch(3, 31, 2, 9, 6, "right")
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = {dtype: load_pretrained(directory, dtype=dtype) for dtype in ("float32", "mixed_float16", "float16")}
    exact = np.asarray(ours["float32"](inputs_of(ours["float32"], batch)))
    np.testing.assert_allclose(exact, reference(theirs, batch)["logits"], rtol=0, atol=1e-3)

    def error(logits):
        return np.linalg.norm(logits - exact) / np.linalg.norm(exact)

    with torch.no_grad():
        inputs = {name: torch.tensor(each).long() for name, each in inputs_of(ours["float32"], batch).items()}
        half = theirs.half()(
            input_ids=inputs["token_ids"],
            attention_mask=inputs["padding_mask"],
            decoder_input_ids=inputs["decoder_token_ids"],
        ).logits.float()
    assert not np.isfinite(half).all() or error(half.numpy()) > 0.05
    for dtype in ("mixed_float16", "float16"):
        logits = np.asarray(ours[dtype](inputs_of(ours[dtype], batch)))
        assert np.isfinite(logits).all()
        assert error(logits) < 0.01, dtype


def test_there_and_back_again(tmp_path):
    """lmzoo -> transformers -> lmzoo: no weight and no field of the config changes."""
    import transformers

    ours = T5Model(T5Config.preset("t5-v1.1-small", vocab_size=40, model_dim=16, num_layers=2, feedforward_dim=20))
    ours.save_pretrained(tmp_path / "one")
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    twin = T5Model.from_pretrained(tmp_path / "two")
    assert twin.config == ours.config
    for one, other in zip(twin.weights, ours.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    theirs = json.loads((tmp_path / "two" / "config.json").read_text())
    written = ours.config.to_hugging_face()
    assert {name for name in written if theirs.get(name) != written[name]} == {"tie_word_embeddings"}


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_greedy_generation_is_the_same(tmp_path, padding):
    theirs = make_model(4, **{**SCRIPT["SHAPE"], "untied": True}, scale=0.5)
    theirs.save_pretrained(tmp_path)
    batch = make_batch(4, 31, 4, 6, 1, padding)
    # transformers answers an empty source too, but with what its padding says.
    batch["padding_mask"][:, -1 if padding == "left" else 0] = True
    expected, _ = generated(theirs, batch, max_new_tokens=10)
    assert len({tuple(row) for row in expected}) > 1
    source = {name: batch[name] for name in ("token_ids", "padding_mask")}
    ours = load_pretrained(tmp_path)
    np.testing.assert_array_equal(ours.generate(source, max_new_tokens=10, temperature=0.0), expected)
    steps = list(ours.stream(source, max_new_tokens=10, temperature=0.0))
    np.testing.assert_array_equal(np.stack([step.token_ids for step in steps], axis=1), expected[:, : len(steps)])
