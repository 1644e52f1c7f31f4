"""Entities, against words and spans found one by one in Python."""

import unicodedata

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import TAGS, ScriptedTagger, randomized, reference, tiny_encoder, tiny_tokenizer

from lmzoo.pipelines import TokenClassifier
from lmzoo.tasks import TokenClassificationModel

MAX_LENGTH = 24
KINDS = ("wordpiece", "bpe")


@pytest.fixture(scope="module")
def taggers():
    def tagger(kind):
        return TokenClassifier(ScriptedTagger(tiny_encoder(), TAGS).play(0), tiny_tokenizer(kind), MAX_LENGTH)

    return {kind: tagger(kind) for kind in KINDS}


def words_of(text, kind):
    """[start, end, id of the first token] of each word."""
    tokenizer = tiny_tokenizer(kind)
    encodings = tokenizer.encode_pairs([text], max_length=MAX_LENGTH)
    words = []
    for index, (start, end) in zip(encodings.token_ids[0], encodings.offsets[0], strict=True):
        if start == end:
            continue
        if kind == "wordpiece":
            continues = tokenizer.id_to_token(index).startswith("##")
        else:
            touching = bool(words) and start == words[-1][1]
            letters = touching and all(unicodedata.category(char)[0] in "LNM" for char in text[start - 1 : start + 1])
            continues = bool(words) and (start < words[-1][1] or letters)
        if continues:
            words[-1][1] = end
        else:
            words.append([start, end, index])
    return words


def entities_of(text, kind, probabilities):
    entities, last = [], "O"
    for start, end, index in words_of(text, kind):
        tag = TAGS[probabilities[index].argmax()]
        label = tag.removeprefix("B-").removeprefix("I-")
        if tag != "O" and (tag.startswith("B-") or label != last):
            entities.append({"label": label, "start": start, "scores": []})
        if tag != "O":
            entities[-1]["end"] = end
            entities[-1]["scores"].append(probabilities[index].max())
        last = label
    for entity in entities:
        entity["score"] = pytest.approx(np.mean(entity.pop("scores")), abs=1e-5)
        entity["text"] = text[entity["start"] : entity["end"]]
    return entities


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.one_of(st.text(max_size=20), st.text("the cat é漢字😀.B2\n", max_size=50)))
def test_entities_are_those_found_word_by_word(taggers, kind, seed, text):
    tagger = taggers[kind]
    table = np.random.default_rng(seed).normal(0.0, 2.0, tagger.model.table.shape).astype("float32")
    tagger.model.table.assign(table)
    probabilities = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    assert tagger(text) == entities_of(text, kind, probabilities)


def play(tagger, **tags):
    """Gives each word the label of its first token's name; all others "O"."""
    table = np.zeros(tagger.model.table.shape, "float32")
    table[:, 0] = 5.0
    for word, tag in tags.items():
        table[tagger.tokenizer.encode(word)[0], TAGS.index(tag)] = 9.0
    tagger.model.table.assign(table)


def found(tagger, text):
    return [(entity["label"], entity["text"]) for entity in tagger(text)]


def test_words_in_a_row_of_one_kind_are_one_entity(taggers):
    tagger = taggers["wordpiece"]
    play(tagger, cat="B-PER", sat="I-PER", mat="B-LOC", on="I-LOC", was="MISC")
    assert found(tagger, "the Cat sat, the cat") == [("PER", "Cat sat"), ("PER", "cat")]
    assert found(tagger, "cat cat sat") == [("PER", "cat"), ("PER", "cat sat")]
    assert found(tagger, "sat sat the sat") == [("PER", "sat sat"), ("PER", "sat")]
    assert found(tagger, "cat on mat") == [("PER", "cat"), ("LOC", "on"), ("LOC", "mat")]
    assert found(tagger, "was  was\nthat") == [("MISC", "was  was")]


def test_entities_do_not_cross_texts(taggers):
    tagger = taggers["wordpiece"]
    play(tagger, sat="I-PER")
    results = tagger(tf.constant(["sat", "sat sat", "", "the", "sat the sat"]))
    assert results["count"].numpy().tolist() == [1, 1, 0, 0, 2]
    assert results["text"].numpy().tolist()[1] == [b"sat sat", b""]
    assert results["start"].numpy().tolist() == [[0, -1], [0, -1], [-1, -1], [-1, -1], [0, 8]]
    assert results["score"].numpy()[2].tolist() == [-1, -1]


def test_scores_are_those_of_the_model():
    model = randomized(TokenClassificationModel(tiny_encoder(), TAGS))
    tagger = TokenClassifier(model, tiny_tokenizer())
    text = "the cat sat 漢 on it"
    encodings = tiny_tokenizer().encode_pairs([text])
    # So that there is something to find, whatever the weights are.
    model.output_layer.bias.assign(-np.mean(reference(model, encodings)[0], axis=0))
    (logits,) = reference(model, encodings)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    starts = {start: row for row, (start, end) in enumerate(encodings.offsets[0]) if end > start}
    entities = [entity for entity in tagger(text) if " " not in entity["text"]]
    assert entities
    for entity in entities:
        row = probabilities[starts[entity["start"]]]
        assert entity["score"] == pytest.approx(row.max(), abs=1e-5)
        assert TAGS[row.argmax()].endswith(entity["label"])
