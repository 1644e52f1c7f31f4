"""ALBERT and ELECTRA against transformers itself, on configurations that nobody chose, both ways."""

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
from test_bert_golden import assert_parity

from lmzoo.models import ARCHITECTURES, ElectraGenerator, load_pretrained
from lmzoo.models.albert import AlbertConfig
from lmzoo.models.electra import ElectraConfig, ElectraGeneratorConfig, ElectraModel

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
LEAST_WIDTH = 8
HEADS = {
    "albert": "AlbertForPreTraining",
    "electra": "ElectraForPreTraining",
    "electra-generator": "ElectraForMaskedLM",
}
CLASSES = {**ARCHITECTURES, "electra-generator": ElectraGenerator}

_SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "golden" / "make_bert_golden.py"))
make_model, make_batch, reference = (_SCRIPT[name] for name in ("make_model", "make_batch", "reference"))


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("torch")
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()


@st.composite
def cases(draw):
    kind, num_heads = draw(st.sampled_from(sorted(HEADS))), draw(st.integers(1, 4))
    length = draw(st.integers(1, 12))
    width = num_heads * draw(st.integers(max(3, -(-LEAST_WIDTH // num_heads)), 12))
    shape = {
        "vocab_size": draw(st.integers(4, 100)),
        "max_position_embeddings": length + draw(st.integers(0, 9)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": num_heads,
        "hidden_size": width,
        "embedding_size": draw(st.one_of(st.just(width), st.integers(LEAST_WIDTH, 30))),
        "intermediate_size": draw(st.integers(1, 50)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        "type_vocab_size": draw(st.integers(1, 3)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5, 1e-3])),
    }
    seed, padding = draw(st.integers(0, 2**31)), draw(st.sampled_from([None, "left", "right"]))
    batch = make_batch(seed, shape["vocab_size"], shape["type_vocab_size"], draw(st.integers(1, 3)), length, padding)
    return kind, shape, seed, batch


def make_theirs(kind, seed, shape):
    return make_model(kind.split("-")[0], seed, head=HEADS[kind], **shape)


def check_from_transformers(kind, shape, seed, batch):
    theirs = make_theirs(kind, seed, shape)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = type(load_pretrained(directory)).from_pretrained(directory, dropout_rate=0.0)
    assert type(ours) is CLASSES[kind]
    assert ours.count_params() == theirs.num_parameters()
    assert_parity(ours, batch, reference(theirs, batch), TOLERANCE)


def check_to_transformers(kind, shape, seed, batch):
    import transformers

    keras.utils.set_random_seed(seed)
    model_class = CLASSES[kind]
    values = make_theirs(kind, seed, shape).config.to_dict()
    ours = model_class(model_class.config_class.from_hugging_face(values).replace(dropout_rate=0.0))
    random = np.random.default_rng(seed)
    for variable in ours.trainable_variables:
        variable.assign_add(random.normal(0.0, 0.2, variable.shape))
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        name = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
        assert name == HEADS[kind]
        theirs, report = getattr(transformers, name).from_pretrained(directory, output_loading_info=True)
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


SHAPE = {
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "embedding_size": 12,
    "intermediate_size": 20,
}
OTHERS = [
    ("albert", "AlbertModel"),
    ("albert", "AlbertForMaskedLM"),
    ("albert", "AlbertForSequenceClassification"),
    ("albert", "AlbertForTokenClassification"),
    ("albert", "AlbertForQuestionAnswering"),
    ("electra", "ElectraModel"),
    ("electra", "ElectraForSequenceClassification"),
    ("electra", "ElectraForTokenClassification"),
    ("electra", "ElectraForQuestionAnswering"),
]


@pytest.mark.parametrize(("kind", "head"), OTHERS)
def test_checkpoints_of_all_heads(kind, head, tmp_path):
    """The backbone is read from each of them; heads that it lacks are named."""
    import torch

    theirs = make_model(kind, 0, head=head, **SHAPE)
    theirs.save_pretrained(tmp_path)
    batch = make_batch(0, 50, 1, 2, 9, "right")
    tensors = {name: torch.tensor(batch[name]).long() for name in ("token_ids", "padding_mask")}
    hidden = theirs.base_model(tensors["token_ids"], attention_mask=tensors["padding_mask"]).last_hidden_state
    lacking = "pooler" if head == "AlbertForMaskedLM" else r"(predictions|discriminator_predictions)\."
    with pytest.warns(UserWarning, match=rf"has no {lacking}") as caught:
        ours = load_pretrained(tmp_path)
    assert len(caught) == 1
    mask = batch["padding_mask"]
    actual = np.asarray(ours.features({"token_ids": batch["token_ids"], "padding_mask": mask}))
    np.testing.assert_allclose(actual[mask], hidden.detach().numpy()[mask], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", HEADS)
def test_there_and_back_again(kind, tmp_path):
    """lmzoo -> transformers -> lmzoo: no weight and no field of the config changes."""
    import transformers

    make_theirs(kind, 0, SHAPE).save_pretrained(tmp_path / "zero")
    ours = load_pretrained(tmp_path / "zero")
    ours.save_pretrained(tmp_path / "one")
    getattr(transformers, HEADS[kind]).from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    twin = load_pretrained(tmp_path / "two")
    assert twin.config == ours.config
    for one, other in zip(twin.weights, ours.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_transformers_opens_both_halves_of_a_pretraining(tmp_path):
    """The discriminator, and the generator in the directory inside; what it saves of the first has no second half."""
    import transformers

    shape = {"vocab_size": 50, "num_layers": 2, "num_heads": 2, "model_dim": 16, "feedforward_dim": 64}
    ours = ElectraModel(
        ElectraConfig(**shape, embedding_dim=12, context_length=16, dropout_rate=0.0, generator_size=0.5)
    )
    ours.save_pretrained(tmp_path / "one")
    halves = {"ElectraForPreTraining": (ours, "one"), "ElectraForMaskedLM": (ours.generator, "one/generator")}
    batch = make_batch(0, 50, 2, 2, 9, "right")
    for name, (model, place) in halves.items():
        theirs, report = getattr(transformers, name).from_pretrained(tmp_path / place, output_loading_info=True)
        assert not any(report.values()), report
        assert_parity(model, batch, reference(theirs.eval(), batch), TOLERANCE)
    transformers.ElectraForPreTraining.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert load_pretrained(tmp_path / "two").config == ours.config.replace(generator_size=None)


@pytest.mark.parametrize("config_class", [AlbertConfig, ElectraConfig, ElectraGeneratorConfig])
def test_presets_are_as_large_as_those_of_transformers(config_class):
    """Not one weight is made: torch's "meta" device holds shapes alone."""
    import torch
    import transformers

    for name in config_class.PRESETS:
        config = config_class.preset(name)
        values = config.to_hugging_face()
        kind = values.pop("model_type")
        with torch.device("meta"):
            theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **values))
        assert config.count_params() == theirs.num_parameters(), name
