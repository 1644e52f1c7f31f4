"""The decoding loop around a hand-made step and a GPT: against whole texts, itself, its exports, and streamed."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmzoo.generation.decode import Decoder, decode
from lmzoo.generation.sampling import SamplingOptions
from lmzoo.models.gpt import GPTConfig, GPTModel

VOCAB_SIZE = 23
EOS = 22
PAD = 0
GREEDY = SamplingOptions(temperature=0)


class ToyModel:
    """Logits from the sum of rotated token vectors: depends on every token and on its position, with a small cache."""

    def __init__(self, dim=16, context_length=512):
        random = np.random.default_rng(3)
        self.table = random.normal(size=(VOCAB_SIZE, dim)).astype(np.float32)
        self.head = random.normal(size=(dim, VOCAB_SIZE)).astype(np.float32) * 2
        speeds = np.linspace(0.3, 2.5, dim)
        self.angles = np.cos(np.arange(context_length)[:, None] * speeds).astype(np.float32)

    def init_cache(self, batch_size, cache_length):
        # `slots` is what an attention cache has: room for every token read, and no more.
        return {
            "sum": tf.zeros([batch_size, self.table.shape[1]]),
            "count": tf.zeros([batch_size], tf.int32),
            "slots": tf.zeros([batch_size, cache_length]),
            "next": tf.constant(0),
        }

    def step(self, token_ids, cache, padding_mask):
        width = tf.shape(token_ids)[1]
        room = tf.debugging.assert_less_equal(cache["next"] + width, tf.shape(cache["slots"])[1])
        with tf.control_dependencies([room] if room is not None else []):
            positions = tf.expand_dims(cache["count"], -1) + tf.range(width)  # [B, T]
        positions = tf.where(padding_mask, positions, tf.minimum(positions, len(self.angles) - 1))
        vectors = tf.gather(self.table, token_ids) * tf.gather(self.angles, positions)  # [B, T, D]
        vectors = tf.where(tf.expand_dims(padding_mask, -1), vectors, 0.0)
        cache = {
            **cache,
            "sum": cache["sum"] + tf.reduce_sum(vectors, axis=1),
            "count": cache["count"] + tf.reduce_sum(tf.cast(padding_mask, tf.int32), axis=-1),
            "next": cache["next"] + width,
        }
        return tf.matmul(tf.math.sin(cache["sum"]), self.head), cache

    def logits(self, tokens):
        """The same in numpy, from the whole text."""
        tokens = np.asarray(tokens)
        return np.sin((self.table[tokens] * self.angles[: len(tokens)]).sum(axis=0)) @ self.head


MODEL = ToyModel()
PROMPTS = [[5, 3, 9], [7], [1, 2, 3, 4, 5, 6, 7], [21, 21], [10, 11, 12, 13]]


def padded(prompts, filler=-1):
    lengths = [len(prompt) for prompt in prompts]
    token_ids = np.full((len(prompts), max(lengths, default=0)), filler, np.int32)
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)] = prompt
    return tf.constant(token_ids), tf.constant(lengths, tf.int32)


def decoder(options=GREEDY, max_new_tokens=12, eos=EOS, **settings):
    return Decoder(
        MODEL.step,
        MODEL.init_cache,
        max_new_tokens=max_new_tokens,
        options=options,
        eos_token_id=eos,
        pad_token_id=PAD,
        **settings,
    )


def generate(prompts, options=GREEDY, *, seeds=None, limits=None, **settings):
    return decoder(options, **settings)(*padded(prompts), seeds=seeds, limits=limits)


def rows_of(result):
    """The new tokens of each row without the padding, which is checked."""
    token_ids, lengths = result.token_ids.numpy(), result.lengths.numpy()
    assert token_ids.dtype == np.int32
    for row, length in zip(token_ids, lengths, strict=True):
        assert (row[length:] == PAD).all()
    return [row[:length].tolist() for row, length in zip(token_ids, lengths, strict=True)]


def greedy_reference(prompt, max_new_tokens=12, eos=EOS, rule=lambda logits, text, new: logits):
    text, new = list(prompt), []
    while len(new) < max_new_tokens:
        new.append(int(np.argmax(rule(MODEL.logits(text), text, new))))
        text.append(new[-1])
        if new[-1] == eos:
            break
    return new


def test_greedy_is_the_argmax_over_the_whole_text_for_ragged_prompts():
    rows = rows_of(generate(PROMPTS))
    assert rows == [greedy_reference(prompt) for prompt in PROMPTS]
    assert len({tuple(row) for row in rows}) == len(rows), "the toy model must tell the prompts apart"


def ends_of(prompts, max_new_tokens=12):
    """A token that some greedy rows come to and others do not, to end rows with."""
    rows = [greedy_reference(prompt, max_new_tokens, eos=None) for prompt in prompts]
    for token in range(VOCAB_SIZE):
        ends = [row.index(token) if token in row else None for row in rows]
        if None in ends and len(set(ends)) >= 3:
            return token, ends
    raise AssertionError("no such token: change the toy model")


def test_rows_end_at_the_end_token_each_at_its_own_time():
    eos, ends = ends_of(PROMPTS)
    result = generate(PROMPTS, eos=eos)
    assert rows_of(result) == [greedy_reference(prompt, eos=eos) for prompt in PROMPTS]
    assert result.lengths.numpy().tolist() == [12 if end is None else end + 1 for end in ends]
    assert result.end_lengths.numpy().tolist() == [int(end is not None) for end in ends]


def test_any_of_several_end_tokens_ends_a_row():
    free = rows_of(generate([[5, 3, 9]], eos=None))[0]
    result = generate([[5, 3, 9]], eos=[EOS, free[4], free[2]])
    assert rows_of(result)[0] == free[:3]


def counting_steps(counter):
    def step(token_ids, cache, padding_mask):
        counter.assign_add(1)
        return MODEL.step(token_ids, cache, padding_mask)

    return step


def test_the_loop_ends_when_every_row_has_ended_and_reads_no_token_for_nothing():
    counter = tf.Variable(0)
    settings = {"max_new_tokens": 12, "options": GREEDY, "pad_token_id": PAD}
    first = greedy_reference([5, 3, 9])[:3]
    eos = first[2]
    assert eos not in first[:2]
    run = tf.function(
        lambda eos_id: decode(
            counting_steps(counter), MODEL.init_cache, *padded([[5, 3, 9]]), eos_token_id=eos_id, **settings
        )
    )
    run(eos)
    assert counter.numpy() == 3
    counter.assign(0)
    run(None)
    assert counter.numpy() == 12
    for eos_id, steps in ((eos, 3), (None, 12)):
        counter.assign(0)
        streamer = Decoder(counting_steps(counter), MODEL.init_cache, eos_token_id=eos_id, **settings)
        assert len(list(streamer.stream(*padded([[5, 3, 9]])))) == steps
        assert counter.numpy() == steps


def test_the_cache_has_a_slot_for_every_token_read_and_no_more():
    asked = []

    def init_cache(batch_size, cache_length):
        asked.append((batch_size, cache_length))
        return MODEL.init_cache(batch_size, cache_length)

    settings = {"max_new_tokens": 12, "options": GREEDY, "eos_token_id": EOS, "pad_token_id": PAD}
    decode(MODEL.step, init_cache, *padded(PROMPTS), **settings)
    assert asked == [(5, 7 + 11)], "known sizes must come as integers"


def test_a_step_may_lose_static_shapes():
    def step(token_ids, cache, padding_mask):
        logits, cache = MODEL.step(token_ids, cache, padding_mask)
        if token_ids.shape[1] == 1:
            cache["sum"] = tf.reshape(
                cache["sum"], tf.shape(tf.identity(cache["sum"])) * tf.cast(cache["next"] > 0, tf.int32)
            )
            assert cache["sum"].shape == [None, None]
        return logits, cache

    settings = {"max_new_tokens": 12, "options": GREEDY, "eos_token_id": EOS, "pad_token_id": PAD}
    result = tf.function(lambda: decode(step, MODEL.init_cache, *padded(PROMPTS), **settings)[:3])()
    np.testing.assert_array_equal(result[0], generate(PROMPTS).token_ids)


def test_limits_cut_rows_one_by_one():
    free = rows_of(generate(PROMPTS, eos=None))
    result = generate(PROMPTS, eos=None, limits=[3, 0, 99, 12, -1])
    assert rows_of(result) == [free[0][:3], [], free[2], free[3], []]
    assert result.end_lengths.numpy().tolist() == [0] * 5
    assert rows_of(generate(PROMPTS, eos=None, limits=2)) == [row[:2] for row in free]
    assert rows_of(generate(PROMPTS, eos=None, limits=0)) == [[]] * 5


def test_rows_that_have_ended_take_no_positions_of_the_context():
    """Limits that fill the context of each row to its last position: one more token could not be read."""
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    model = ToyModel(context_length=9)
    settings = {"max_new_tokens": 12, "options": GREEDY, "eos_token_id": None, "pad_token_id": PAD}
    result = decode(model.step, model.init_cache, *padded(PROMPTS), limits=9 - lengths, **settings)
    free = rows_of(generate(PROMPTS, eos=None))
    assert rows_of(result) == [row[: 9 - length] for row, length in zip(free, lengths, strict=True)]


def test_an_empty_prompt_is_read_as_one_padding_token():
    assert rows_of(generate([[], [5, 3, 9]])) == rows_of(generate([[PAD], [5, 3, 9]]))
    assert rows_of(generate([[], []])) == rows_of(generate([[PAD], [PAD]]))


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(top_k=5), SamplingOptions(top_p=tf.constant(0.9))])
def test_zero_rows(options):
    for shape in ([0, 0], [0, 4]):
        result = decoder(options, with_log_probs=True)(tf.zeros(shape, tf.int32), tf.zeros([0], tf.int32), seeds=1)
        assert [part.shape for part in result] == [[0, 12], [0], [0], [0, 12]]


ALL_RULES = SamplingOptions(
    temperature=0.9,
    top_k=15,
    top_p=0.97,
    min_p=0.001,
    repetition_penalty=1.1,
    no_repeat_ngram_size=3,
    min_new_tokens=2,
    stop_sequences=((3,), (4, 5)),
    suppressed_token_ids=(8,),
)


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(), ALL_RULES], ids=["greedy", "sampled", "all-rules"])
def test_a_row_gives_the_same_tokens_alone_and_anywhere_in_a_batch(options):
    seeds = [3, 1, 4, 1, 5]
    together = rows_of(generate(PROMPTS, options, seeds=seeds))
    backwards = rows_of(generate(PROMPTS[::-1], options, seeds=seeds[::-1]))
    assert backwards[::-1] == together
    for prompt, seed, row in zip(PROMPTS, seeds, together, strict=True):
        assert rows_of(generate([prompt], options, seeds=[seed])) == [row]
        assert rows_of(generate([prompt], options, seeds=seed)) == [row]


def test_seeds():
    prompts = [[5, 3, 9]] * 3
    a, b, c = rows_of(generate(prompts, SamplingOptions(), seeds=[1, 2, 1]))
    assert a == c != b
    assert rows_of(generate(prompts, SamplingOptions(), seeds=1)) == [a] * 3
    large = rows_of(generate(prompts, SamplingOptions(), seeds=[1, 2**40 + 1, -1]))
    assert large[0] == a
    assert len({tuple(row) for row in large}) == 3
    assert rows_of(generate(prompts[:1], SamplingOptions(), seeds=2**40 + 1)) == [large[1]]
    hot = SamplingOptions(temperature=5.0)
    in_graph = tf.function(lambda: generate(prompts, SamplingOptions(), seeds=[1, 2**40 + 1, -1]).token_ids)
    np.testing.assert_array_equal(in_graph(), generate(prompts, SamplingOptions(), seeds=[1, 2**40 + 1, -1]).token_ids)
    unseeded = tf.function(lambda: generate(prompts, hot, eos=None).token_ids)
    rows = np.concatenate([unseeded(), unseeded()])
    assert len({tuple(row) for row in rows}) == 6, "without a seed, each row of each call is drawn anew"


def test_draws_differ_from_token_to_token():
    """A step that gives the same logits for ever: one draw used again and again would repeat one token."""
    flat = lambda token_ids, cache, mask: (tf.zeros([tf.shape(token_ids)[0], VOCAB_SIZE]), cache)  # noqa: E731
    options = SamplingOptions()
    result = decode(
        flat,
        lambda rows, length: tf.zeros([rows, length]),
        *padded([[1]]),
        max_new_tokens=200,
        options=options,
        eos_token_id=None,
        pad_token_id=PAD,
        seeds=0,
    )
    assert len(set(result.token_ids.numpy()[0])) == VOCAB_SIZE


def seen_penalty(penalty):
    def rule(logits, text, new):
        seen = np.isin(np.arange(VOCAB_SIZE), text)
        return np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)

    return rule


def no_repeated_ngrams(size):
    def rule(logits, text, new):
        logits = logits.copy()
        for start in range(len(text) - size + 1):
            if text[start : start + size - 1] == text[len(text) - size + 1 :]:
                logits[text[start + size - 1]] = -np.inf
        return logits

    return rule


def never(tokens):
    def rule(logits, text, new):
        return np.where(np.isin(np.arange(VOCAB_SIZE), tokens), -np.inf, logits)

    return rule


# Prompts that are quick to repeat themselves, so that the rules have something to do.
LOOPING = [[1, 2, 1, 2, 1], [4, 4, 4], [9], [6, 7, 8, 6, 7, 8, 6]]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"repetition_penalty": 1.7}, seen_penalty(1.7)),
        ({"repetition_penalty": 0.6}, seen_penalty(0.6)),
        ({"no_repeat_ngram_size": 1}, no_repeated_ngrams(1)),
        ({"no_repeat_ngram_size": 2}, no_repeated_ngrams(2)),
        ({"no_repeat_ngram_size": 3}, no_repeated_ngrams(3)),
        ({"suppressed_token_ids": (3, 17, 11)}, never([3, 17, 11])),
    ],
    ids=lambda value: "" if callable(value) else "-".join(f"{name}={setting}" for name, setting in value.items()),
)
def test_rules_follow_prompt_and_new_tokens(options, rule):
    settings = {"max_new_tokens": 14, "eos": None}
    prompts = LOOPING if "no_repeat_ngram_size" in options else PROMPTS
    rows = rows_of(generate(prompts, SamplingOptions(temperature=0, **options), **settings))
    assert rows == [greedy_reference(prompt, rule=rule, **settings) for prompt in prompts]
    assert rows != rows_of(generate(prompts, **settings)), "the rule must have something to do"


def test_min_new_tokens_holds_back_the_end_token_and_stops():
    eos, ends = ends_of(PROMPTS)
    early = [row for row, end in enumerate(ends) if end is not None]

    def rule(logits, text, new):
        return never([eos])(logits, text, new) if len(new) < 8 else logits

    options = dataclasses.replace(GREEDY, min_new_tokens=8)
    result = generate(PROMPTS, options, eos=eos)
    assert rows_of(result) == [greedy_reference(prompt, eos=eos, rule=rule) for prompt in PROMPTS]
    assert min(result.lengths.numpy()) >= 8

    free = rows_of(generate(PROMPTS, eos=None))
    row = early[0]
    stop = (free[row][1],)
    late = dataclasses.replace(GREEDY, min_new_tokens=2, stop_sequences=(stop,))
    stopped = rows_of(generate(PROMPTS, late, eos=None))[row]
    assert len(stopped) > 2
    assert stopped == free[row][: len(stopped)]


def first_end(new, stop):
    for end in range(len(stop), len(new) + 1):
        if tuple(new[end - len(stop) : end]) == stop:
            return end
    return None


def test_stop_sequences_end_a_row_and_are_kept():
    free = rows_of(generate(PROMPTS, eos=None))
    stops = (tuple(free[0][3:6]), tuple(free[2][5:7]), tuple(free[1][10:12]))
    result = generate(PROMPTS, dataclasses.replace(GREEDY, stop_sequences=stops), eos=None)
    for row, new in enumerate(free):
        found = [(end, len(stop)) for stop in stops if (end := first_end(new, stop)) is not None]
        end, kept = min(found, default=(12, 0))
        assert rows_of(result)[row] == new[:end]
        assert result.end_lengths.numpy()[row] == kept
    assert len(set(result.lengths.numpy())) >= 3


def test_a_stop_sequence_is_looked_for_in_the_new_tokens_only():
    new = rows_of(generate([[5, 3, 9]], eos=None))[0]
    across = dataclasses.replace(GREEDY, stop_sequences=((9, new[0]),))
    assert rows_of(generate([[5, 3, 9]], across, eos=None))[0] == new
    both = dataclasses.replace(GREEDY, stop_sequences=((new[2],), tuple(new[1:3])))
    result = generate([[5, 3, 9]], both, eos=None)
    assert result.end_lengths.numpy()[0] == 2, "the longest stop that matches is the one to leave out"
    other_order = dataclasses.replace(both, stop_sequences=both.stop_sequences[::-1])
    assert generate([[5, 3, 9]], other_order, eos=None).end_lengths.numpy()[0] == 2


def test_log_probs_are_those_of_the_model_itself():
    eos, _ = ends_of(PROMPTS)
    options = SamplingOptions(temperature=2.0, top_k=9, repetition_penalty=1.5)
    result = generate(PROMPTS, options, seeds=7, eos=eos, with_log_probs=True)
    for row, new in enumerate(rows_of(result)):
        text = list(PROMPTS[row])
        for index, token in enumerate(new):
            expected = tf.nn.log_softmax(MODEL.logits(text))[token]
            np.testing.assert_allclose(result.log_probs[row, index], expected, rtol=1e-4, atol=1e-5)
            text.append(token)
        assert (result.log_probs[row, len(new) :].numpy() == 0).all()
    assert generate(PROMPTS).log_probs is None


def test_low_precision_logits_are_taken():
    def step(token_ids, cache, mask):
        logits, cache = MODEL.step(token_ids, cache, mask)
        return tf.cast(logits, tf.bfloat16), cache

    settings = {"max_new_tokens": 4, "options": ALL_RULES, "eos_token_id": EOS, "pad_token_id": PAD, "seeds": 1}
    result = decode(step, MODEL.init_cache, *padded(PROMPTS), with_log_probs=True, **settings)
    assert result.log_probs.dtype == tf.float32
    rows_of(result)


class Generator(tf.Module):
    """A batch of any size, with what a served request may set."""

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([None], tf.float32),
            tf.TensorSpec([], tf.float32),
            tf.TensorSpec([], tf.int32),
        ]
    )
    def generate(self, token_ids, lengths, seeds, temperature, top_p, top_k):
        options = dataclasses.replace(ALL_RULES, temperature=temperature, top_p=top_p, top_k=top_k)
        return decoder(options, with_log_probs=True)(token_ids, lengths, seeds=seeds)._asdict()


def test_saved_model_with_any_batch_size_and_request_parameters(tmp_path):
    tf.saved_model.save(Generator(), str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for prompts in (PROMPTS, PROMPTS[:1], []):
        seeds = np.arange(len(prompts))
        token_ids, lengths = padded(prompts)
        for temperature, top_p, top_k in ((0.9, 0.97, 15), (0.0, 1.0, 0)):
            temperatures = tf.fill([len(prompts)], temperature)
            served = loaded.generate(token_ids, lengths, tf.constant(seeds, tf.int64), temperatures, top_p, top_k)
            numbers = {"temperature": temperature, "top_p": top_p, "top_k": top_k or None}
            ours = generate(prompts, dataclasses.replace(ALL_RULES, **numbers), seeds=seeds, with_log_probs=True)
            np.testing.assert_array_equal(served["token_ids"], ours.token_ids)
            np.testing.assert_array_equal(served["end_lengths"], ours.end_lengths)
            np.testing.assert_allclose(served["log_probs"], ours.log_probs, rtol=1e-4, atol=1e-5)


GREEDY_RULES = dataclasses.replace(ALL_RULES, temperature=0)


@pytest.mark.parametrize("options", [GREEDY, GREEDY_RULES], ids=["plain", "all-rules"])
def test_greedy_decoding_converts_to_tflite_builtins(options):
    token_ids, lengths = padded(PROMPTS)
    eos, _ = ends_of(PROMPTS)
    module = tf.Module()
    module.run = tf.function(
        lambda token_ids, lengths: tuple(decoder(options, eos=eos)(token_ids, lengths)[:3]),
        input_signature=[tf.TensorSpec(token_ids.shape, tf.int32), tf.TensorSpec(lengths.shape, tf.int32)],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.run.get_concrete_function()], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    result = interpreter.get_signature_runner()(token_ids=token_ids, lengths=lengths)
    expected = module.run(token_ids, lengths)
    for index, part in enumerate(expected):
        np.testing.assert_array_equal(result[f"output_{index}"], part)
    assert len(set(expected[1].numpy())) > 1


@pytest.mark.parametrize("options", [GREEDY, ALL_RULES], ids=["greedy", "all-rules"])
def test_decoding_compiles_with_xla(options):
    run = tf.function(lambda: decoder(options)(*padded(PROMPTS), seeds=3)._asdict() | {"log_probs": ()})
    xla = tf.function(run.python_function, jit_compile=True)
    np.testing.assert_array_equal(xla()["token_ids"], run()["token_ids"])


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(), ALL_RULES], ids=["greedy", "sampled", "all-rules"])
def test_stream_gives_the_tokens_of_decode(options):
    eos, _ = ends_of(PROMPTS)
    streamer = decoder(options, eos=eos)
    for prompts, limits in ((PROMPTS, [12, 3, 12, 0, 12]), (PROMPTS[:1], None), ([], None)):
        inputs = padded(prompts)
        expected = streamer(*inputs, seeds=8, limits=limits)
        rows = [[] for _ in prompts]
        for token_ids, is_new in streamer.stream(*inputs, seeds=8, limits=limits):
            assert is_new.any(), "a stream must not give a step without a token"
            assert (token_ids[~is_new] == PAD).all()
            for row in np.flatnonzero(is_new):
                rows[row].append(int(token_ids[row]))
        assert rows == rows_of(expected)


def test_stream_compiles_once_for_prompts_of_like_length():
    traces = []

    def step(token_ids, cache, padding_mask):
        traces.append(token_ids.shape)
        return MODEL.step(token_ids, cache, padding_mask)

    streamer = Decoder(step, MODEL.init_cache, max_new_tokens=4, options=GREEDY, eos_token_id=EOS, pad_token_id=PAD)
    for prompt in ([1], [1, 2, 3], list(range(16))):
        assert len(list(streamer.stream(*padded([prompt])))) == 4
    assert traces == [(1, 16), (1, 1)]
    list(streamer.stream(*padded([list(range(17))])))
    assert traces[2:] == [(1, 32), (1, 1)]
    list(streamer.stream(*padded([[1] * 300])))
    assert traces[4:] == [(1, 384), (1, 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"eos": -1}, "eos_token_id"),
        ({"eos": [3, -1]}, "eos_token_id"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        decoder(**settings)


def test_bad_inputs_are_refused_by_name():
    with pytest.raises(ValueError, match="pad_token_id"):
        Decoder(MODEL.step, MODEL.init_cache, max_new_tokens=1, options=GREEDY, eos_token_id=None, pad_token_id=-1)
    with pytest.raises(ValueError, match="token_ids has shape"):
        decoder()(tf.constant([1, 2]), tf.constant([2]))


CONTEXT = 48


def tiny_gpt(dtype="float32"):
    keras.utils.set_random_seed(5)
    config = GPTConfig(
        vocab_size=61,
        context_length=CONTEXT,
        num_layers=2,
        num_heads=2,
        model_dim=16,
        dropout_rate=0.1,
        eos_token_id=60,
    )
    model = GPTModel(config, dtype=dtype)
    for weight in model.trainable_weights:
        # Fresh weights give nearly the same logits for every text; larger ones make it matter what was read.
        if len(weight.shape) == 2:
            weight.assign(weight * 12)
    return model


@pytest.fixture(scope="module")
def gpt():
    return tiny_gpt()


GPT_PROMPTS = [[5, 3, 9], [7], list(range(1, 34)), [21, 21], [10, 11, 12, 13, 59, 2, 2, 2, 2]]


def gpt_rows(model, prompts, options, *, max_new_tokens=15, seeds=None, limits=None):
    run = tf.function(
        lambda token_ids, lengths: model.decoder(max_new_tokens, options)(
            token_ids, lengths, seeds=seeds, limits=limits
        )[:2]
    )
    token_ids, lengths = run(*padded(prompts))
    return [row[:length].tolist() for row, length in zip(token_ids.numpy(), lengths.numpy(), strict=True)]


def test_gpt_greedy_from_the_cache_is_the_argmax_over_the_full_forward_pass(gpt):
    rows = gpt_rows(gpt, GPT_PROMPTS, GREEDY)
    assert len({tuple(row) for row in rows}) == len(rows)
    for prompt, row in zip(GPT_PROMPTS, rows, strict=True):
        logits = gpt(tf.constant([prompt + row]), training=False).numpy()[0]
        read = logits[len(prompt) - 1 : -1]  # Where each of the new tokens was chosen.
        assert row == read.argmax(axis=-1).tolist()
        assert len(row) == 15 or row[-1] == 60


@pytest.mark.slow
@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(top_p=0.9, temperature=1.5)], ids=["greedy", "sampled"])
def test_gpt_row_gives_the_same_tokens_alone_and_anywhere_in_a_batch(gpt, options):
    seeds = [3, 1, 4, 1, 5]
    together = gpt_rows(gpt, GPT_PROMPTS, options, seeds=seeds)
    assert gpt_rows(gpt, GPT_PROMPTS[::-1], options, seeds=seeds[::-1])[::-1] == together
    for prompt, seed, row in zip(GPT_PROMPTS, seeds, together, strict=True):
        assert gpt_rows(gpt, [prompt], options, seeds=[seed]) == [row]


def test_gpt_rows_may_each_fill_the_context_to_its_end(gpt):
    limits = [CONTEXT - len(prompt) for prompt in GPT_PROMPTS]
    options = SamplingOptions(suppressed_token_ids=(60,))
    rows = gpt_rows(gpt, GPT_PROMPTS, options, max_new_tokens=CONTEXT, seeds=2, limits=limits)
    assert [len(row) for row in rows] == limits
    # Stopping there must not change what came before.
    shorter = gpt_rows(gpt, GPT_PROMPTS, options, max_new_tokens=15, seeds=2)
    assert [row[:15] for row in rows] == shorter


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_gpt_in_low_precision_decodes_and_streams_the_same_tokens(dtype):
    model = tiny_gpt(dtype)
    options = SamplingOptions(top_k=20, repetition_penalty=1.2)
    rows = gpt_rows(model, GPT_PROMPTS, options, max_new_tokens=8, seeds=6)
    streamed = [[] for _ in rows]
    for token_ids, is_new in model.decoder(8, options).stream(*padded(GPT_PROMPTS), seeds=6):
        for row in np.flatnonzero(is_new):
            streamed[row].append(int(token_ids[row]))
    assert streamed == rows


def test_gpt_zero_rows(gpt):
    result = gpt.decoder(5, SamplingOptions(top_k=3))(tf.zeros([0, 0], tf.int32), tf.zeros([0], tf.int32), seeds=0)
    assert result.token_ids.shape == [0, 5]


def test_gpt_saved_with_any_batch_size_gives_the_same_tokens(gpt, tmp_path):
    options = SamplingOptions(top_k=20)

    module = tf.Module()
    module.variables_used = [weight.value for weight in gpt.weights]
    module.generate = tf.function(
        lambda *inputs: gpt.decoder(6, options)(*inputs[:2], seeds=inputs[2])._asdict() | {"log_probs": ()},
        input_signature=[
            tf.TensorSpec([None, 33], tf.int32),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None], tf.int64),
        ],
    )
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    token_ids, lengths = padded(GPT_PROMPTS)
    expected = gpt_rows(gpt, GPT_PROMPTS, options, max_new_tokens=6, seeds=list(range(5)))
    for rows in (5, 1, 0):
        served = loaded.generate(token_ids[:rows], lengths[:rows], tf.range(rows, dtype=tf.int64))
        trimmed = zip(served["token_ids"].numpy(), served["lengths"].numpy(), strict=True)
        assert [row[:length].tolist() for row, length in trimmed] == expected[:rows]


def test_gpt_greedy_decoding_converts_to_tflite_builtins(gpt):
    token_ids, lengths = padded(GPT_PROMPTS[:2], filler=0)
    module = tf.Module()
    module.variables_used = [weight.value for weight in gpt.weights]
    module.run = tf.function(
        lambda token_ids, lengths: tuple(gpt.decoder(10, GREEDY)(token_ids, lengths)[:2]),
        input_signature=[tf.TensorSpec(token_ids.shape, tf.int32), tf.TensorSpec(lengths.shape, tf.int32)],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.run.get_concrete_function()], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    result = interpreter.get_signature_runner()(token_ids=token_ids, lengths=lengths)
    np.testing.assert_array_equal(result["output_0"], module.run(token_ids, lengths)[0])
