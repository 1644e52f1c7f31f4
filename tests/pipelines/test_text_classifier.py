"""Labels of texts and of pairs, against the model on ids from Python."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import TEXTS, reference, task_model, tiny_tokenizer

from lmzoo.pipelines import TextClassifier

MAX_LENGTH = 20
texts = st.one_of(st.text(max_size=20), st.text("the cat é漢😀.", max_size=60))


@pytest.fixture(scope="module")
def classifiers():
    names = ("single_label", "multi_label", "regression", "two_targets")
    return {name: TextClassifier(task_model(name), tiny_tokenizer(), MAX_LENGTH, 0.4) for name in names}


def logits_of(classifier, text, pair):
    pairs = None if pair is None else [pair]
    return reference(classifier.model, tiny_tokenizer().encode_pairs([text], pairs, max_length=MAX_LENGTH))[0]


@settings(max_examples=25)
@given(texts, st.none() | texts)
def test_scores_are_those_of_the_model(classifiers, text, pair):
    logits = {name: logits_of(classifier, text, pair) for name, classifier in classifiers.items()}
    results = {name: classifier(text, pair) for name, classifier in classifiers.items()}

    shares = np.exp(logits["single_label"]) / np.exp(logits["single_label"]).sum()
    single = results["single_label"]
    assert single["scores"] == pytest.approx(dict(zip(("bad", "good", "neither"), shares, strict=True)), abs=1e-5)
    assert single["label"] == max(single["scores"], key=single["scores"].get)
    assert single["score"] == single["scores"][single["label"]]

    multi = results["multi_label"]
    sigmoids = 1 / (1 + np.exp(-logits["multi_label"]))
    assert multi["scores"] == pytest.approx(dict(zip("abc", sigmoids, strict=True)), abs=1e-5)
    assert multi["labels"] == [label for label, score in multi["scores"].items() if score >= 0.4]

    value = logits["regression"][0]
    assert results["regression"]["score"] == results["regression"]["scores"]["score"] == pytest.approx(value, abs=1e-4)
    assert results["two_targets"]["scores"] == pytest.approx(
        dict(zip("xy", logits["two_targets"], strict=True)), abs=1e-4
    )


def test_texts_and_labels_differ(classifiers):
    results = classifiers["single_label"](TEXTS)
    assert len({result["label"] for result in results}) > 1, "the model must tell the texts apart"
    pairs = classifiers["single_label"](TEXTS, TEXTS[::-1])
    assert [pair["score"] for pair in pairs] != [result["score"] for result in results]


def test_outputs_of_the_graph_name_the_labels(classifiers):
    outputs = classifiers["multi_label"](tf.constant(TEXTS[:2]))
    assert outputs["labels"].numpy().tolist() == [[b"a", b"b", b"c"]] * 2
    assert outputs["chosen"].numpy().tolist() == (outputs["scores"].numpy() >= 0.4).tolist()
    assert set(classifiers["regression"](tf.constant(TEXTS[:2]))) == {"scores", "labels"}


def test_pairs_are_as_many_as_texts(classifiers):
    classifier = classifiers["single_label"]
    with pytest.raises(ValueError, match="2 of text and 1 of pair"):
        classifier(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="text and pair must both"):
        classifier("a", ["c"])
    with pytest.raises(TypeError, match=r"pair is a str, but must be tf.string \[B\]"):
        classifier(tf.constant(["a"]), "c")


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_a_score(threshold):
    with pytest.raises(ValueError, match="threshold is"):
        TextClassifier(task_model("multi_label"), tiny_tokenizer(), threshold=threshold)
