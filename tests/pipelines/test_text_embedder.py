"""Vectors of texts, against the model on ids from Python."""

import json

import numpy as np
import pytest
import tensorflow as tf
from tiny_encoders import TEXTS, reference, task_model, tiny_encoder, tiny_tokenizer

from lmzoo.pipelines import TextEmbedder
from lmzoo.tasks import EmbeddingModel


@pytest.fixture(scope="module")
def embedder():
    return TextEmbedder(task_model("embeddings"), tiny_tokenizer(), max_length=12)


def test_vectors_are_those_of_the_model(embedder):
    vectors = embedder(TEXTS)
    assert vectors.shape == (len(TEXTS), 16)
    assert vectors.dtype == np.float32
    encodings = tiny_tokenizer().encode_pairs(TEXTS, max_length=12)
    np.testing.assert_allclose(vectors, reference(embedder.model, encodings), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert len(np.unique(vectors.round(3), axis=0)) > len(TEXTS) / 2, "the model must tell the texts apart"


def test_a_str_gives_a_vector_and_no_texts_an_empty_matrix(embedder):
    np.testing.assert_allclose(embedder(TEXTS[0]), embedder(TEXTS)[0], atol=1e-5)
    assert embedder([]).shape == (0, 16)
    assert embedder(tf.constant(TEXTS))["embedding"].shape == (len(TEXTS), 16)


def test_an_encoder_gives_the_normalised_mean():
    states = reference(tiny_encoder().without_head(), tiny_tokenizer().encode_pairs(TEXTS, max_length=12), "features")
    means = np.stack([state.mean(0) for state in states])
    vectors = TextEmbedder(tiny_encoder(), tiny_tokenizer(), max_length=12)(TEXTS)
    np.testing.assert_allclose(vectors, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "normalize"), [("mean", True), pytest.param("first", False, marks=pytest.mark.slow)]
)
def test_a_checkpoint_says_how_vectors_are_made(tmp_path, pooling, normalize):
    model = EmbeddingModel(tiny_encoder(), pooling=pooling, normalize=normalize)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({**config, "max_seq_length": 9}))
    loaded = TextEmbedder.from_pretrained(tmp_path)
    assert loaded.max_length == 9
    np.testing.assert_allclose(loaded(TEXTS), TextEmbedder(model, tiny_tokenizer(), 9)(TEXTS), atol=1e-5)
    assert TextEmbedder.from_pretrained(tmp_path, max_length=11).max_length == 11
