"""Beam search of GPT-2 and T5 against transformers: the same texts, in the same order, with the same scores."""

from __future__ import annotations

import functools
import tempfile

import numpy as np
import pytest
from test_t5_golden import SCRIPT

from lmzoo.models import load_pretrained

pytestmark = pytest.mark.parity
ROWS, LENGTH, NEW, VOCAB_SIZE, END = 4, 6, 10, 31, 1
SETTINGS = [
    {"length_penalty": 0.6, "early_stopping": False},
    {"length_penalty": 1.0, "early_stopping": True},
    {"length_penalty": 2.0, "early_stopping": "never"},
]
MORE_SETTINGS = [
    {"length_penalty": penalty, "early_stopping": early_stopping}
    for penalty in (0.6, 1.0, 2.0, -1.0)
    for early_stopping in (False, True, "never")
]
RULES = [
    ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {}),
    ({"min_new_tokens": 4, "bad_words_ids": [[5], [3, 7], [9, 9], [2, 4, 6]]}, {"suppressed_token_ids": (8, 11)}),
]


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("torch")
    logging = pytest.importorskip("transformers").utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def make_t5(seed):
    """Its distributions are peaked, and the end is among the likely tokens now and then."""
    shape = {**SCRIPT["SHAPE"], "d_model": 16, "d_kv": 6, "d_ff": 24}
    model = SCRIPT["make_model"](seed, untied=True, scale=0.5, **shape)
    return with_likely_end(model, model.lm_head.weight)


def make_gpt(seed):
    import torch
    import transformers

    shape = {"vocab_size": VOCAB_SIZE, "n_positions": LENGTH + NEW, "n_embd": 16, "n_layer": 2, "n_head": 2}
    torch.manual_seed(seed)
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ids)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return with_likely_end(model, model.lm_head.weight)


def with_likely_end(model, head):
    """A long row of the head: its score is often the highest, and as often the lowest."""
    import torch

    with torch.no_grad():
        head[END] *= 1.7
    return model


MAKERS = {"t5": make_t5, "gpt2": make_gpt}


@functools.cache
def ours_of(kind):
    """One model, so that it is compiled once; each case loads its own weights."""
    with tempfile.TemporaryDirectory() as directory:
        MAKERS[kind](0).save_pretrained(directory)
        return load_pretrained(directory)


def compare(kind, seed, settings, ours_only=None):
    """Lengths of the texts that are the same for both."""
    import torch

    theirs, ours = MAKERS[kind](seed), ours_of(kind)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours.load_pretrained_weights(directory)
    ids = np.random.default_rng(seed).integers(2, VOCAB_SIZE, (ROWS, LENGTH)).astype("int32")
    mask = np.ones((ROWS, LENGTH), bool)
    if kind == "t5":
        mask[0, 4:] = mask[1, :3] = False
    settings = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": NEW, **settings}
    ours_only = ours_only or {}
    suppressed = list(ours_only.get("suppressed_token_ids", ())) or None
    result = theirs.generate(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
        suppress_tokens=suppressed,
    )
    start = 1 if kind == "t5" else LENGTH
    expected = SCRIPT["padded_after_end"](result.sequences.numpy()[:, start:], NEW, END)
    found = ours.beam_search({"token_ids": ids, "padding_mask": mask}, **settings, **ours_only)
    np.testing.assert_array_equal(np.reshape(found.token_ids, (-1, NEW)), expected)
    np.testing.assert_allclose(np.ravel(found.scores), result.sequences_scores, rtol=2e-6, atol=1e-4)
    return np.ravel(found.lengths)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_texts_and_scores(kind, settings):
    lengths = np.concatenate([compare(kind, seed, settings) for seed in range(4)])
    if settings["length_penalty"] <= 1.0:  # Above that, the longest texts win.
        assert (lengths < NEW).sum() >= 8
        assert len(set(lengths)) >= 3


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rules(kind, rules):
    """n-grams and penalties look at what was read too: the prompt of GPT-2, the start token of T5."""
    for seed in range(2):
        compare(kind, seed, *rules)


def test_a_forced_first_token():
    for seed in range(2):
        compare("t5", seed, {"forced_bos_token_id": 9})


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("settings", MORE_SETTINGS, ids=str)
def test_texts_and_scores_of_many_models(kind, settings):
    for seed in range(100, 104):
        compare(kind, seed, settings)
