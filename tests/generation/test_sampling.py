"""Sampling: the rules and filters against Hugging Face's, the draw against the softmax, rows against themselves."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from lmzoo.generation.rules import constrain
from lmzoo.generation.sampling import SamplingOptions, chosen_log_probs, filter_scores, gumbel_noise, sample

_SCRIPT = Path(__file__).parents[1] / "golden" / "make_sampling_golden.py"
_spec = importlib.util.spec_from_file_location("make_sampling_golden", _SCRIPT)
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

INF = float("inf")


def our_scores(logits, history, lengths, num_new_tokens, options):
    options = SamplingOptions(**options)
    constrained = constrain(
        tf.constant(logits),
        options,
        index=tf.constant(num_new_tokens),
        eos_token_ids=(golden.EOS_TOKEN_ID,),
        history=tf.constant(history),
        history_lengths=tf.constant(lengths),
    )
    return filter_scores(constrained, options).numpy()


def assert_same_scores(ours, reference):
    """Equal but for a constant a row, and with the same tokens removed."""
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(reference))
    np.testing.assert_allclose(ours, reference - reference.max(axis=-1, keepdims=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", range(len(golden.CASES)), ids=lambda case: str(golden.CASES[case]))
def test_scores_equal_hugging_face_golden(case):
    with np.load(golden.GOLDEN) as arrays:
        ours = our_scores(arrays["logits"], arrays["history"], arrays["lengths"], *golden.CASES[case])
        assert_same_scores(ours, arrays["scores"][case])


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(1, 6))
def test_scores_equal_hugging_face_live(seed):
    pytest.importorskip("transformers")
    arrays = golden.inputs(seed, rows=16)
    for num_new_tokens, options in golden.CASES:
        reference = golden.reference_scores(*arrays, num_new_tokens, options)
        assert_same_scores(our_scores(*arrays, num_new_tokens, options), reference)


@pytest.fixture
def logits():
    return tf.random.stateless_normal([5, 3000], seed=[1, 2]) * 2


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.999, 0.9999999])
def test_nucleus_of_a_vocabulary_wider_than_the_candidates(logits, top_p):
    """0.05 is found among the most likely candidates, 0.999 needs the whole vocabulary."""
    logits = tf.where(tf.range(3000) % 7 == 0, -INF, logits)
    scores = filter_scores(logits, SamplingOptions(top_p=top_p)).numpy()
    for row, kept in zip(tf.nn.softmax(logits).numpy().astype(np.float64), ~np.isneginf(scores), strict=True):
        assert row[kept].sum() >= top_p - 1e-6
        assert row[kept].sum() - row[kept].min() < top_p + 1e-6
        assert row[kept].min() >= row[~kept].max()
        assert (row[kept] > 0).all(), "a forbidden token must stay forbidden"


def test_one_wide_nucleus_in_the_batch_is_found_whole(logits):
    peaked = tf.one_hot([4], 3000) * 20
    together = filter_scores(tf.concat([peaked, logits], axis=0), SamplingOptions(top_p=0.999)).numpy()
    alone = filter_scores(logits, SamplingOptions(top_p=0.999)).numpy()
    assert (~np.isneginf(together)).sum(axis=-1)[0] == 1
    np.testing.assert_allclose(together[1:], alone, rtol=1e-5)


def test_a_row_with_top_p_1_keeps_every_token_beside_a_row_with_a_wide_nucleus(logits):
    pair = tf.stack([logits[0] * 10, logits[1]])
    scores = filter_scores(pair, SamplingOptions(top_p=tf.constant([1.0, 0.999]))).numpy()
    kept = (~np.isneginf(scores)).sum(axis=-1)
    assert kept[0] == 3000
    assert 1024 < kept[1] < 3000


def test_filters_given_as_one_tensor_a_row_equal_those_given_as_numbers(logits):
    logits = logits[:4]
    values = {
        "temperature": [0.5, 1.0, 2.0, 0.9],
        "top_k": [1, 40, 3000, 7],
        "top_p": [0.9, 0.5, 1.0, 0.3],
        "min_p": [0.0, 0.1, 0.01, 0.5],
    }
    dtypes = {"top_k": tf.int32}
    options = SamplingOptions(
        **{name: tf.constant(value, dtypes.get(name, tf.float32)) for name, value in values.items()}
    )
    scores = tf.function(lambda logits: filter_scores(logits, options))(logits)
    for row in range(4):
        numbers = SamplingOptions(**{name: value[row] for name, value in values.items()})
        alone = filter_scores(logits[row : row + 1], numbers)
        np.testing.assert_allclose(scores[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_tensor_values_out_of_range_act_as_off_or_as_the_nearest_one(logits):
    plain = filter_scores(logits, SamplingOptions())
    off = {"top_k": 0, "top_p": 1.5, "min_p": -1.0}
    for name, value in off.items():
        np.testing.assert_array_equal(filter_scores(logits, SamplingOptions(**{name: tf.constant(value)})), plain)
    one_token = {"top_p": -1.0, "min_p": 5.0}
    for name, value in one_token.items():
        kept = ~np.isneginf(filter_scores(logits, SamplingOptions(**{name: tf.constant(value)})))
        np.testing.assert_array_equal(kept.sum(axis=-1), 1)
    greedy = tf.argmax(logits, -1, output_type=tf.int32)
    for temperature in (-1.0, 0.0, float("nan"), 1e-30):
        options = SamplingOptions(temperature=tf.constant(temperature))
        np.testing.assert_array_equal(sample(logits, options, seeds=tf.range(5)), greedy)
    for temperature in (INF, 1e30):
        options = SamplingOptions(temperature=tf.constant(temperature), top_k=3)
        assert (~np.isneginf(filter_scores(logits, options))).sum() == 15
    history = {"index": 0, "history": tf.zeros([5, 2], tf.int32), "history_lengths": tf.fill([5], 2)}
    for penalty in (0.0, -2.0, float("nan")):
        options = SamplingOptions(repetition_penalty=tf.constant(penalty))
        np.testing.assert_array_equal(constrain(logits, options, **history), logits)


def test_top_k_keeps_ties_and_zero_rows_pass():
    scores = filter_scores(tf.constant([[1.0, 3.0, 1.0, 0.0]]), SamplingOptions(top_k=2))
    np.testing.assert_array_equal(scores, [[-2.0, 0.0, -2.0, -INF]])
    for top_k in (2, tf.constant([], tf.int32), tf.constant(3)):
        options = SamplingOptions(top_k=top_k, top_p=0.5, min_p=0.1)
        assert sample(tf.zeros([0, 9]), options, seeds=tf.zeros([0], tf.int64)).shape == [0]
        signature = [tf.TensorSpec([None, 9], tf.float32), tf.TensorSpec([None], tf.int64)]
        draw = tf.function(lambda x, seeds: sample(x, options, seeds=seeds), input_signature=signature)  # noqa: B023
        assert draw(tf.zeros([0, 9]), tf.zeros([0], tf.int64)).shape == [0]


def test_padding_and_foreign_ids_of_the_history_do_not_count():
    logits = tf.ones([2, 4])
    history = tf.constant([[1, 9, -1, 3], [2, 0, 0, 0]])
    given = {"index": 0, "history": history, "history_lengths": tf.constant([3, 1])}
    scores = constrain(logits, SamplingOptions(repetition_penalty=2.0), **given)
    np.testing.assert_array_equal(scores, [[1.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 1.0]])
    scores = constrain(logits, SamplingOptions(no_repeat_ngram_size=1), **given)
    np.testing.assert_array_equal(scores, [[1.0, -INF, 1.0, 1.0], [1.0, 1.0, -INF, 1.0]])
    longer_than_history = SamplingOptions(no_repeat_ngram_size=9)
    np.testing.assert_array_equal(constrain(logits, longer_than_history, **given), logits)


def test_rules_that_leave_no_token_are_dropped():
    logits = tf.constant([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    options = SamplingOptions(no_repeat_ngram_size=1, suppressed_token_ids=(1,))
    history = tf.constant([[0, 2], [0, 0]])
    scores = constrain(logits, options, index=2, history=history, history_lengths=tf.constant([2, 2]))
    np.testing.assert_array_equal(scores, [[1.0, 3.0, 2.0], [-INF, -INF, 2.0]])


def test_words_that_may_not_come_whole():
    """One may begin in the prompt, or be one token; one that is longer than the text has not begun."""
    history = tf.constant([[3, 1, 2, 0], [1, 2, 9, 9], [2, 9, 9, 9]])
    options = SamplingOptions(bad_words_ids=[[1, 2, 0], [2, 3], [3, 3, 1, 2, 1]])
    scores = constrain(tf.ones([3, 4]), options, index=1, history=history, history_lengths=tf.constant([3, 2, 1]))
    np.testing.assert_array_equal(np.isneginf(scores), [[1, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1]])
    scores = constrain(tf.ones([1, 4]), SamplingOptions(bad_words_ids=[[2], [3]]), index=0)
    np.testing.assert_array_equal(np.isneginf(scores), [[0, 0, 1, 1]])
    assert not SamplingOptions(bad_words_ids=[[2]]).needs_history


def test_a_forced_first_token_wins_over_all_rules():
    options = SamplingOptions(forced_bos_token_id=2, suppressed_token_ids=(2,))
    for index, expected in ((0, [-INF, -INF, 0.0, -INF]), (1, [1.0, 1.0, -INF, 1.0])):
        np.testing.assert_array_equal(constrain(tf.ones([2, 4]), options, index=tf.constant(index)), [expected] * 2)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum()


@pytest.fixture(scope="module")
def draws():
    """[2, N], the tokens 0 and 1 of N rows with neighbouring seeds and the same logits, and their distribution."""
    rows = 20_000
    logits = tf.constant([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 0.0, 0.3])
    draw = tf.function(
        lambda index: sample(tf.tile(logits[None], [rows, 1]), SamplingOptions(), seeds=tf.range(rows), index=index)
    )
    return np.stack([draw(tf.constant(index)) for index in (0, 1)]), tf.nn.softmax(logits).numpy()


def test_draws_follow_the_softmax_over_seeds(draws):
    tokens, probabilities = draws
    for index in (0, 1):
        # 99.9% quantile of chi-square with 7 degrees of freedom: 24.3.
        assert chi_square(np.bincount(tokens[index], minlength=8), probabilities) < 24.3


def test_draws_of_neighbouring_tokens_and_seeds_are_independent(draws):
    tokens, probabilities = draws
    joint = np.outer(probabilities, probabilities).reshape(-1)
    # 99.9% quantile of chi-square with 63 degrees of freedom: 103.4.
    assert chi_square(np.bincount(tokens[0] * 8 + tokens[1], minlength=64), joint) < 103.4
    assert chi_square(np.bincount(tokens[0, 1::2] * 8 + tokens[0, ::2], minlength=64), joint) < 103.4


def test_noise_is_gumbel_finite_and_fixed():
    noise = gumbel_noise(tf.constant([3, 2**40 + 3]), 5, 50_000).numpy()
    assert np.isfinite(noise).all()
    np.testing.assert_allclose(noise.mean(axis=-1), np.euler_gamma, atol=0.02)
    np.testing.assert_allclose(noise.var(axis=-1), np.pi**2 / 6, atol=0.06)
    assert abs(np.corrcoef(noise)[0, 1]) < 0.02, "seeds that differ above 32 bits must differ"
    pinned = [-0.345349, 1.227053, 3.366351]
    np.testing.assert_allclose(noise[0, :3], pinned, rtol=1e-5, err_msg="seeded generations would change")


def test_a_row_draws_the_same_alone_and_anywhere_in_a_batch(logits):
    options = SamplingOptions(temperature=1.3, top_k=200, top_p=0.95)
    seeds = tf.constant([11, -4, 11, 0, 2**50], tf.int64)
    together = sample(logits, options, seeds=seeds, index=9).numpy()
    backwards = sample(logits[::-1], options, seeds=seeds[::-1], index=9).numpy()
    np.testing.assert_array_equal(backwards[::-1], together)
    for row in range(5):
        alone = sample(logits[row : row + 1], options, seeds=seeds[row : row + 1], index=9).numpy()
        np.testing.assert_array_equal(alone, together[row : row + 1])


def test_greedy_rows_of_a_temperature_tensor_take_the_most_likely_token(logits):
    options = SamplingOptions(temperature=tf.constant([0.0, 1.0, 0.0, 1.0, 0.0]), top_p=0.9)
    tokens = sample(logits, options, seeds=tf.range(5)).numpy()
    drawn = sample(logits, SamplingOptions(top_p=0.9), seeds=tf.range(5)).numpy()
    likely = tf.argmax(logits, -1).numpy()
    np.testing.assert_array_equal(tokens, np.where([1, 0, 1, 0, 1], likely, drawn))
    assert (drawn != likely).any()


def test_fields_that_are_off_add_nothing_to_the_graph():
    off = SamplingOptions(temperature=0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.0)
    signature = tf.TensorSpec([None, 100], tf.float32)
    graph = tf.function(lambda x: sample(constrain(x, off, index=0), off)).get_concrete_function(signature).graph
    kinds = {operation.type for operation in graph.get_operations()}
    assert not kinds & {"TopKV2", "Sort", "StatelessRandomUniformFullIntV2", "While", "Exp", "ScatterNd"}, kinds


def test_chosen_log_probs(logits):
    tokens = tf.constant([0, 5, 2999, 17, 3])
    expected = tf.gather(tf.nn.log_softmax(logits), tokens, axis=1, batch_dims=1)
    np.testing.assert_allclose(chosen_log_probs(logits, tokens), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("bad_words_ids", ((),)),
        ("bad_words_ids", ((1, -1),)),
        ("forced_bos_token_id", -1),
        ("temperature", None),
        ("temperature", INF),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", "0.5"),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", INF),
        ("no_repeat_ngram_size", 0),
        ("no_repeat_ngram_size", tf.constant(2)),
        ("min_new_tokens", -1),
        ("min_new_tokens", None),
        ("stop_sequences", ((),)),
        ("stop_sequences", ((1, -2),)),
        ("suppressed_token_ids", (-1,)),
    ],
)
def test_bad_options_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingOptions(**{field: value})


def test_options_can_be_keys_and_take_lists():
    options = SamplingOptions(stop_sequences=[[1, 2], np.array([3])], suppressed_token_ids=[4])
    same = SamplingOptions(stop_sequences=((1, 2), (3,)), suppressed_token_ids=(4,))
    assert hash(options) == hash(same)
    assert options == same
