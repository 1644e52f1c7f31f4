"""BERT, RoBERTa and DistilBERT against transformers itself, on configurations that nobody chose, both ways."""

from __future__ import annotations

import json
import runpy
import subprocess
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bert_golden import assert_parity

from lmzoo.models import ARCHITECTURES, load_pretrained
from lmzoo.models.bert import BertModel

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
LEAST_WIDTH = 8
KINDS = ("bert", "roberta", "distilbert")

# From the script that makes the golden files, so that they and the live comparison are the same.
_SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "golden" / "make_bert_golden.py"))
make_model, make_batch, reference = (_SCRIPT[name] for name in ("make_model", "make_batch", "reference"))


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("torch")
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()


@st.composite
def cases(draw):
    kind, num_heads = draw(st.sampled_from(KINDS)), draw(st.integers(1, 4))
    length = draw(st.integers(1, 12))
    # Layer norm of two or three numbers divides by what may be next to nothing: float32 then differs from itself.
    narrowest = max(3, -(-LEAST_WIDTH // num_heads))
    shape = {
        "vocab_size": draw(st.integers(4, 100)),
        "max_position_embeddings": length + 2 + draw(st.integers(0, 9)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": num_heads,
        "hidden_size": num_heads * draw(st.integers(narrowest, 12)),
        "intermediate_size": draw(st.integers(1, 50)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
    }
    if kind != "distilbert":
        shape["type_vocab_size"] = draw(st.integers(1, 3))
        shape["layer_norm_eps"] = draw(st.sampled_from([1e-12, 1e-5, 1e-3]))
    seed, padding = draw(st.integers(0, 2**31)), draw(st.sampled_from([None, "left", "right"]))
    rows = draw(st.integers(1, 3))
    batch = make_batch(seed, shape["vocab_size"], shape.get("type_vocab_size", 1), rows, length, padding)
    return kind, shape, seed, batch


def check_from_transformers(kind, shape, seed, batch):
    theirs = make_model(kind, seed, **shape)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = ARCHITECTURES[kind].from_pretrained(directory, dropout_rate=0.0)
    assert ours.count_params() == theirs.num_parameters()
    assert_parity(ours, batch, reference(theirs, batch), TOLERANCE)


def check_to_transformers(kind, shape, seed, batch):
    import transformers

    keras.utils.set_random_seed(seed)
    model_class = ARCHITECTURES[kind]
    values = make_model(kind, seed, **shape).config.to_dict()
    ours = model_class(model_class.config_class.from_hugging_face(values).replace(dropout_rate=0.0))
    random = np.random.default_rng(seed)
    for variable in ours.trainable_variables:
        variable.assign_add(random.normal(0.0, 0.2, variable.shape))
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory)
        name = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
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
    "intermediate_size": 20,
}
CLASSES = [
    ("bert", "BertModel"),
    ("bert", "BertForMaskedLM"),
    ("bert", "BertForNextSentencePrediction"),
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertForTokenClassification"),
    ("bert", "BertForQuestionAnswering"),
    ("bert", "BertForMultipleChoice"),
    ("roberta", "RobertaModel"),
    ("roberta", "RobertaForSequenceClassification"),
    ("roberta", "RobertaForTokenClassification"),
    ("roberta", "RobertaForQuestionAnswering"),
    ("distilbert", "DistilBertModel"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("distilbert", "DistilBertForTokenClassification"),
    ("distilbert", "DistilBertForQuestionAnswering"),
]


@pytest.mark.parametrize(("kind", "head"), CLASSES)
def test_checkpoints_of_all_heads(kind, head, tmp_path):
    """The backbone is read from each of them; heads that it lacks are named."""
    import torch

    theirs = make_model(kind, 0, head=head, **SHAPE)
    theirs.save_pretrained(tmp_path)
    batch = make_batch(0, 50, 1, 2, 9, "right")
    tensors = {name: torch.tensor(batch[name]).long() for name in ("token_ids", "padding_mask")}
    hidden = theirs.base_model(tensors["token_ids"], attention_mask=tensors["padding_mask"]).last_hidden_state
    if head == "BertForMaskedLM":
        with pytest.warns(UserWarning, match="has no pooler"):
            ours = load_pretrained(tmp_path)
    else:
        with pytest.warns(UserWarning, match=r"has no (cls\.predictions|lm_head|vocab_)"):
            ours = load_pretrained(tmp_path)
    mask = batch["padding_mask"]
    inputs = {"token_ids": batch["token_ids"], "padding_mask": mask}
    actual = np.asarray(ours.features(inputs))
    np.testing.assert_allclose(actual[mask], hidden.detach().numpy()[mask], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_again(kind, tmp_path):
    """lmzoo -> transformers -> lmzoo: no weight and no field of the config changes."""
    import transformers

    make_model(kind, 0, **SHAPE).save_pretrained(tmp_path / "zero")
    ours = load_pretrained(tmp_path / "zero")
    ours.save_pretrained(tmp_path / "one")
    name = json.loads((tmp_path / "one" / "config.json").read_text())["architectures"][0]
    getattr(transformers, name).from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    twin = load_pretrained(tmp_path / "two")
    assert twin.config == ours.config
    for one, other in zip(twin.weights, ours.weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(tmp_path, dtype):
    import torch
    import transformers

    theirs = make_model("bert", 0, **SHAPE).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    batch = make_batch(0, 50, 2, 2, 9, "right")
    ours = BertModel.from_pretrained(tmp_path / "theirs", dropout_rate=0.0)
    assert_parity(ours, batch, reference(theirs.float(), batch), TOLERANCE)
    BertModel.from_pretrained(tmp_path / "theirs", dtype=dtype).save_pretrained(tmp_path / "ours")
    read = transformers.BertForPreTraining.from_pretrained(tmp_path / "ours")
    assert read.dtype == getattr(torch, dtype)
    assert_parity(ours, batch, reference(read.float(), batch), TOLERANCE)


def test_real_weights(minilm):
    import torch
    import transformers

    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    with pytest.warns(UserWarning, match=r"has no cls\.predictions"):
        ours = load_pretrained(minilm)
    assert ours.config.count_params() == theirs.num_parameters()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    lines = [line.strip() for line in Path(subprocess.__file__).read_text(encoding="utf-8").splitlines()]
    texts = [line for line in lines if len(line) > 20][:32]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="np")
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(value) for name, value in encoded.items()}, output_hidden_states=True)
    mask = encoded["attention_mask"].astype(bool)
    assert not mask.all()
    inputs = {"token_ids": encoded["input_ids"].astype("int32"), "padding_mask": mask}
    states = ours.hidden_states(inputs)
    for actual, state in zip(states, expected.hidden_states, strict=True):
        np.testing.assert_allclose(np.asarray(actual)[mask], state.numpy()[mask], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ours.pooled(states[-1]), expected.pooler_output, rtol=0, atol=TOLERANCE)
