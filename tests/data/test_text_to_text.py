import json
import math

import numpy as np
import pytest
from denoised import texts_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_texts import training_text

from lmzoo.data.corruption import SentinelFacts
from lmzoo.data.labelled import Examples, LabelledBatches, Ragged
from lmzoo.data.records import Records, read_records
from lmzoo.data.text_to_text import Mixture, encode_text_to_text, mixing_rates, pack_pairs
from lmzoo.data.tokenizers import Tokenizer

EOS, START = 1, 2  # those of `denoised.texts_of`


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter([training_text()]), kind="byte")


def pairs(lengths, first=10):
    """Examples of (source, target) lengths, their ends included; each has a token of its own, `first` and so on."""
    sources = [[first + number] * (length - 1) + [EOS] for number, (length, _) in enumerate(lengths)]
    targets = [[first + number] * (length - 1) + [EOS] for number, (_, length) in enumerate(lengths)]
    return Examples(
        {"token_ids": Ragged(sources), "decoder_token_ids": Ragged([[START, *target[:-1]] for target in targets])},
        Ragged(targets),
        Ragged([[1.0] * len(target) for target in targets], np.float32),
        0,
        np.arange(len(lengths)),
    )


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv"])
def test_sources_and_targets_of_a_file(tmp_path, tokenizer, kind):
    rows = [{"en": "a house", "de": "ein Haus"}, {"en": "no", "de": "nein, nein"}]
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        mark = "\t" if kind == "tsv" else ","
        quote = '"' if kind == "csv" else ""
        lines = [mark.join(("en", "de"))] + [
            mark.join(f"{quote}{row[key]}{quote}" for key in ("en", "de")) for row in rows
        ]
        path.write_text("\n".join(lines), encoding="utf-8")
    examples = encode_text_to_text(
        read_records(path),
        tokenizer,
        source="en",
        target="de",
        prefix="translate: ",
        max_source_length=15,
        max_target_length=9,
    )
    facts = SentinelFacts.of(tokenizer)
    inputs, labels, weights = LabelledBatches(examples, 2, shuffle=False).batch_at(0)
    assert list(inputs) == ["token_ids", "padding_mask", "decoder_token_ids"]
    assert inputs["token_ids"].shape == (2, 16)  # The next multiple of 8.
    real = weights > 0
    expected = [
        ("translate: no", "nein, ne"),
        ("translate: a h", "ein Haus"),
    ]  # The shorter one first; cut to 15 and 9.
    for row, (source, target) in enumerate(expected):
        read, written = inputs["token_ids"][row][inputs["padding_mask"][row]], labels[row][real[row]]
        assert read.tolist() == [*tokenizer.encode(source), facts.eos_token_id]
        assert written.tolist() == [*tokenizer.encode(target), facts.eos_token_id]
        decoder = inputs["decoder_token_ids"][row]
        assert decoder[real[row]].tolist() == [facts.start_token_id, *written[:-1]]
        assert (decoder[~real[row]] == facts.pad_token_id).all()


def test_what_cannot_be_encoded_is_told(tokenizer):
    records = Records([{"a": "x", "b": 1}])
    with pytest.raises(ValueError, match="record 1: no field 'c'"):
        encode_text_to_text(records, tokenizer, source="c", target="a")
    with pytest.raises(ValueError, match="the field 'b' is 1; it must be a string"):
        encode_text_to_text(records, tokenizer, source="a", target="b")
    with pytest.raises(ValueError, match="max_target_length: 0; it must be at least 1"):
        encode_text_to_text(records, tokenizer, source="a", target="a", max_target_length=0)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=30),
    st.integers(20, 40),
    st.integers(12, 40),
)
def test_packed_rows_hold_each_pair_once(lengths, source_length, target_length):
    packed = pack_pairs(pairs(lengths), source_length, target_length)
    batches = LabelledBatches(packed, 2, width=source_length, decoder_width=target_length)
    found = []
    for step in range(batches.num_batches):
        inputs, labels, weights = batches.batch_at(step)
        assert inputs["token_ids"].shape == (2, source_length)
        assert labels.shape == weights.shape == inputs["decoder_positions"].shape == (2, target_length)
        found += texts_of((inputs, labels, weights))
        for side in ("", "decoder_"):
            begins = np.diff(inputs[f"{side}segment_ids"], axis=1, prepend=0) > 0
            assert not inputs[f"{side}positions"][begins].any()
            steps = np.diff(inputs[f"{side}positions"], axis=1)
            assert (steps[~begins[:, 1:] & (inputs[f"{side}segment_ids"][:, 1:] > 0)] == 1).all()
    expected = [([10 + n] * (one - 1), [10 + n] * (two - 1)) for n, (one, two) in enumerate(lengths)]
    assert sorted(found) == sorted(expected)


def test_packed_rows_are_full():
    random = np.random.default_rng(0)
    sources = random.integers(5, 60, 2000)
    packed = pack_pairs(pairs([(int(n), int(n * 0.8) + 1) for n in sources]), 256, 208)
    assert packed.inputs["token_ids"].lengths.mean() > 0.95 * 256
    with pytest.raises(ValueError, match="decoder_token_ids: a text of 9 tokens, but rows have 8 places"):
        pack_pairs(pairs([(3, 9)]), 8, 8)


def test_rates():
    np.testing.assert_allclose(mixing_rates([100, 300]), [0.25, 0.75])
    np.testing.assert_allclose(mixing_rates([100, 1000, 400], cap=400), [1 / 9, 4 / 9, 4 / 9])
    np.testing.assert_allclose(mixing_rates([100, 400], temperature=2.0), [1 / 3, 2 / 3])
    np.testing.assert_allclose(mixing_rates([1, 10**9, 5], temperature=math.inf), [1 / 3] * 3)
    for wrong, message in [
        ({"cap": 0}, "cap: 0"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"sizes": []}, "sizes"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixing_rates(**{"sizes": [1, 2], **wrong})


def test_a_mixture_draws_tasks_at_their_rates_and_their_examples_equally_often():
    tasks = [pairs([(3, 3)] * 500), pairs([(4, 4)] * 3000), pairs([(5, 5)] * 7)]
    mixture = Mixture.of(tasks, temperature=2.0)
    rates = mixing_rates([500, 3000, 7], temperature=2.0)
    drawn = np.concatenate([mixture.shuffled(5, epoch) for epoch in range(12)])
    task = np.searchsorted([500, 3500], drawn, side="right")
    np.testing.assert_allclose(np.bincount(task[:40_000]) / 40_000, rates, atol=1e-4)
    for start in range(0, 40_000, 4000):
        np.testing.assert_allclose(np.bincount(task[start : start + 4000]) / 4000, rates, atol=0.03)
    counts = np.bincount(drawn[:40_000], minlength=3507)
    for first, end in [(0, 500), (500, 3500), (3500, 3507)]:
        assert np.ptp(counts[first:end]) <= 1
    for number, length in [(0, 3), (500, 4), (3499, 4), (3500, 5)]:
        assert len(mixture.inputs["token_ids"][number]) == len(mixture.labels[number]) == length


def test_a_mixture_is_a_function_of_seed_and_epoch():
    mixture = Mixture.of([pairs([(3, 3)] * 50), pairs([(4, 4)] * 30)])
    np.testing.assert_array_equal(mixture.shuffled(5, 3), mixture.shuffled(5, 3))
    assert (mixture.shuffled(5, 3) != mixture.shuffled(5, 4)).mean() > 0.8
    assert (mixture.shuffled(5, 3) != mixture.shuffled(6, 3)).mean() > 0.8
    whole, resumed = (LabelledBatches(mixture, 8, seed=5, start=start, num_batches=20) for start in (0, 13))
    for one, other in zip(whole.batch_at(15)[0].values(), resumed.batch_at(2)[0].values(), strict=True):
        np.testing.assert_array_equal(one, other)
    everything = LabelledBatches(mixture, 8, shuffle=False)  # To evaluate on: each example once.
    numbers = np.concatenate([everything.rows_at(step) for step in range(everything.num_batches)])
    assert sorted(numbers) == list(range(80))


def test_tasks_that_cannot_be_mixed_are_told():
    packed = pack_pairs(pairs([(3, 3)]), 8, 8)
    with pytest.raises(ValueError, match="the tasks differ in their inputs"):
        Mixture.of([pairs([(3, 3)]), packed])
