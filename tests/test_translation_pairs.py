"""The pairs that examples/translate_t5.py reads from pages, and how it shares them out."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "translate_t5.py"
    spec = importlib.util.spec_from_file_location("translate_t5", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_paragraphs_of_the_same_id_are_a_pair(example, tmp_path):
    pages = {
        "en/text/a.html": '<h1 id="hd_id1" dir="auto">Save &amp; Close</h1>\n<p id="par_id2" class="x">Click\n'
        '<span class="y">OK</span><br>now.</p><p id="other">no</p><p id="par_id3">alone</p>',
        "de/text/a.html": '<p id="par_id2">Jetzt <b>OK</b> drücken.</p><h1 id="hd_id1">Sichern</h1>',
        "en/text/b.html": '<p id="par_id1">a page that is not in German</p>',
    }
    for name, content in pages.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    pairs = list(example.read_pages(tmp_path / "en", tmp_path / "de"))
    assert [(pair["page"], pair["source"], pair["target"]) for pair in pairs] == [
        ("text/a.html", "Save & Close", "Sichern"),
        ("text/a.html", "Click OK now.", "Jetzt OK drücken."),
        ("text/a.html", "alone", ""),
        ("text/b.html", "a page that is not in German", ""),
    ]


def test_no_page_is_in_both_parts(example):
    pairs = [
        {"page": f"page{page}", "source": f"text {(page * 7 + number) % 400}", "target": f"Text {number % 3}"}
        for page in range(100)
        for number in range(9)
    ]
    pairs += [{"page": "page1", "source": "OK", "target": "OK"}, {"page": "page1", "source": "a", "target": ""}]
    parts = example.split(pairs)
    train, test = ({pair["page"] for pair in parts[name]} for name in ("train", "test"))
    assert len(test) == round(example.HELD_OUT * 100)
    assert not train & test
    for part in parts.values():
        texts = [(pair["source"], pair["target"]) for pair in part]
        assert len(set(texts)) == len(texts)
        assert all(source != target and target for source, target in texts)
    learnt = {pair["source"] for pair in parts["train"]}
    assert all(pair["seen"] == (pair["source"] in learnt) for pair in parts["test"])
    assert parts == example.split(pairs)
