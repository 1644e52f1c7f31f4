"""T5's own config, sizes, packing, training and decoding; what it shares with the others is in the other modules."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from lmzoo.generation import BeamOptions
from lmzoo.models import Seq2SeqLM, find_preset
from lmzoo.models.t5 import MT5Config, MT5Model, T5Config, T5Model

TESTED = ("t5",)
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
NEW = 6
# The counts that were published, or that transformers gives for the published shapes; an untied head counts.
PUBLISHED = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "byt5-small": 299_637_760,
    "byt5-base": 581_653_248,
    "byt5-large": 1_228_183_552,
    "byt5-xl": 3_737_801_728,
    "byt5-xxl": 12_906_899_328,
}


def random_ids(model, *shape, seed=0):
    return np.random.default_rng(seed).integers(2, model.config.vocab_size, shape).astype("int32")


def alone(model, source, target):
    """Logits [U, V] of one target, with nothing beside it or its source."""
    inputs = {"token_ids": np.asarray(source)[None], "decoder_token_ids": np.asarray(target)[None]}
    return np.asarray(model(inputs))[0]


# -- The config.


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_presets_have_the_published_size(name, count):
    _, config = find_preset(name)
    assert config.count_params() == count


def test_every_preset_has_a_published_size():
    assert set(PUBLISHED) == {*T5Config.PRESETS, *MT5Config.PRESETS}


@pytest.mark.parametrize("name", ["t5-11b", "t5-v1.1-small", "flan-t5-xl", "mt5-base", "byt5-large"])
def test_the_first_generation_alone_has_a_tied_and_scaled_head(name):
    _, config = find_preset(name)
    assert config.tied_head == config.scaled_head == (not config.gated) == (name == "t5-11b")


@st.composite
def configs(draw):
    config_class = draw(st.sampled_from([T5Config, MT5Config]))
    num_layers, num_buckets = draw(st.integers(1, 4)), draw(st.sampled_from([4, 8, 32]))
    activation, gated = draw(
        st.sampled_from(
            [("relu", False), ("gelu", False), ("gelu_tanh", False), ("gelu_tanh", True), ("silu", True)],
        )
    )
    return config_class(
        vocab_size=draw(st.integers(4, 99)),
        context_length=draw(st.integers(1, 99)),
        eos_token_id=draw(st.none() | st.integers(0, 3)),
        pad_token_id=draw(st.integers(0, 3)),
        num_layers=num_layers,
        num_decoder_layers=draw(st.none() | st.integers(1, 4).filter(lambda number: number != num_layers)),
        num_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 9)),
        model_dim=draw(st.integers(1, 9)),
        feedforward_dim=draw(st.integers(1, 40)),
        num_buckets=num_buckets,
        max_distance=draw(st.integers(num_buckets // 2 + 1, 200)),
        dropout_rate=draw(st.sampled_from([0.0, 0.1])),
        norm_epsilon=draw(st.sampled_from([1e-6, 1e-5])),
        activation=activation,
        gated=gated,
        tied_head=draw(st.booleans()),
        scaled_head=config_class is T5Config and draw(st.booleans()),
        start_token_id=draw(st.integers(0, 3)),
    )


@given(configs())
def test_hugging_face_round_trip(config):
    assert type(config).from_hugging_face(json.loads(json.dumps(config.to_hugging_face()))) == config


def test_what_old_files_leave_unsaid():
    published = {"model_type": "t5", "decoder_start_token_id": None, "pad_token_id": 3, "n_positions": 512}
    config = T5Config.from_hugging_face(published)
    assert (config.tied_head, config.scaled_head, config.start_token_id) == (True, True, 3)
    config = T5Config.from_hugging_face({"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"})
    assert (config.tied_head, config.scaled_head, config.activation, config.gated) == (False, False, "gelu_tanh", True)
    assert not MT5Config.from_hugging_face({"tie_word_embeddings": True}).scaled_head


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (T5Config, {"num_buckets": 5}, "num_buckets is 5, but must be an even number"),
        (T5Config, {"num_buckets": 2}, "num_buckets is 2, but must be an even number of 4"),
        (T5Config, {"max_distance": 16}, "max_distance is 16, but must be more than half of num_buckets, which is 32"),
        (T5Config, {"activation": "relu", "gated": True}, "with gated=True must be one of gelu_tanh, silu"),
        (T5Config, {"activation": "tanh"}, "with gated=False must be one of gelu, gelu_tanh, relu"),
        (T5Config, {"num_decoder_layers": 0}, "num_decoder_layers is 0"),
        (T5Config, {"start_token_id": 40_000}, "start_token_id is 40000"),
        (MT5Config, {"scaled_head": True}, "scaled_head is True, but must be False"),
    ],
)
def test_bad_fields_are_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="feed_forward_proj is 'gated-relu', but T5Config has only relu, gated-gelu"):
        T5Config.from_hugging_face({"feed_forward_proj": "gated-relu"})


def test_flops():
    """6 a weight that multiplies the token: all of them but the input table, the norms and the positions."""
    config = T5Config.preset("t5-base")
    width, heads = config.model_dim, config.num_heads * config.head_dim
    weights = config.count_params() - (2 * 12 + 3 * 12 + 2) * width - 2 * 32 * 12
    # With as many tokens on both sides, each weight multiplies half of them, but for keys and values of the source.
    expected = 6 * weights / 2 + 12 * heads * 12 * (512 + 2 * 512) / 2
    assert config.training_flops_per_token(512) == pytest.approx(expected)
    long, short = (config.training_flops_per_token(512, target) * (512 + target) for target in (512, 114))
    assert long > 1.4 * short


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.1])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_what_blocks_keep_is_what_their_backward_pass_reads(dtype, dropout_rate, activation):
    """Of both stacks, with a source and a target of different lengths, by the graph of a step."""
    rows, source, target, size = 3, 40, 17, 4 if dtype == "float32" else 2
    fields = {"num_heads": 5, "head_dim": 7, "model_dim": 32, "feedforward_dim": 111, "vocab_size": 97}
    gated = activation != "relu"
    kinds = {"activation": activation, "gated": gated, "dropout_rate": dropout_rate}
    read, planned = [], []
    for encoder, decoder in ((1, 1), (2, 1), (1, 2)):
        shape = T5Config(**fields, **kinds, num_layers=encoder, num_decoder_layers=decoder)
        read.append(_read_backward(T5Model(shape, dtype=dtype), rows, source, target))
        made = shape.activation_bytes(rows, source, size, target_length=target)
        planned.append(made.block * made.num_blocks)
    for number in (1, 2):
        assert read[number] - read[0] == pytest.approx(planned[number] - planned[0], abs=8)


def _read_backward(model, rows, source, target):
    """Bytes of what the backward pass reads of the forward pass, without casts of weights and numbers a token."""
    model.compile()
    boundary = []

    @tf.function(autograph=False)
    def step(token_ids, labels):
        with tf.GradientTape() as tape:
            total, weight = model.compute_sums({"token_ids": token_ids}, labels, None, True)["loss"]
            loss = total / weight
        boundary.append(len(tf.compat.v1.get_default_graph().get_operations()))
        return tape.gradient(loss, [variable.value for variable in model.trainable_variables])

    specs = [tf.TensorSpec([rows, length], tf.int32) for length in (source, target)]
    operations = step.get_concrete_function(*specs).graph.get_operations()
    forward = {operation.name for operation in operations[: boundary[0]]}
    buffers = {}
    for operation in operations[boundary[0] :]:
        for tensor in operation.inputs:
            fused = operation.type == "BatchMatMulV2"  # It takes keys as they are, not transposed.
            while tensor.op.type in ("Reshape", "Identity", "ExpandDims", "Unpack") or (
                fused and tensor.op.type == "Transpose" and tensor.op.inputs[0].op.type == "Unpack"
            ):
                tensor = tensor.op.inputs[0]
            made = tensor.op.type not in ("Const", "ReadVariableOp", "Placeholder", "Shape", "Rsqrt")
            if made and operation.type != "Shape" and tensor.op.name in forward and tensor.shape.rank > 2:
                buffers[tensor.name] = tensor.shape.num_elements() * tensor.dtype.size
    return sum(buffers.values())


# -- The forward pass.


def test_shape_and_type_of_logits(model):
    inputs = {"token_ids": random_ids(model, 3, 7), "decoder_token_ids": random_ids(model, 3, 5)}
    logits = model(inputs)
    assert isinstance(model, Seq2SeqLM)
    assert logits.shape == (3, 5, model.config.vocab_size)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    np.testing.assert_allclose(model.logits(model.features(inputs)), logits, **TOLERANCE)


def test_texts_may_be_longer_than_the_context(model):
    length = 2 * model.config.context_length
    inputs = {"token_ids": random_ids(model, 1, length), "decoder_token_ids": random_ids(model, 1, length)}
    assert np.isfinite(model(inputs)).all()
    assert model.generate(inputs["token_ids"], max_new_tokens=length, temperature=0.0).shape == (1, length)


@settings(max_examples=8)
@given(data=st.data())
def test_a_token_of_the_target_sees_those_before_it_and_all_of_the_source(model, data):
    source, target = random_ids(model, 9), random_ids(model, 8, seed=1)
    expected = alone(model, source, target)
    place = data.draw(st.integers(1, 7))
    changed = target.copy()
    changed[place:] = (changed[place:] + data.draw(st.integers(1, 50))) % 61
    logits = alone(model, source, changed)
    np.testing.assert_allclose(logits[:place], expected[:place], **TOLERANCE)
    assert np.abs(logits[place:] - expected[place:]).max() > 1e-3
    changed = source.copy()
    changed[data.draw(st.integers(0, 8))] += 1
    assert np.abs(alone(model, changed % 61, target) - expected).max(axis=-1).min() > 1e-5


@settings(max_examples=8)
@given(left=st.integers(0, 5), right=st.integers(0, 5), seed=st.integers(0, 99))
def test_padding_of_the_source_changes_nothing(model, left, right, seed):
    source, target, filler = (random_ids(model, size, seed=seed + size) for size in (6, 4, 10))
    ids = np.concatenate([filler[:left], source, filler[left : left + right]])
    mask = np.zeros(len(ids), bool)
    mask[left : left + 6] = True
    inputs = {"token_ids": ids[None], "padding_mask": mask[None], "decoder_token_ids": target[None]}
    np.testing.assert_allclose(np.asarray(model(inputs))[0], alone(model, source, target), **TOLERANCE)
    no_source = {**inputs, "padding_mask": np.zeros_like(mask)[None]}
    assert np.isfinite(model(no_source)).all()


def pack(pairs, source_length, target_length, filler):
    """Pairs of texts in one row each of sources and targets; `filler` stands in the padding."""
    row = {}
    for place, (name, length) in enumerate((("", source_length), ("decoder_", target_length))):
        texts = [pair[place] for pair in pairs]
        joined = np.concatenate(texts)
        numbers = np.concatenate([np.full(len(text), number) for number, text in enumerate(texts, 1)])
        row[f"{name}token_ids"] = np.concatenate([joined, filler[: length - len(joined)]])[None]
        row[f"{name}segment_ids"] = np.pad(numbers, (0, length - len(joined)))[None].astype("int32")
    return row


@settings(max_examples=10)
@given(data=st.data())
def test_packed_pairs_are_as_if_each_stood_alone(model, data):
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 6)), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**31))
    pairs = [
        tuple(random_ids(model, size, seed=seed + 9 * number + place) for place, size in enumerate(pair))
        for number, pair in enumerate(sizes)
    ]
    lengths = [sum(size[place] for size in sizes) + data.draw(st.integers(0, 3)) for place in (0, 1)]
    inputs = pack(pairs, *lengths, random_ids(model, 9, seed=seed))
    logits = np.asarray(model(inputs))[0]
    assert np.isfinite(logits).all()
    start = 0
    for source, target in pairs:
        np.testing.assert_allclose(logits[start : start + len(target)], alone(model, source, target), **TOLERANCE)
        start += len(target)


def test_inputs_that_are_not_whole_are_refused(model):
    ids = random_ids(model, 2, 4)
    with pytest.raises(ValueError, match="inputs are one tensor, but must be a dict with token_ids and decoder_token"):
        model(ids)
    with pytest.raises(ValueError, match="inputs are padding_mask, token_ids, but must be"):
        model({"token_ids": ids, "padding_mask": ids > 0})
    with pytest.raises(ValueError, match="packed rows need both segment_ids and decoder_segment_ids"):
        model({"token_ids": ids, "decoder_token_ids": ids, "segment_ids": ids})
    model.compile()
    with pytest.raises(ValueError, match="there are no labels"):
        model.compute_sums({"token_ids": ids}, None, None, training=True)
    with pytest.raises(ValueError, match="packed rows have a start in each document: give decoder_token_ids"):
        model.compute_sums({"token_ids": ids, "segment_ids": ids}, ids, None, training=True)
    with pytest.raises(ValueError, match="output_head is False, but a T5Model is no encoder alone"):
        T5Model(model.config, output_head=False)


def test_dropout_is_for_training_only(make_model):
    model = make_model(dropout_rate=0.5)
    inputs = {"token_ids": random_ids(model, 2, 6), "decoder_token_ids": random_ids(model, 2, 5)}
    twin = T5Model(model.config.replace(dropout_rate=0.0))
    twin.set_weights(model.get_weights())
    exact = np.asarray(twin(inputs))
    np.testing.assert_array_equal(model(inputs), exact)
    np.testing.assert_array_equal(model(inputs, training=False), exact)
    one, other = (np.asarray(model(inputs, training=True)) for _ in range(2))
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize("gated", [False, True])
def test_twelve_layers_in_bfloat16(gated):
    """Finite, and within 2% of float32."""
    config = {"num_layers": 12, "num_heads": 4, "model_dim": 64, "head_dim": 16, "feedforward_dim": 128}
    if gated:
        config |= {"activation": "gelu_tanh", "gated": True, "tied_head": False, "scaled_head": False}
    keras.utils.set_random_seed(0)
    exact = T5Model(T5Config(vocab_size=211, **config))
    inputs = {"token_ids": random_ids(exact, 2, 40), "decoder_token_ids": random_ids(exact, 2, 30, seed=1)}
    expected = np.asarray(exact(inputs))
    half = T5Model(exact.config, dtype="mixed_bfloat16")
    half.set_weights(exact.get_weights())
    logits = np.asarray(half(inputs))
    assert np.isfinite(logits).all()
    assert 1e-5 < np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.02


# -- Training.


def make_data(model, rows=10, source=9, target=6, seed=0):
    random = np.random.default_rng(seed)
    weights = random.random((rows, target)) * random.integers(0, 2, (rows, target))
    lengths = random.integers(1, source + 1, rows)
    inputs = {
        "token_ids": random_ids(model, rows, source, seed=seed),
        "padding_mask": np.arange(source) < lengths[:, None],
    }
    return inputs, random_ids(model, rows, target, seed=seed + 1), weights.astype("float32")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_equals_numpy(make_model, smoothing):
    """The decoder reads the start token and all labels but the last, whether they are given so or not."""
    model = make_model(start_token_id=5)
    model.compile(label_smoothing=smoothing, z_loss=smoothing / 10)
    inputs, labels, weights = make_data(model)
    read = np.concatenate([np.full_like(labels[:, :1], 5), labels[:, :-1]], axis=1)
    logits = np.asarray(model({**inputs, "decoder_token_ids": read}), "float64")
    log_z = np.log(np.exp(logits).sum(-1))
    at_label = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    losses = log_z - (1 - smoothing) * at_label - smoothing * logits.mean(-1) + smoothing / 10 * log_z**2
    for given_inputs in (inputs, {**inputs, "decoder_token_ids": read}):
        logs = model.evaluate(given_inputs, labels, sample_weight=weights, batch_size=4, return_dict=True, verbose=0)
        assert logs["loss"] == pytest.approx((weights * losses).sum() / weights.sum(), rel=1e-5)
        accuracy = (weights * (logits.argmax(-1) == labels)).sum() / weights.sum()
        assert logs["accuracy"] == pytest.approx(accuracy, rel=1e-5)


@pytest.mark.slow
def test_it_learns_to_copy_a_small_batch(make_model):
    model = make_model(num_decoder_layers=2)
    model.compile(keras.optimizers.Adam(1e-2))
    source = random_ids(model, 4, 5)
    labels = np.concatenate([source, np.ones_like(source[:, :1])], axis=1)
    dataset = tf.data.Dataset.from_tensors(({"token_ids": source}, labels)).repeat(60)
    losses = model.fit(dataset, epochs=2, verbose=0).history["loss"]
    assert losses[0] > 0.3
    logs = model.evaluate({"token_ids": source}, labels, return_dict=True, verbose=0)
    assert logs["accuracy"] == 1.0
    answers = model.generate(source, max_new_tokens=8, temperature=0.0)
    np.testing.assert_array_equal(answers, np.pad(labels, ((0, 0), (0, 2))))


@pytest.mark.slow
def test_micro_batches_change_nothing(make_model):
    results = []
    for micro_batches in (1, 2):
        model = make_model()
        model.compile(keras.optimizers.SGD(0.1), micro_batches=micro_batches)
        inputs, labels, weights = make_data(model, rows=8)
        model.train_on_batch(inputs, labels, weights)
        results.append([keras.ops.convert_to_numpy(each) for each in model.trainable_variables])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# -- Decoding.


@pytest.fixture(scope="module")
def greedy(model):
    """greedy(source): the most likely token after a pass over all, again and again, until the end token."""
    run = tf.function(model, autograph=False, reduce_retracing=True)

    def answer(source):
        read = [model.config.start_token_id]
        while len(read) <= NEW and read[-1] != model.config.eos_token_id:
            ids = (np.asarray(each, "int32")[None] for each in (source, read))
            logits = run(dict(zip(("token_ids", "decoder_token_ids"), ids, strict=True)))
            read.append(int(logits.numpy()[0, -1].argmax()))
        return read[1:] + [model.config.pad_token_id] * (NEW + 1 - len(read))

    return answer


def random_sources(model, lengths, seed=0):
    return [random_ids(model, length, seed=seed + length).tolist() for length in lengths]


def test_greedy_equals_argmax_over_the_full_pass(model, greedy):
    sources = random_sources(model, [1, 5, 2, 30, 9], seed=3)
    expected = [greedy(source) for source in sources]
    assert len({tuple(row) for row in expected}) > 2
    np.testing.assert_array_equal(model.generate(sources, max_new_tokens=NEW, temperature=0.0), expected)


@pytest.mark.slow
def test_all_forms_of_sources_give_the_same(model):
    sources = random_sources(model, [2, 7, 4])
    expected = np.asarray(model.generate(sources, max_new_tokens=NEW, temperature=0.0))
    ids, mask = np.full((3, 9), 7, "int32"), np.zeros((3, 9), bool)
    for row, source in enumerate(sources):
        ids[row, 9 - len(source) :], mask[row, 9 - len(source) :] = source, True
    for form in (tf.ragged.constant(sources, dtype=tf.int32), {"token_ids": ids, "padding_mask": mask}):
        np.testing.assert_array_equal(model.generate(form, max_new_tokens=NEW, temperature=0.0), expected)
    steps = list(model.stream(sources, max_new_tokens=NEW, temperature=0.0))
    np.testing.assert_array_equal(np.stack([step.token_ids for step in steps], axis=1), expected[:, : len(steps)])
    end = model.config.eos_token_id
    empty, ended = (model.generate([each], max_new_tokens=NEW, temperature=0.0) for each in ([], [end]))
    np.testing.assert_array_equal(empty, ended)


def test_a_row_draws_the_same_alone_and_in_a_batch(model):
    sources, seeds = random_sources(model, [3, 8, 1]), [11, 12, 2**40]
    options = {"max_new_tokens": NEW, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
    together = np.asarray(model.generate(sources, seed=seeds, **options))
    assert len({tuple(row) for row in together}) == 3
    for row, (source, seed) in enumerate(zip(sources, seeds, strict=True)):
        np.testing.assert_array_equal(model.generate([source], seed=seed, **options)[0], together[row])
    steps = list(model.stream(sources, seed=seeds, **options))
    np.testing.assert_array_equal(np.stack([step.token_ids for step in steps], axis=1), together[:, : len(steps)])


def test_rules_count_what_the_decoder_has_read(model):
    """The start token is one that the text has already, as in transformers; the source is not."""
    sources = random_sources(model, [4, 6])
    free = np.asarray(model.generate(sources, max_new_tokens=NEW, temperature=0.0))
    forced = np.asarray(model.generate(sources, max_new_tokens=NEW, temperature=0.0, forced_bos_token_id=9))
    assert (free[:, 0] != 9).any()
    assert (forced[:, 0] == 9).all()
    once = np.asarray(model.generate(sources, max_new_tokens=NEW, temperature=0.0, no_repeat_ngram_size=1))
    for row in once:
        row = row[row > 1].tolist()
        assert len(set(row)) == len(row)
    assert 0 not in once[:, 0]


def test_the_encoder_runs_once(make_model, monkeypatch):
    model, runs = make_model(), []
    encode = T5Model.encode
    monkeypatch.setattr(
        T5Model, "encode", lambda self, *args, **kwargs: runs.append(1) or encode(self, *args, **kwargs)
    )
    model.generate(random_sources(model, [4]), max_new_tokens=NEW)
    assert len(runs) == 1


def test_beams_share_what_the_encoder_read(model):
    """The cache has the sources once, and the targets of all beams; the best texts come first."""
    sources = random_sources(model, [4, 7, 2])
    result = model.beam_search(sources, max_new_tokens=NEW, num_beams=3, num_return_sequences=2)
    assert result.token_ids.shape == (3, 2, NEW)
    assert (result.scores[:, 0] >= result.scores[:, 1]).numpy().all()
    options = {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2}
    np.testing.assert_array_equal(model.generate(sources, **options), np.reshape(result.token_ids, (6, NEW)))
    one, other = (
        model.beam_search([source], num_return_sequences=2, num_beams=3, max_new_tokens=NEW) for source in sources[:2]
    )
    np.testing.assert_array_equal(np.concatenate([one.token_ids, other.token_ids]), result.token_ids[:2])
    cache = model.reorder_cache(model.init_cache(model.pad_sources(sources), NEW), tf.repeat(tf.range(3), 4))
    assert (cache.tokens.keys[0].shape[0], cache.keys[0].shape[0], cache.bias.shape[0]) == (12, 3, 3)


def score_of(model, source, tokens):
    """Sum of the log-probabilities of `tokens` by a pass over all of them."""
    inputs = [np.asarray([each], "int32") for each in (source, [model.config.start_token_id, *tokens[:-1]])]
    logits = model(dict(zip(("token_ids", "decoder_token_ids"), inputs, strict=True)))[0]
    return float(tf.reduce_sum(tf.gather(tf.nn.log_softmax(logits), tokens, axis=1, batch_dims=1)))


@settings(max_examples=6)
@given(seed=st.integers(0, 2**31))
def test_scores_of_beams_are_those_of_a_full_pass(model, seed):
    """Whatever beams have been reordered on the way."""
    (source,) = random_sources(model, [6], seed=seed % 2**20)
    result = model.beam_search([source], max_new_tokens=NEW, num_beams=4, num_return_sequences=4, length_penalty=0.6)
    for tokens, length, score in zip(*(np.asarray(each[0]) for each in (result[0], result[1], result[3])), strict=True):
        assert score == pytest.approx(score_of(model, source, tokens[:length].tolist()) / length**0.6, abs=1e-4)


def exported(model):
    """A module that answers sources [B, T] with beams."""
    module = tf.Module()
    module.variables_used = [weight.value for weight in model.weights]
    module.run = tf.function(
        lambda token_ids, padding_mask: (
            model.beam_decoder(NEW, BeamOptions(num_beams=3, num_return_sequences=2))(
                *model.start_tokens(tf.shape(token_ids)[0]),
                source={"token_ids": token_ids, "padding_mask": padding_mask},
            ).token_ids
        ),
        input_signature=[tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None], tf.bool)],
        autograph=False,
    )
    return module


def test_an_exported_graph_answers_batches_of_all_shapes(model, tmp_path):
    tf.saved_model.save(exported(model), str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for lengths in ([4, 7, 2], [1], []):
        source = model.pad_sources(random_sources(model, lengths))
        expected = model.generate(source, max_new_tokens=NEW, num_beams=3, num_return_sequences=2)
        found = loaded.run(*(tf.constant(source[name]) for name in ("token_ids", "padding_mask")))
        np.testing.assert_array_equal(np.reshape(found, (-1, NEW)), expected)


@pytest.mark.slow
def test_beams_convert_to_tflite_builtins(model):
    source = model.pad_sources(random_sources(model, [4, 7, 2]))
    module = exported(model)
    specs = [tf.TensorSpec(source[name].shape, source[name].dtype) for name in ("token_ids", "padding_mask")]
    run = tf.function(module.run.python_function, input_signature=specs, autograph=False)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([run.get_concrete_function()], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    runner = tf.lite.Interpreter(model_content=converter.convert()).get_signature_runner()
    (found,) = runner(**source).values()
    expected = model.generate(source, max_new_tokens=NEW, num_beams=3, num_return_sequences=2)
    np.testing.assert_array_equal(np.reshape(found, (-1, NEW)), expected)


def test_several_texts_need_beams(model):
    with pytest.raises(ValueError, match="num_return_sequences=2 with num_beams=1: must be at most num_beams"):
        model.generate([[1]], num_return_sequences=2)
    with pytest.raises(ValueError, match=r"top_k=5: a beam search draws nothing"):
        model.generate([[1]], num_beams=2, top_k=5)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "mixed_float16", "float16"])
def test_half_precision(make_model, dtype):
    model, exact = make_model(dtype=dtype), make_model()
    sources = random_sources(model, [2, 5])
    assert model.generate(sources, max_new_tokens=NEW, temperature=0.0).shape == (2, NEW)
    inputs = {"token_ids": random_ids(model, 2, 6), "decoder_token_ids": random_ids(model, 2, 5)}
    expected = np.asarray(exact(inputs))
    assert np.linalg.norm(np.asarray(model(inputs)) - expected) / np.linalg.norm(expected) < 0.06


def test_mt5_is_a_t5_by_another_name(make_model):
    config = make_model().config.replace(scaled_head=False)
    model, twin = T5Model(config), MT5Model(MT5Config.from_dict(config.to_dict()))
    twin.set_weights(model.get_weights())
    inputs = {"token_ids": random_ids(model, 2, 6), "decoder_token_ids": random_ids(model, 2, 5)}
    np.testing.assert_array_equal(model(inputs), twin(inputs))
    assert twin.config.to_hugging_face()["architectures"] == ["MT5ForConditionalGeneration"]
