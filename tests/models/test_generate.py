"""Decoding from a cache against the plain thing: run the whole text through the model again for each token."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from conftest import CAUSAL
from hypothesis import given, settings
from hypothesis import strategies as st

NEW = 6


TESTED = CAUSAL


@pytest.fixture(scope="module")
def full_logits(model):
    """full_logits(ids): logits [V] of the token after `ids`, from a forward pass over all of them."""
    run = tf.function(model, autograph=False, reduce_retracing=True)
    return lambda ids: run(np.asarray(ids, "int32")[None]).numpy()[0, -1]


@pytest.fixture(scope="module")
def greedy(model, full_logits):
    """greedy(prompt): the most likely token, again and again, until the end token; then padding."""

    def continue_(prompt):
        ids, new = list(prompt), []
        while len(new) < NEW and (not new or new[-1] != model.config.eos_token_id):
            new.append(int(full_logits(ids).argmax()))
            ids.append(new[-1])
        return new + [model.config.eos_token_id] * (NEW - len(new))

    return continue_


def random_prompts(model, lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(1, model.config.vocab_size, length).tolist() for length in lengths]


def generate(model, prompts, **options):
    return np.asarray(model.generate(prompts, max_new_tokens=NEW, **{"temperature": 0.0, **options}))


def test_greedy_equals_argmax_over_the_full_pass(model, greedy):
    """Ragged rows in one batch, with room for all or none of the context left."""
    prompts = random_prompts(model, [1, 5, 2, model.config.context_length - NEW, 9, 3], seed=1)
    np.testing.assert_array_equal(generate(model, prompts), [greedy(prompt) for prompt in prompts])


def check_greedy(model, greedy, lengths, seed):
    prompts = random_prompts(model, lengths, seed)
    np.testing.assert_array_equal(generate(model, prompts), [greedy(prompt) for prompt in prompts])


LENGTHS = st.lists(st.integers(1, 18), min_size=1, max_size=4)


@settings(max_examples=5)
@given(lengths=LENGTHS, seed=st.integers(0, 2**32 - 1))
def test_greedy_on_random_prompts(model, greedy, lengths, seed):
    check_greedy(model, greedy, lengths, seed)


@pytest.mark.slow
@settings(max_examples=100)
@given(lengths=LENGTHS, seed=st.integers(0, 2**32 - 1))
def test_greedy_on_many_random_prompts(model, greedy, lengths, seed):
    check_greedy(model, greedy, lengths, seed)


def test_the_end_token_ends_a_row(make_model, full_logits):
    """The end token is made the most likely one after a prompt; the rest of that row is padding."""
    model = make_model()
    prompt = random_prompts(model, [4])[0]
    first = int(full_logits(prompt).argmax())
    for pad_token_id in (None, 7):
        ended = type(model)(model.config.replace(eos_token_id=first, pad_token_id=pad_token_id))
        ended.set_weights(model.get_weights())
        expected = [first] + [first if pad_token_id is None else 7] * (NEW - 1)
        np.testing.assert_array_equal(generate(ended, [prompt]), [expected])


def padded(prompts, left, width):
    ids = np.full((len(prompts), width), 3, "int32")
    mask = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        part = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, part], mask[row, part] = prompt, True
    return {"token_ids": ids, "padding_mask": mask}


def test_all_forms_of_prompts_give_the_same(model):
    prompts = random_prompts(model, [2, 7, 4])
    expected = generate(model, prompts)
    for form in (
        tf.ragged.constant(prompts, dtype=tf.int32),
        tuple(prompts),
        [np.array(prompt, "int64") for prompt in prompts],
        padded(prompts, left=True, width=9),
        padded(prompts, left=False, width=9),
        {name: tf.constant(each) for name, each in padded(prompts, left=True, width=7).items()},
    ):
        np.testing.assert_array_equal(generate(model, form), expected)
    rectangle = np.array(random_prompts(model, [5, 5]))
    expected = generate(model, rectangle.tolist())
    for form in (rectangle, tf.constant(rectangle), {"token_ids": rectangle}):
        np.testing.assert_array_equal(generate(model, form), expected)


def test_a_row_gives_the_same_alone_and_in_a_batch(model):
    prompts = random_prompts(model, [3, 8, 1, 5])
    seeds = [11, 12, 13, 2**40]
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
    together = generate(model, prompts, seed=seeds, **options)
    assert len({tuple(row) for row in together}) == 4
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        np.testing.assert_array_equal(generate(model, [prompt], seed=seed, **options)[0], together[row])
    backwards = generate(model, prompts[::-1], seed=seeds[::-1], **options)
    np.testing.assert_array_equal(backwards[::-1], together)


def test_seeds(model):
    prompts = random_prompts(model, [3] * 2)
    one, same, other = (generate(model, prompts, temperature=1.5, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    drawn = [generate(model, prompts, temperature=1.5) for _ in range(2)]
    assert (drawn[0] != drawn[1]).any()


def test_streaming_gives_the_tokens_of_generate(model):
    prompts = random_prompts(model, [3, 1, 6])
    options = {"temperature": 0.8, "seed": [1, 2, 3]}
    expected = generate(model, prompts, **options)
    for _ in range(2):
        steps = list(model.stream(prompts, max_new_tokens=NEW, **options))
        np.testing.assert_array_equal(np.stack([step.token_ids for step in steps], axis=1), expected[:, : len(steps)])


def test_what_was_compiled_is_used_again(make_model):
    model = make_model()
    for prompts in ([[1, 2]], [[3]], [[1], [2, 3, 4]], [[4, 5], [6]]):
        generate(model, prompts)
        list(model.stream(prompts, max_new_tokens=NEW, temperature=0.0))
    ((decoder, run),) = model._kept_decoders.values()
    assert run.experimental_get_tracing_count() <= 2
    assert decoder is model._kept_decoder(NEW, decoder.options)[0]
    for max_new_tokens in range(1, 12):
        model._kept_decoder(max_new_tokens, decoder.options)
    assert len(model._kept_decoders) == 8


def test_training_on_changes_what_is_generated(make_model):
    """The compiled loop reads the weights, it does not hold them."""
    model, other = make_model(), make_model(seed=1)
    prompts = random_prompts(model, [3, 4])
    before = generate(model, prompts)
    model.set_weights(other.get_weights())
    after = generate(model, prompts)
    assert (before != after).any()
    np.testing.assert_array_equal(after, generate(other, prompts))


def test_an_empty_prompt_starts_from_the_end_token(model):
    end = model.config.eos_token_id
    np.testing.assert_array_equal(generate(model, [[], [5]]), generate(model, [[end], [5]]))


def test_an_empty_prompt_without_an_end_token_is_refused(make_model):
    with pytest.raises(ValueError, match="a prompt is empty, and this model has no eos_token_id"):
        make_model(eos_token_id=None).generate([[1], []], max_new_tokens=2)


@pytest.mark.parametrize("prompts", [[], np.zeros((0, 4), "int32"), tf.RaggedTensor.from_row_splits([], [0])])
def test_no_prompts_give_no_rows(model, prompts):
    if isinstance(prompts, tf.RaggedTensor):
        prompts = tf.cast(prompts, tf.int32)
    assert generate(model, prompts).shape == (0, NEW)


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([[1] * 20], 5, r"longest prompt has 20 tokens and max_new_tokens is 5, but together they may be 24 at most"),
        ([[1]], 24, r"together they may be 24 at most \(context_length\)"),
        ([[1, 61]], 5, r"token ids must lie in \[0, 61\), but a prompt has 1 to 61"),
        ([[1], [-1, 2]], 5, r"token ids must lie in \[0, 61\), but a prompt has -1 to 2"),
        (np.array([[2**32 + 1]]), 5, r"token ids must lie in \[0, 61\)"),
        ([[1.5, 2.0]], 5, r"token ids must be integers, but a prompt is of type float64"),
        ([1, 2, 3], 5, r"prompts must be rows of token ids"),
        ([[[1]]], 5, r"prompts must be rows of token ids"),
        ([[1]], 0, r"max_new_tokens=0"),
        ([[1]], -3, r"max_new_tokens=-3"),
    ],
)
def test_bad_input_is_refused(model, prompts, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, max_new_tokens=max_new_tokens)


def test_beams_have_the_scores_of_a_full_pass(model):
    """For prompts of different lengths in one batch, whatever beams have been reordered on the way."""
    prompts = random_prompts(model, [3, 9, 1], seed=2)
    result = model.beam_search(prompts, max_new_tokens=NEW, num_beams=4, num_return_sequences=3)
    texts = np.reshape(result.token_ids, (9, NEW))
    np.testing.assert_array_equal(generate(model, prompts, num_beams=4, num_return_sequences=3), texts)
    for row, prompt in enumerate(prompts):
        for tokens, length, score in zip(result.token_ids[row], result.lengths[row], result.scores[row], strict=True):
            ids = [*prompt, *tokens.numpy()[:length].tolist()]
            log_probs = tf.nn.log_softmax(model(np.array([ids[:-1]], "int32"))[0, len(prompt) - 1 :])
            total = tf.reduce_sum(tf.gather(log_probs, ids[len(prompt) :], axis=1, batch_dims=1))
            assert float(score) == pytest.approx(float(total) / int(length), abs=1e-4)


def test_bad_options_are_refused(model):
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate([[1]], temperature=-1)
    with pytest.raises(TypeError, match="top_q"):
        model.generate([[1]], top_q=0.5)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "mixed_float16"])
def test_half_precision(make_model, dtype):
    model = make_model(dtype=dtype)
    tokens = generate(model, random_prompts(model, [2, 5]))
    assert tokens.shape == (2, NEW)
    assert {each.dtype.name for each in model.init_cache(2, 4).keys} == {model.compute_dtype}


@settings(max_examples=8)
@given(data=st.data())
def test_prefill_in_chunks_equals_the_full_pass(model, full_logits, data):
    """decode_step in steps of any size, rows padded on the right within each."""
    steps = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    counts = np.array([[data.draw(st.integers(1, step)) for step in steps] for _ in range(2)])
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = [[], []]
    cache = model.init_cache(2, sum(steps) + data.draw(st.integers(0, 2)))
    for number, step in enumerate(steps):
        ids = random.integers(0, model.config.vocab_size, (2, step)).astype("int32")
        mask = np.arange(step) < counts[:, number, None]
        logits, cache = model.decode_step(tf.constant(ids), cache, tf.constant(mask))
        for row in range(2):
            rows[row] += ids[row, : counts[row, number]].tolist()
            np.testing.assert_allclose(logits[row], full_logits(rows[row]), rtol=1e-3, atol=1e-4)
    assert logits.dtype == tf.float32


def test_a_step_without_a_mask_takes_all_tokens(model, full_logits):
    ids = np.array([[5, 6, 7]], "int32")
    logits, cache = model.decode_step(tf.constant(ids), model.init_cache(1, 4))
    np.testing.assert_allclose(logits[0], full_logits(ids[0]), rtol=1e-3, atol=1e-4)
    logits, _ = model.decode_step(tf.constant([[8]]), cache)
    np.testing.assert_allclose(logits[0], full_logits([5, 6, 7, 8]), rtol=1e-3, atol=1e-4)
