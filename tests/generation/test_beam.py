"""Beam search around a hand-made step: against a search in plain Python, all texts there are, and its exports."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import EOS, MODEL, PAD, PROMPTS, VOCAB_SIZE, generate, padded

from lmzoo.generation import BeamOptions, BeamSearch, SamplingOptions

INF = float("inf")


def reorder(cache, rows):
    """The cache of the toy model: all but the number of the next slot has rows."""
    return {name: each if name == "next" else tf.gather(each, rows) for name, each in cache.items()}


def searcher(beams, max_new_tokens=6, eos=EOS, options=None):
    return BeamSearch(
        MODEL.step,
        MODEL.init_cache,
        reorder,
        max_new_tokens=max_new_tokens,
        beams=BeamOptions(**beams),
        options=options,
        eos_token_id=eos,
        pad_token_id=PAD,
    )


def search(prompts, max_new_tokens=6, eos=EOS, options=None, limits=None, **beams):
    beams.setdefault("num_return_sequences", beams["num_beams"])
    result = searcher(beams, max_new_tokens, eos, options)(*padded(prompts), limits=limits)
    return type(result)(*(each.numpy() for each in result))


def texts_of(result, row):
    """[(score, tokens)] of a row without the padding, which is checked."""
    texts = []
    for score, tokens, length in zip(
        *(each[row] for each in (result.scores, result.token_ids, result.lengths)), strict=True
    ):
        assert (tokens[length:] == PAD).all()
        texts.append((float(score), tokens[:length].tolist()))
    return texts


def log_probs(tokens):
    logits = MODEL.logits(tokens).astype("float64")
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def plain_search(
    prompt,
    limit=6,
    ends=(EOS,),
    rule=lambda scores, text, new: scores,
    *,
    num_beams,
    length_penalty=1.0,
    early_stopping=False,
    num_beam_groups=1,
    diversity_penalty=0.0,
):
    """The same with lists, a text at a time."""
    size = num_beams // num_beam_groups
    groups = [{"beams": [(0.0, [])], "ended": [], "open": True} for _ in range(num_beam_groups)]
    for length in range(1, limit + 1):
        chosen = np.zeros(VOCAB_SIZE)
        for group in groups:
            candidates = []
            for total, new in group["beams"]:
                scores = rule(log_probs([*prompt, *new]), [*prompt, *new], new)
                for token, score in enumerate(scores):
                    by = total + score - diversity_penalty * chosen[token]
                    candidates.append((by, total + score, [*new, token]))
            candidates.sort(key=lambda each: -each[0])
            going = []
            for rank, (_, total, new) in enumerate(candidates[: size * (1 + max(1, len(ends)))]):
                if new[-1] in ends or length == limit:
                    if rank < size and group["open"]:
                        group["ended"].append((total / length**length_penalty, new))
                elif len(going) < size:
                    going.append((total, new))
            group["ended"] = sorted(group["ended"], key=lambda each: -each[0])[:size]
            group["beams"] = going
            for _, new in going or [each[1:] for each in candidates[:size]]:
                chosen[new[-1]] += 1
            if len(group["ended"]) == size and going:
                longest = limit if early_stopping == "never" and length_penalty > 0 else length
                best = going[0][0] / longest**length_penalty
                group["open"] &= early_stopping is not True and best > group["ended"][-1][0]
    return sorted((text for group in groups for text in group["ended"]), key=lambda each: -each[0])


def assert_found(result, expected):
    for row, texts in enumerate(expected):
        actual = texts_of(result, row)
        assert [tokens for _, tokens in actual] == [tokens for _, tokens in texts]
        np.testing.assert_allclose([score for score, _ in actual], [score for score, _ in texts], rtol=0, atol=1e-4)


def frequent_end():
    """A token that most searches come to, so that texts of all lengths end in it."""
    found = [plain_search(prompt, 6, (), num_beams=4) for prompt in PROMPTS]
    counts = np.bincount([token for texts in found for _, tokens in texts for token in tokens[1:4]])
    return int(counts.argmax())


END = frequent_end()
SETTINGS = [
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 2, "length_penalty": -0.5},
    {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.5},
    {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 0.7, "early_stopping": True},
]


@pytest.mark.parametrize("beams", SETTINGS, ids=str)
def test_it_finds_what_a_plain_search_finds(beams):
    """For prompts of different lengths in one batch, and with one end token or two."""
    for ends in ((END,), (END, (END + 5) % VOCAB_SIZE)):
        result = search(PROMPTS, eos=ends, **beams)
        assert_found(result, [plain_search(prompt, ends=ends, **beams) for prompt in PROMPTS])
    assert (result.lengths < 6).any()
    expected = np.isin(np.take_along_axis(result.token_ids, result.lengths[..., None] - 1, axis=-1)[..., 0], ends)
    np.testing.assert_array_equal(result.end_lengths, expected.astype(int))


@settings(max_examples=6)
@given(
    prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8),
    end=st.integers(0, VOCAB_SIZE - 1),
    length_penalty=st.sampled_from([0.6, 1.0, 2.0]),
    early_stopping=st.sampled_from([False, True, "never"]),
)
def test_on_random_prompts(prompt, end, length_penalty, early_stopping):
    beams = {"num_beams": 4, "length_penalty": length_penalty, "early_stopping": early_stopping}
    assert_found(search([prompt], 5, end, **beams), [plain_search(prompt, 5, (end,), **beams)])


def test_beams_that_hold_everything_find_the_best_of_all_texts():
    prompt = [5, 3, 9]
    texts = []
    for first, second in itertools.product(range(VOCAB_SIZE), repeat=2):
        one = log_probs(prompt)[first]
        if first != END:
            texts.append(((one + log_probs([*prompt, first])[second]) / 2, [first, second]))
        elif second == 0:
            texts.append((one, [first]))
    texts.sort(key=lambda each: -each[0])
    result = search([prompt], 2, END, num_beams=VOCAB_SIZE, num_return_sequences=5)
    assert_found(result, [texts[:5]])


def test_one_beam_is_greedy():
    result = search(PROMPTS, 9, END, num_beams=1, early_stopping=True)
    greedy = generate(PROMPTS, max_new_tokens=9, eos=END)
    np.testing.assert_array_equal(result.token_ids[:, 0], greedy.token_ids)
    np.testing.assert_array_equal(result.lengths[:, 0], greedy.lengths)


def test_a_row_finds_the_same_alone_and_in_a_batch():
    beams = {"num_beams": 3, "length_penalty": 0.6}
    together = search(PROMPTS, 8, END, **beams)
    for row, prompt in enumerate(PROMPTS):
        alone = search([prompt], 8, END, **beams)
        np.testing.assert_array_equal(alone.token_ids[0], together.token_ids[row])
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-5)


def test_limits_of_rows():
    limits = [6, 1, 3, 0, 2]
    result = search(PROMPTS, 6, END, limits=limits, num_beams=3, early_stopping="never")
    expected = [
        plain_search(p, n, (END,), num_beams=3, early_stopping="never") for p, n in zip(PROMPTS, limits, strict=True)
    ]
    expected[3] = [(-INF, [])] * 3
    assert_found(result, expected)


def test_no_rows():
    result = search([], num_beams=4)
    assert (result.token_ids.shape, result.scores.shape) == ((0, 4, 6), (0, 4))


def test_fewer_texts_than_beams():
    """A forced token that is the last one: there is one text, and nothing is made up beside it."""
    for limit, end in ((1, END), (4, 7)):
        result = search([[5, 3]], limit, end, num_beams=4, options=SamplingOptions(forced_bos_token_id=7))
        assert_found(result, [[(0.0, [7])] + [(-INF, [])] * 3])


def forbid(tokens):
    def rule(scores, text, new):
        scores = scores.copy()
        scores[list(tokens(text, new))] = -INF
        return scores

    return rule


RULES = {
    "suppressed": ({"suppressed_token_ids": (3, 9)}, forbid(lambda text, new: (3, 9))),
    "shortest": ({"min_new_tokens": 4}, forbid(lambda text, new: (END,) if len(new) < 4 else ())),
    "n-grams": ({"no_repeat_ngram_size": 1}, forbid(lambda text, new: text)),
    "words": (
        {"bad_words_ids": ((5,), *((a, b) for a in range(0, 23, 2) for b in range(12)))},
        forbid(lambda text, new: (5, *(range(12) if text[-1] % 2 == 0 else ()))),
    ),
    "penalty": (
        {"repetition_penalty": 1.5},
        lambda scores, text, new: np.where(np.isin(np.arange(VOCAB_SIZE), text), scores * 1.5, scores),
    ),
    "first": (
        {"forced_bos_token_id": 7},
        lambda scores, text, new: scores if new else np.where(np.arange(VOCAB_SIZE) == 7, 0.0, -INF),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    """They see the text of their own beam, whatever beam it came from; a penalty counts in the score."""
    options, rule = RULES[name]
    result = search(PROMPTS, 6, END, SamplingOptions(**options), num_beams=3)
    expected = [plain_search(prompt, 6, (END,), rule, num_beams=3) for prompt in PROMPTS]
    free = search(PROMPTS, 6, END, num_beams=3)
    assert (result.token_ids != free.token_ids).any()
    assert_found(result, expected)


def test_stop_sequences_end_a_text():
    free = search(PROMPTS, 8, None, num_beams=3)
    stop = tuple(free.token_ids[0, 0, 2:4].tolist())
    result = search(PROMPTS, 8, None, SamplingOptions(stop_sequences=(stop,)), num_beams=3)
    ended = [tokens for row in range(5) for _, tokens in texts_of(result, row) if len(tokens) < 8]
    assert ended
    assert all(tuple(tokens[-2:]) == stop for tokens in ended)
    assert sorted(set(result.end_lengths.ravel())) == [0, 2]


def test_groups_are_diverse_and_scores_are_without_the_penalty():
    result = search(PROMPTS, 5, None, num_beams=4, num_beam_groups=4, diversity_penalty=100.0)
    for row, prompt in enumerate(PROMPTS):
        texts = texts_of(result, row)
        for place in range(5):
            assert len({tokens[place] for _, tokens in texts}) == 4
        for score, tokens in texts:
            total = sum(log_probs([*prompt, *tokens[:place]])[token] for place, token in enumerate(tokens))
            assert score == pytest.approx(total / 5, abs=1e-4)


def module_of(beams, options=None):
    module = tf.Module()
    find = searcher(beams, 6, END, options)
    module.run = tf.function(
        lambda token_ids, lengths: find(token_ids, lengths)._asdict(),
        input_signature=[tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)],
        autograph=False,
    )
    return module


ALL_RULES = SamplingOptions(no_repeat_ngram_size=2, repetition_penalty=1.2, bad_words_ids=((1, 2),), min_new_tokens=2)


@pytest.mark.parametrize("options", [None, ALL_RULES], ids=["plain", "rules"])
def test_it_is_one_graph_for_batches_of_all_shapes(tmp_path, options):
    beams = {"num_beams": 4, "num_return_sequences": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}
    module = module_of(beams, options)
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for prompts in (PROMPTS, PROMPTS[1:2], []):
        expected = search(prompts, 6, END, options, **beams)
        found = loaded.run(*padded(prompts))
        np.testing.assert_array_equal(found["token_ids"], expected.token_ids)
        np.testing.assert_allclose(found["scores"], expected.scores, rtol=1e-5)


@pytest.mark.slow
def test_it_converts_to_tflite_builtins():
    token_ids, lengths = padded(PROMPTS, filler=0)
    find = searcher({"num_beams": 3, "num_return_sequences": 3}, 6, END)
    module = tf.Module()
    module.run = tf.function(
        lambda token_ids, lengths: tuple(find(token_ids, lengths)),
        input_signature=[tf.TensorSpec(token_ids.shape, tf.int32), tf.TensorSpec(lengths.shape, tf.int32)],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.run.get_concrete_function()], module)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    result = interpreter.get_signature_runner()(token_ids=token_ids, lengths=lengths)
    expected = module.run(token_ids, lengths)
    np.testing.assert_array_equal(result["output_0"], expected[0])
    np.testing.assert_allclose(result["output_3"], expected[3], rtol=1e-4)


def test_it_compiles_with_xla():
    find = searcher({"num_beams": 3, "num_return_sequences": 3}, 6, END)
    run = tf.function(lambda: find(*padded(PROMPTS)).token_ids, jit_compile=True)
    np.testing.assert_array_equal(run(), search(PROMPTS, 6, END, num_beams=3).token_ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 .* must be at most num_beams"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups=3 with num_beams=4: must be a divisor"),
        ({"length_penalty": INF}, "length_penalty=inf"),
        ({"early_stopping": "always"}, "early_stopping='always'"),
        ({"diversity_penalty": -1.0}, "diversity_penalty=-1.0"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BeamOptions(**fields)


@pytest.mark.parametrize("draws", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_search_that_is_to_draw_is_refused(draws):
    with pytest.raises(ValueError, match=r"a beam search draws nothing, so leave it out"):
        searcher({}, options=SamplingOptions(**draws))
