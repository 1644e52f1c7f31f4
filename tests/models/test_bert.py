"""BERT's own config, objectives and heads, and what RoBERTa and DistilBERT have in its place."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from lmzoo.models import find_preset
from lmzoo.models.bert import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

# The counts that were published, or that transformers gives: embeddings, blocks and BERT's pooler.
PUBLISHED = {
    "bert-tiny": 4_385_920,
    "bert-mini": 11_170_560,
    "bert-small": 28_763_648,
    "bert-medium": 41_373_184,
    "bert-base": 109_482_240,
    "bert-base-uncased": 109_482_240,
    "bert-base-cased": 108_310_272,
    "bert-large": 335_141_888,
    "bert-large-uncased": 335_141_888,
    "bert-large-cased": 333_579_264,
    "bert_uncased_L-12_H-768_A-12": 109_482_240,
    "roberta-base": 124_055_040,
    "roberta-large": 354_310_144,
    "distilbert-base": 66_362_880,
    "distilbert-base-uncased": 66_362_880,
    "distilbert-base-cased": 65_190_912,
}
KINDS = {BertConfig: BertModel, RobertaConfig: RobertaModel, DistilBertConfig: DistilBertModel}
SHAPE = {
    "vocab_size": 40,
    "context_length": 16,
    "num_layers": 2,
    "num_heads": 2,
    "model_dim": 16,
    "feedforward_dim": 20,
    "dropout_rate": 0.0,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_presets_have_the_published_size(name, count):
    _, config = find_preset(name)
    assert config.count_params() == count


def test_the_small_models_are_all_there():
    names = {
        f"bert_uncased_L-{layers}_H-{width}_A-{width // 64}"
        for layers in range(2, 13, 2)
        for width in (128, 256, 512, 768)
    }
    assert len(names) == 24
    assert names <= set(BertConfig.PRESETS)
    for name in names:
        config = BertConfig.preset(name)
        assert name == f"bert_uncased_L-{config.num_layers}_H-{config.model_dim}_A-{config.num_heads}"
        assert (config.inner_dim, config.model_dim // config.num_heads) == (4 * config.model_dim, 64)


@st.composite
def configs(draw):
    config_class = draw(st.sampled_from(list(KINDS)))
    num_heads, vocab_size = draw(st.integers(1, 4)), draw(st.integers(8, 97))
    options = {}
    if config_class is not DistilBertConfig:
        options["norm_epsilon"] = draw(st.sampled_from([1e-12, 1e-5]))
        options["num_token_types"] = draw(st.integers(1, 3))
    if config_class is BertConfig:
        options["pooler"] = draw(st.booleans())
    return config_class(
        vocab_size=vocab_size,
        context_length=draw(st.integers(2, 24)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=num_heads,
        model_dim=num_heads * draw(st.integers(1, 8)),
        feedforward_dim=draw(st.integers(1, 40)),
        dropout_rate=draw(st.sampled_from([0.0, 0.1])),
        activation=draw(st.sampled_from(["gelu_tanh", "gelu", "relu", "silu", "tanh"])),
        pad_token_id=draw(st.integers(0, vocab_size - 1)),
        eos_token_id=draw(st.none() | st.integers(0, vocab_size - 1)),
        **options,
    )


@given(configs())
def test_hugging_face_round_trip(config):
    assert type(config).from_hugging_face(json.loads(json.dumps(config.to_hugging_face()))) == config


@pytest.mark.parametrize("config_class", KINDS)
@pytest.mark.parametrize("options", [{}, {"pooler": False, "num_token_types": 1}])
def test_the_count_is_that_of_the_weights(config_class, options):
    config = config_class(**{**SHAPE, **(options if config_class is BertConfig else {})})
    assert KINDS[config_class](config).count_params() == config.count_params() + config.head_params


@pytest.mark.parametrize("config_class", KINDS)
def test_an_empty_config_is_the_base_model(config_class):
    assert config_class.from_hugging_face({}).count_params() == pytest.approx(config_class().count_params(), abs=1600)


@pytest.mark.parametrize(
    ("config_class", "field", "value", "rule"),
    [
        (BertConfig, "num_token_types", 0, "an integer of 1 or more"),
        (BertConfig, "pooler", 1, "must be True or False"),
        (RobertaConfig, "pooler", True, "must be False"),
        (RobertaConfig, "pad_token_id", None, "must be a token id"),
        (DistilBertConfig, "num_token_types", 2, "must be 0"),
        (DistilBertConfig, "pooler", True, "must be False"),
        (DistilBertConfig, "norm_epsilon", 1e-5, "must be 1e-12"),
        (BertConfig, "num_heads", 7, "must divide model_dim, which is 16"),
    ],
)
def test_an_error_names_field_value_and_rule(config_class, field, value, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        config_class(**{**SHAPE, field: value})
    assert str(caught.value).startswith(f"{config_class.__name__}.{field} is {value!r}, but ")


@pytest.mark.parametrize(
    ("name", "value"), [("position_embedding_type", "relative_key"), ("is_decoder", True), ("hidden_act", "mish")]
)
def test_what_bert_never_had_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but BertModel has only"):
        BertConfig.from_hugging_face({name: value})


def test_flops_count_the_head_for_hidden_tokens_only():
    config = BertConfig.preset("bert-base")
    blocks, head = 12 * config.count_block_params(), 768 * (768 + 30_522)
    assert config.training_flops_per_token(0) == pytest.approx(6 * (blocks + 0.15 * head))
    assert config.training_flops_per_token(128) - config.training_flops_per_token(0) == 12 * 12 * 768 * 128
    assert config.activation_bytes(2, 128, 4).head_tokens == 2 * 20


def test_weights_start_as_bert_says():
    """Normal of 0.02, cut at two deviations; norms at one, biases at zero."""
    keras.utils.set_random_seed(0)
    model = BertModel(BertConfig(**{**SHAPE, "vocab_size": 500, "model_dim": 64, "context_length": 200}))
    for name, variable in model.checkpoint_variables().items():
        values = np.asarray(variable)
        if name.endswith("bias"):
            assert not values.any(), name
        elif "LayerNorm" in name:
            assert (values == 1).all(), name
        else:
            assert np.abs(values).max() <= 0.04, name
            if values.size > 2000:
                assert values.std() == pytest.approx(0.02 * 0.88, rel=0.05), name
    firsts = [np.asarray(variable).ravel()[:32] for variable in model.trainable_variables if len(variable.shape) == 2]
    for number, values in enumerate(firsts):  # No two weights begin with the same numbers.
        assert all(np.abs(values - other).max() > 1e-3 for other in firsts[:number])


@pytest.fixture(scope="module")
def bert():
    return made(BertModel, BertConfig)


def made(model_class, config_class, **options):
    """A model whose every weight matters."""
    keras.utils.set_random_seed(0)
    model = model_class(config_class(**{**SHAPE, **options}))
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(random.normal(0.0, 0.25, variable.shape))
    return model


def make_batch(rows=4, length=10, hidden=3, seed=0):
    random = np.random.default_rng(seed)
    places = np.sort(np.stack([random.choice(length, hidden, replace=False) for _ in range(rows)]), axis=1)
    inputs = {
        "token_ids": random.integers(0, 40, (rows, length)).astype("int32"),
        "token_type_ids": np.sort(random.integers(0, 2, (rows, length)), axis=1).astype("int32"),
        "mask_positions": places.astype("int32"),
    }
    labels = random.integers(0, 40, (rows, hidden)).astype("int32")
    weights = random.integers(0, 2, (rows, hidden)).astype("float32")
    weights[:, 0] = 1
    return inputs, labels, weights, random.integers(0, 2, rows).astype("int32")


def test_hidden_tokens_get_the_scores_that_they_have_among_all(bert):
    inputs, _, _, _ = make_batch()
    places = inputs["mask_positions"]
    everywhere = np.asarray(bert({name: inputs[name] for name in ("token_ids", "token_type_ids")}))
    actual = bert(inputs)
    assert actual.shape == (4, 3, 40)
    np.testing.assert_allclose(actual, everywhere[np.arange(4)[:, None], places], rtol=1e-4, atol=2e-5)


def test_only_hidden_tokens_go_through_the_head(bert, monkeypatch):
    seen = []
    monkeypatch.setattr(bert, "_transformed", lambda hidden: seen.append(hidden.shape) or hidden)
    inputs, labels, weights, _ = make_batch()
    bert(inputs)
    bert.compute_sums(inputs, labels, weights, training=True)
    assert seen == [(4, 3, 16), (4, 3, 16)]


def test_hidden_states_are_those_of_all_layers(bert):
    inputs, _, _, _ = make_batch()
    states = bert.hidden_states(inputs)
    assert [state.shape for state in states] == [(4, 10, 16)] * 3
    np.testing.assert_array_equal(states[-1], bert.features(inputs))
    np.testing.assert_allclose(bert.blocks[0](states[0]), states[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        bert.pooled(states[-1]),
        np.tanh(bert.pooler.kernel.numpy().T @ states[-1].numpy()[:, 0].T + bert.pooler.bias.numpy()[:, None]).T,
        rtol=1e-4,
        atol=1e-5,
    )


def test_token_types_count_where_the_model_has_several(bert):
    inputs, _, _, _ = make_batch()
    other = {**inputs, "token_type_ids": 1 - inputs["token_type_ids"]}
    without = {name: inputs[name] for name in ("token_ids", "mask_positions")}
    zeros = {**inputs, "token_type_ids": np.zeros_like(inputs["token_type_ids"])}
    assert np.abs(np.asarray(bert(inputs)) - bert(other)).max() > 1e-2
    np.testing.assert_array_equal(bert(without), bert(zeros))
    for model in (made(RobertaModel, RobertaConfig), made(DistilBertModel, DistilBertConfig)):
        np.testing.assert_array_equal(model(inputs), model(other))


def test_positions_of_roberta_begin_after_padding():
    model = made(RobertaModel, RobertaConfig, pad_token_id=4)
    assert model.position_embedding.embeddings.shape == (16 + 5, 16)
    before = np.asarray(model(np.ones((1, 16), "int32")))
    model.position_embedding.embeddings.assign(
        np.concatenate([np.full((5, 16), np.nan), model.position_embedding.embeddings.numpy()[5:]])
    )
    np.testing.assert_array_equal(model(np.ones((1, 16), "int32")), before)


def expected_logs(model, inputs, labels, weights, answers):
    """In numpy, from the model's own scores; a row counts in the sentence loss by its weights."""
    log_p = np.asarray(tf.nn.log_softmax(model(inputs)))
    losses = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    masked = (weights * losses).sum() / weights.sum()
    logits = np.asarray(model.next_sentence_logits(model.features(inputs)))
    row_losses = -np.asarray(tf.nn.log_softmax(logits))[np.arange(len(answers)), answers]
    by_row = weights.sum(1) / weights.sum()
    sentence = (by_row * row_losses).sum()
    return {
        "loss": masked + sentence,
        "masked_lm_loss": masked,
        "perplexity": np.exp(masked),
        "accuracy": (weights * (log_p.argmax(-1) == labels)).sum() / weights.sum(),
        "next_sentence_loss": sentence,
        "next_sentence_accuracy": (by_row * (logits.argmax(-1) == answers)).sum(),
    }


def test_sentence_labels_add_a_second_loss():
    """Over batches of 3 and 1 rows, whose weights differ. Without such labels, nothing of it is reported."""
    model = made(BertModel, BertConfig)
    model.compile()
    inputs, labels, weights, answers = make_batch()
    expected = expected_logs(model, inputs, labels, weights, answers)
    plain = model.evaluate(inputs, labels, sample_weight=weights, batch_size=3, return_dict=True, verbose=0)
    assert set(plain) == {"loss", "perplexity", "accuracy"}
    assert plain["loss"] == pytest.approx(expected["masked_lm_loss"], rel=1e-5)
    inputs["next_sentence_labels"] = answers
    logs = model.evaluate(inputs, labels, sample_weight=weights, batch_size=3, return_dict=True, verbose=0)
    assert logs == pytest.approx(expected, rel=1e-5)
    logs = model.train_on_batch(inputs, labels, weights, return_dict=True)
    assert set(logs) == {*expected, "gradient_norm"}


def test_the_parts_of_a_batch_add_up():
    """Both losses are sums over rows: two micro-batches, whose weights differ, give the step of the whole batch."""
    inputs, labels, weights, answers = make_batch()
    inputs["next_sentence_labels"] = answers
    weights[:2] = 1
    results = []
    for micro_batches in (1, 2):
        model = made(BertModel, BertConfig)
        model.compile(keras.optimizers.SGD(0.1), micro_batches=micro_batches)
        logs = model.train_on_batch(inputs, labels, weights, return_dict=True)
        results.append((logs, [variable.numpy() for variable in model.trainable_variables]))
    assert weights[:2].sum() != weights[2:].sum()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_sentence_labels_train_the_pooler_and_nothing_else_does(recwarn):
    inputs, labels, weights, answers = make_batch()
    for given_answers in (None, answers):
        model = made(BertModel, BertConfig)
        model.compile("sgd")
        before = [layer.kernel.numpy() for layer in (model.pooler, model.next_sentence)]
        extra = {} if given_answers is None else {"next_sentence_labels": given_answers}
        model.train_on_batch({**inputs, **extra}, labels, weights)
        for layer, kernel in zip((model.pooler, model.next_sentence), before, strict=True):
            assert (np.abs(layer.kernel.numpy() - kernel).max() > 0) == bool(extra)
    assert not [each for each in recwarn if "does not depend" in str(each.message)]


def test_both_objectives_are_learned():
    model = made(BertModel, BertConfig)
    model.compile(keras.optimizers.Adam(1e-2))
    inputs, labels, weights, answers = make_batch(rows=6)
    inputs["next_sentence_labels"] = answers
    dataset = tf.data.Dataset.from_tensors((inputs, labels, weights)).repeat(80)
    model.fit(dataset, verbose=0)
    logs = model.evaluate(dataset.take(1), return_dict=True, verbose=0)
    assert logs["masked_lm_loss"] < 0.1
    assert logs["next_sentence_loss"] < 0.1
    assert logs["next_sentence_accuracy"] == 1.0


def test_sentence_labels_need_a_pooler():
    inputs, labels, weights, answers = make_batch()
    inputs["next_sentence_labels"] = answers
    with pytest.raises(ValueError, match="this RobertaModel has no pooler"):
        made(RobertaModel, RobertaConfig).compute_sums(inputs, labels, weights, training=True)


def test_masked_lm_needs_labels(bert):
    inputs, _, _, _ = make_batch()
    with pytest.raises(ValueError, match="masked LM needs labels"):
        bert.compute_sums(inputs, None, None, training=True)


def test_hidden_tokens_of_packed_documents(bert):
    """What a document's hidden tokens get, and its gradient, do not depend on what is packed beside it."""
    random = np.random.default_rng(0)
    sizes = (5, 1, 7)
    documents = [random.integers(0, 40, size).astype("int32") for size in sizes]
    row = {
        "token_ids": np.concatenate([*documents, [0, 0]])[None],
        "segment_ids": np.repeat([1, 2, 3, 0], [*sizes, 2])[None],
        "positions": np.concatenate([*map(np.arange, sizes), [0, 0]])[None],
        "token_type_ids": np.concatenate([np.arange(size) % 2 for size in (*sizes, 2)])[None],
        "mask_positions": np.array([[1, 4, 5, 6, 12, 0]]),
    }
    row = {name: value.astype("int32") for name, value in row.items()}
    packed = np.asarray(bert(row))[0, :5]
    alone = []
    for document, places in zip(documents, ([1, 4], [0], [0, 6]), strict=True):
        inputs = {"token_ids": document[None], "mask_positions": np.array([places], "int32")}
        inputs["token_type_ids"] = (np.arange(len(document), dtype="int32") % 2)[None]
        alone.append(np.asarray(bert(inputs))[0])
    np.testing.assert_allclose(packed, np.concatenate(alone), rtol=1e-4, atol=2e-5)


def test_saved_with_its_objectives(tmp_path):
    model = made(BertModel, BertConfig)
    model.compile("sgd")
    inputs, labels, weights, answers = make_batch()
    inputs["next_sentence_labels"] = answers
    model.train_on_batch(inputs, labels, weights)
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    assert type(twin) is BertModel
    model.reset_metrics()
    expected = model.train_on_batch(inputs, labels, weights, return_dict=True)
    assert twin.train_on_batch(inputs, labels, weights, return_dict=True) == expected
