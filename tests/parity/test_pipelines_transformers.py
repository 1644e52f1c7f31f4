"""Pipelines against those of transformers, and real sentence vectors against its model."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_encoders import CONTEXT_LENGTH, SENTENCES, task_model, tiny_encoder, tiny_tokenizer

from lmzoo.pipelines import MaskFiller, QuestionAnswerer, TextClassifier, TextEmbedder, TokenClassifier, load_pipeline

pytestmark = pytest.mark.parity
# Where a text has nothing but known words, both sides agree on what a word is.
TEXTS = [*SENTENCES[:2], "the cat", "Ada sat on New York, the mat.", "that was that, and that was it"]


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("torch")
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()


def their_tokenizer(directory):
    import transformers

    tiny_tokenizer().save_pretrained(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def open_theirs(tmp_path):
    def open_pipeline(task, model, **settings):
        import transformers

        model.save_pretrained(tmp_path)
        tokenizer = their_tokenizer(tmp_path)
        return transformers.pipeline(task, model=str(tmp_path), tokenizer=tokenizer, device="cpu", **settings)

    return open_pipeline


@pytest.mark.parametrize("name", ["single_label", "multi_label"])
def test_classifier(open_theirs, name):
    theirs = open_theirs("text-classification", task_model(name), top_k=None)
    ours = TextClassifier(task_model(name), tiny_tokenizer())
    for text in TEXTS:
        (expected,) = theirs([text])
        assert ours(text)["scores"] == pytest.approx(by_label(expected), abs=1e-4)
        (expected,) = theirs([{"text": text, "text_pair": "the mat"}])
        assert ours(text, "the mat")["scores"] == pytest.approx(by_label(expected), abs=1e-4)


def by_label(entries):
    return {entry["label"]: entry["score"] for entry in entries}


def test_tagger(open_theirs):
    theirs = open_theirs("token-classification", task_model("tokens"), aggregation_strategy="first")
    ours = TokenClassifier(task_model("tokens"), tiny_tokenizer())
    found = 0
    for text in TEXTS:
        expected = theirs(text)
        actual = ours(text)
        found += len(actual)
        for one, other in zip(actual, expected, strict=True):
            assert (one["label"], one["start"], one["end"]) == (other["entity_group"], other["start"], other["end"])
            assert one["score"] == pytest.approx(float(other["score"]), abs=1e-4)
    assert found > 1, "the model must find something"


def test_filler(open_theirs):
    model = tiny_encoder(vocab_size=tiny_tokenizer().vocab_size)
    theirs = open_theirs("fill-mask", model, top_k=4)
    ours = MaskFiller(model, tiny_tokenizer(), 4)
    for text in ("the [MASK] sat on", "[MASK]", "a [MASK] b", "a [MASK] on [MASK]"):
        several = text.count("[MASK]") > 1
        results, expected = (each(text) if several else [each(text)] for each in (ours, theirs))
        for one, other in zip(results, expected, strict=True):
            assert [filled["token"] for filled in one] == [filled["token_str"] for filled in other]
            scores = [filled["score"] for filled in other]
            assert [filled["score"] for filled in one] == pytest.approx(scores, abs=1e-4)


def test_answerer(tmp_path):
    """Of one window: the product of both softmaxes over the context and the first token, in the best span."""
    import torch
    import transformers

    task_model("answers").save_pretrained(tmp_path)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    tokenizer = their_tokenizer(tmp_path)
    ours = QuestionAnswerer(task_model("answers"), tiny_tokenizer(), max_answer_length=5)
    for context in TEXTS[:4]:
        encoded = tokenizer("the cat", context, return_offsets_mapping=True, return_tensors="pt")
        spans = encoded.pop("offset_mapping")[0].tolist()
        assert encoded["input_ids"].shape[1] <= CONTEXT_LENGTH
        with torch.no_grad():
            outputs = model(**encoded)
        inside = np.array([side == 1 for side in encoded.sequence_ids(0)])
        counted = inside | (np.arange(len(inside)) == 0)
        shares = []
        for logits in (outputs.start_logits, outputs.end_logits):
            each = np.where(counted, np.exp(logits[0].numpy()), 0.0)
            shares.append(each / each.sum())
        products = np.triu(np.outer(np.where(inside, shares[0], 0), np.where(inside, shares[1], 0)))
        products -= np.triu(products, 5)
        first, last = np.unravel_index(products.argmax(), products.shape)
        answer = ours("the cat", context)
        assert (answer["start"], answer["end"]) == (spans[first][0], spans[last][1])
        assert answer["score"] == pytest.approx(products[first, last], rel=1e-3)


def varied_sentences():
    """Long and short, accents, other scripts, emoji, nothing at all."""
    source = Path(subprocess.__file__).read_text(encoding="utf-8")
    lines = [line.strip() for line in source.splitlines() if len(line.strip()) > 30]
    written = [
        "",
        " ",
        "😀",
        "I ❤️ Zürich — naïve café, déjà vu!",
        "東京は日本の首都です。",
        "我喜欢吃苹果,不喜欢下雨。",
        "Привет, как дела?",
        "مرحبا بالعالم",
        "e\u0301 versus é",
        "A" * 300,
        "[CLS] is a token [SEP]",
        "\t tabs\nand lines\r\n",
        source[:4000],
        " ".join(lines[:40]),
    ]
    return [*written, *lines[: 200 - len(written)]]


def test_real_sentence_vectors(minilm):
    import torch
    import transformers

    texts = varied_sentences()
    assert len(texts) == 200
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    expected = []
    for text in texts:
        encoded = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**encoded).last_hidden_state
        mask = encoded["attention_mask"][..., None].float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        expected.append(torch.nn.functional.normalize(pooled)[0].numpy())
    embedder = load_pipeline(minilm)
    assert isinstance(embedder, TextEmbedder)
    assert embedder.max_length == 256
    vectors = embedder(texts)
    assert (vectors * np.stack(expected)).sum(1).min() >= 0.99999
    np.testing.assert_allclose(vectors, np.stack(expected), atol=1e-4)
