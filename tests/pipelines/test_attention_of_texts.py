"""How much the tokens of a text attend to one another, as pipelines tell it."""

import functools

import numpy as np
import pytest
import tensorflow as tf
import tiny_encoders
import tiny_text_to_text
from tiny_pipeline import shared_model, tiny_model, tiny_tokenizer

from lmzoo.pipelines import MaskFiller, QuestionAnswerer, TextEmbedder, TextGenerator, TextToText
from lmzoo.pipelines.attention import MAX_TOKENS

TEXTS = ["the cat sat on the mat", "", b"na\xff\x00ve \xf0\x9f\x98 [MASK]"]
# The same graph for all that reads whole texts; a model of each kind, and a pair.
NAMES = ("generator", "embedder", *(pytest.param(name, marks=pytest.mark.slow) for name in ("translator", "answerer")))


@functools.cache
def pipeline_of(name):
    tokenizer, model = tiny_encoders.tiny_tokenizer(), tiny_encoders.task_model
    return {
        "generator": lambda: TextGenerator(shared_model(), tiny_tokenizer(), 6),
        "translator": lambda: TextToText(tiny_text_to_text.tiny_t5(), tiny_text_to_text.tiny_tokenizer(), 6),
        "answerer": lambda: QuestionAnswerer(model("answers"), tokenizer),
        "embedder": lambda: TextEmbedder(model("embeddings"), tokenizer),
    }[name]()


def columns(pipeline, texts):
    return [tf.constant(texts, tf.string, [len(texts)])] * len(pipeline._inputs)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_probabilities_of_the_tokens_that_there_are(name):
    pipeline = pipeline_of(name)
    outputs = pipeline._attention(*columns(pipeline, TEXTS))
    tokens, attention = (outputs[key].numpy() for key in ("tokens", "attention"))
    batch, length = tokens.shape
    config = pipeline.model.config
    assert attention.shape == (batch, config.num_layers, config.num_heads, length, length)
    for row, text in enumerate(TEXTS):
        alone = pipeline._attention(*columns(pipeline, [text]))
        count = alone["tokens"].shape[1]
        assert tokens[row].tolist() == [*alone["tokens"].numpy()[0].tolist(), *[b""] * (length - count)]
        shown = attention[row, :, :, :count, :count]
        np.testing.assert_allclose(shown, alone["attention"][0], atol=1e-5)
        np.testing.assert_allclose(shown.sum(-1), 1.0, atol=1e-5)
        assert not attention[row, :, :, count:].any()
        assert not attention[row, :, :, :, count:].any()
        above = np.triu(shown, 1)
        assert above.any() == (name != "generator" and count > 1)
    assert [value.shape[0] for value in pipeline._attention(*columns(pipeline, [])).values()] == [0, 0]


def test_it_is_the_attention_of_the_pass_that_the_pipeline_makes():
    """The weights that numpy makes of what goes into each layer of the encoder."""
    pipeline = pipeline_of("embedder")
    encoder = pipeline.model.encoder
    tokens, attention = pipeline.attention("the cat sat, naïve 漢")
    (ids,) = pipeline.tokenizer.encode_pairs(["the cat sat, naïve 漢"]).token_ids
    assert tokens == [pipeline.tokenizer.id_to_token(index) for index in ids]
    states = encoder.hidden_states(np.array([ids], "int32"))
    for block, hidden, weights in zip(encoder.blocks, states, attention, strict=False):
        kernel, bias = (np.asarray(each) for each in block.attention.qkv.weights)
        query, key, _ = np.split(np.asarray(hidden)[0] @ kernel + bias, 3, axis=-1)
        for head, (one, other) in enumerate(zip(np.split(query, 2, -1), np.split(key, 2, -1), strict=True)):
            expected = np.exp(one @ other.T / one.shape[-1] ** 0.5)
            np.testing.assert_allclose(weights[head], expected / expected.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.slow
def test_tokens_read_as_they_stand_in_a_text():
    def tokens(name):
        pipeline = pipeline_of(name)
        return pipeline.attention(*["the cat sat"] * len(pipeline._inputs))[0]

    assert tokens("generator") == ["the", " cat", " sat"]
    assert "".join(tokens("translator")) == " the cat sat</s>"
    assert tokens("answerer") == ["[CLS]", *(["the", "cat", "sat", "[SEP]"] * 2)]
    with pytest.raises(TypeError, match="bytes, not str"):
        pipeline_of("generator").attention(b"the cat")


def test_long_texts_are_cut_as_the_model_would_and_no_answer_grows_too_large():
    generator = TextGenerator(tiny_model(context_length=150), tiny_tokenizer(), 6)
    text = f"漢{'x' * 200}end"
    assert generator.attention(text)[0] == list("x" * (MAX_TOKENS - 3) + "end")
    assert len(TextGenerator(tiny_model(context_length=20), tiny_tokenizer(), 6).attention(text)[0]) == 14

    model, tokenizer = tiny_encoders.task_model("embeddings"), tiny_encoders.tiny_tokenizer()
    tokens, _ = TextEmbedder(model, tokenizer, max_length=7).attention("the cat " * 20)
    assert tokens == ["[CLS]", *["the", "cat"] * 2, "the", "[SEP]"]
    filler = MaskFiller(tiny_encoders.tiny_encoder(context_length=100), tokenizer)
    assert filler.attention("the cat " * 50)[0] == ["[CLS]", *["the", "cat"] * (MAX_TOKENS // 2 - 1), "[SEP]"]


@pytest.mark.slow
def test_long_texts_of_an_encoder_decoder_are_cut_before_the_end_token():
    model, tokenizer = tiny_text_to_text.tiny_t5(), tiny_text_to_text.tiny_tokenizer()
    for max_length, size in ((9, 9), (500, MAX_TOKENS)):
        translator = TextToText(model, tokenizer, 6, max_length=max_length)
        tokens, attention = translator.attention("the cat sat on the mat " * 20)
        assert (len(tokens), attention.shape[-1]) == (size, size)
        assert [tokens[0].strip()[0], tokens[-1]] == ["t", "</s>"]
