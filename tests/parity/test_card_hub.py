"""Model cards as huggingface_hub reads them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmzoo.checkpoints import Metric, ModelCard
from lmzoo.models.bert import BertConfig, BertModel

pytestmark = pytest.mark.parity
SHAPE = {"vocab_size": 40, "context_length": 16, "num_layers": 1, "num_heads": 2, "model_dim": 16}


@pytest.fixture
def saved(tmp_path):
    model = BertModel(BertConfig(**SHAPE))
    model.card = ModelCard(
        name="Movie critic",
        license="apache-2.0",
        language="en",
        tags=["movies"],
        datasets=["vader"],
        base_model="org/base",
        metrics=[
            Metric(name="accuracy", value=0.875, dataset="vader", split="test", task="text-classification"),
            Metric(name="f1", value=0.5, dataset="vader", split="test", task="text-classification"),
        ],
    )
    model.save_pretrained(tmp_path)
    return tmp_path


def test_the_hub_reads_what_was_said(saved):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(saved / "README.md")
    data = card.data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", "en", "org/base")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "fill-mask")
    assert data.tags == ["lmzoo", "keras", "bert", "movies"]
    assert data.datasets == ["vader"]
    assert data.model_name == "Movie critic"
    results = [(each.task_type, each.dataset_name, each.dataset_split) for each in data.eval_results]
    assert results == [("text-classification", "vader", "test")] * 2
    assert [(each.metric_type, each.metric_value) for each in data.eval_results] == [("accuracy", 0.875), ("f1", 0.5)]
    assert card.text.lstrip().startswith("<!-- lmzoo")
    hub.ModelCard(str(card)).save(saved / "again.md")  # And writes it again.
    assert hub.ModelCard.load(saved / "again.md").data.to_dict() == data.to_dict()


def test_how_to_use_with_transformers(saved, monkeypatch):
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()
    text = (saved / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(saved)
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert names["model"].num_parameters() > 0


@given(st.text(min_size=1))
def test_any_text_is_read_as_it_was_written(text):
    yaml = pytest.importorskip("yaml")
    rendered = ModelCard(license=text, tags=[text]).render(
        name="x", task="fill-mask", library="transformers", tags=(), facts={}, usage=""
    )
    front = yaml.safe_load(rendered.split("\n---\n")[0].removeprefix("---\n"))
    assert (front["license"], front["tags"]) == (text, [text])
