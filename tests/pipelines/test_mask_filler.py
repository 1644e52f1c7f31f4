"""Tokens for masks, against the model on ids from Python, and the texts that they make."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import CONTEXT_LENGTH, reference, tiny_encoder, tiny_tokenizer

from lmzoo.models import ARCHITECTURES
from lmzoo.pipelines import MaskFiller

TOP_K = 4
MASKS = {"wordpiece": "[MASK]", "bpe": "<mask>"}
parts = st.lists(st.text("the cat é漢😀.\n", max_size=12), min_size=2, max_size=4)


@pytest.fixture(scope="module")
def fillers():
    return {kind: MaskFiller(tiny_encoder(), tiny_tokenizer(kind), TOP_K) for kind in MASKS}


@pytest.mark.parametrize("kind", MASKS)
@settings(max_examples=20)
@given(parts)
def test_the_most_likely_tokens_of_each_mask(fillers, kind, parts):
    tokenizer, text = tiny_tokenizer(kind), MASKS[kind].join(parts)
    encodings = tokenizer.encode_pairs([text], max_length=CONTEXT_LENGTH)
    places = np.flatnonzero(np.array(encodings.token_ids[0]) == tokenizer.mask_token_id)
    logits = reference(tiny_encoder(), encodings)[0][places, : tokenizer.vocab_size]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    results = fillers[kind](text)
    results = [results] if len(places) == 1 else results
    assert len(results) == len(places)
    for result, row in zip(results, probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:TOP_K]
        assert [filled["score"] for filled in result] == pytest.approx(row[best], abs=1e-5)
        # Several tokens may read alike, as pieces of characters do.
        tokens = [tokenizer.decode([index], skip_special_tokens=False) for index in range(len(row))]
        for filled in result:
            scores = [score for token, score in zip(tokens, row, strict=True) if token == filled["token"]]
            assert any(filled["score"] == pytest.approx(score, abs=1e-5) for score in scores)


class Favourite:
    """A pipeline whose model prefers one token anywhere."""

    def __init__(self, kind):
        model_class = ARCHITECTURES["bert"]
        config = tiny_encoder().config.replace(num_layers=1)
        self.model, self.tokenizer = model_class(config), tiny_tokenizer(kind)
        self.filler = MaskFiller(self.model, self.tokenizer, 1)

    def fill(self, text, token):
        bias = np.zeros(self.model.config.vocab_size, "float32")
        bias[self.tokenizer.token_to_id(token)] = 1000.0
        self.model.head()[1].assign(bias)
        (filled,) = self.filler(text)
        assert filled["score"] == pytest.approx(1.0)
        return filled["text"]


def test_a_word_stands_in_place_of_its_mask():
    favourite = Favourite("wordpiece")
    assert favourite.fill("Naïve 漢字 [MASK] sat.", "cat") == "Naïve 漢字 cat sat."
    assert favourite.fill("[MASK]", "cat") == "cat"
    assert favourite.fill("([MASK])", "cat") == "(cat)"
    assert favourite.fill("The  [MASK]\n😀", "cat") == "The  cat\n😀"
    assert favourite.fill("a [MASK] b", "[SEP]") == "a [SEP] b"


def test_the_rest_of_a_word_joins_it():
    favourite = Favourite("wordpiece")
    piece = next(
        token
        for token in map(favourite.tokenizer.id_to_token, range(favourite.tokenizer.vocab_size))
        if token.startswith("##")
    )
    assert favourite.fill("The  [MASK] sat", piece) == f"The{piece[2:]} sat"
    assert favourite.fill("The[MASK] sat", piece) == f"The{piece[2:]} sat"
    assert favourite.fill("[MASK]", piece) == piece[2:]


def test_a_token_that_holds_its_space_keeps_it_where_there_is_none():
    favourite = Favourite("bpe")
    tokens = map(favourite.tokenizer.id_to_token, range(favourite.tokenizer.vocab_size))
    token = max((token for token in tokens if token.startswith("Ġ")), key=len)
    word = token[1:]
    assert word.isalpha()
    assert favourite.fill("The cat<mask> on", token) == f"The cat {word} on"
    assert favourite.fill("The cat <mask> on", token) == f"The cat {word} on"
    assert favourite.fill("<mask> cat", token) == f"{word} cat"
    assert favourite.fill("The ca<mask>", "t") == "The cat"


def test_several_masks_are_filled_one_by_one(fillers):
    first, second = fillers["wordpiece"]("the [MASK] on [MASK] é")
    assert all(filled["text"].startswith("the") and filled["text"].endswith(" on [MASK] é") for filled in first)
    assert all(filled["text"].startswith("the [MASK] on") and filled["text"].endswith(" é") for filled in second)


def test_a_text_without_a_mask_is_named(fillers):
    with pytest.raises(ValueError, match=r"'the cat' has no \[MASK\] in its first 32 tokens"):
        fillers["wordpiece"](["the [MASK]", "the cat"])
    with pytest.raises(ValueError, match="in its first 32 tokens"):
        fillers["wordpiece"]("the cat " * 40 + "[MASK]")
    outputs = fillers["wordpiece"](tf.constant(["the [MASK] [MASK]", "the cat", "[MASK]"]))
    assert outputs["count"].numpy().tolist() == [2, 0, 1]
    assert (outputs["score"].numpy() < 0).tolist() == [[[False] * 4] * 2, [[True] * 4] * 2, [[False] * 4, [True] * 4]]


def test_only_masked_places_go_through_the_head(monkeypatch):
    model = ARCHITECTURES["bert"](tiny_encoder().config)
    sizes, logits = [], model.logits

    def recorded(hidden):
        tf.py_function(lambda shape: sizes.append(shape.numpy().tolist()), [tf.shape(hidden)], [])
        return logits(hidden)

    monkeypatch.setattr(model, "logits", recorded)
    filler = MaskFiller(model, tiny_tokenizer())
    filler(["the cat [MASK] on the mat", "a [MASK] and [MASK]"])
    assert sizes == [[2, 2, model.config.model_dim]]


@pytest.mark.parametrize("top_k", [0, -1, 1000, 2.0, True])
def test_a_wrong_number_of_tokens_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, but must be an integer from 1 to"):
        MaskFiller(tiny_encoder(), tiny_tokenizer(), top_k)


def test_a_model_or_a_tokenizer_without_masks_is_refused():
    with pytest.raises(ValueError, match="no masked-LM head"):
        MaskFiller(tiny_encoder().without_head(), tiny_tokenizer())
    from tiny_pipeline import shared_model

    with pytest.raises(ValueError, match="GPTModel has no masked-LM head"):
        MaskFiller(shared_model(), tiny_tokenizer())
    from tiny_pipeline import tiny_tokenizer as causal_tokenizer

    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        MaskFiller(tiny_encoder(), causal_tokenizer())
