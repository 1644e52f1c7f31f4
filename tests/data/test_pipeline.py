import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmzoo.data import pipeline
from lmzoo.data.corpus import Corpus, CorpusWriter
from lmzoo.data.corruption import SentinelFacts
from lmzoo.data.denoising import PrefixLM
from lmzoo.data.objectives import Causal
from lmzoo.data.pipeline import Batches, permute

VOCABULARY = 1000
END = 0


def write_corpus(directory, lengths, seed=0, **settings):
    """Documents of random tokens that end with END."""
    tokens = np.random.default_rng(seed).integers(1, VOCABULARY, sum(lengths))
    tokens[np.cumsum(lengths) - 1] = END
    with CorpusWriter.create(directory, vocab_size=VOCABULARY, tokenizer_fingerprint="x", **settings) as writer:
        writer.add(tokens, lengths, num_bytes=100)
    return Corpus.open(directory)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    lengths = np.random.default_rng(1).integers(1, 60, 50)
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c", lengths, shard_tokens=100)


def tokens_of(corpus):
    return corpus.take(np.arange(corpus.num_tokens))


def assert_same(first, second):
    assert list(first[0]) == list(second[0])
    for one, other in zip([*first[0].values(), *first[1:]], [*second[0].values(), *second[1:]], strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_permute_is_a_permutation(size, seed, epoch):
    everything = np.arange(size)
    mapped = permute(everything, size, seed, np.full(size, epoch))
    np.testing.assert_array_equal(np.sort(mapped), everything)


def test_a_part_of_a_run_is_that_of_the_whole(corpus):
    whole = Batches(corpus, Causal(), seq_length=16, batch_size=4, seed=3, epochs=2)
    part = whole.between(12, 22)
    assert (part.num_batches, whole.start_index, whole.epochs) == (3, 0, 2)
    assert_same(part.batch_at(0), Batches(corpus, Causal(), seq_length=16, batch_size=4, seed=3).batch_at(3))
    assert (part.batch_at(2)[2][2:] == 0).all()


@pytest.mark.parametrize("packing", ["stream", "pad", "best-fit"])
def test_the_share_of_places_that_are_no_padding(corpus, packing):
    batches = Batches(corpus, Causal(), seq_length=16, batch_size=1, packing=packing, epochs=1)
    real = [batches.batch_at(step)[0]["segment_ids"] > 0 for step in range(batches.num_batches)]
    assert batches.real_share == pytest.approx(np.mean(real))


def test_the_share_of_both_sides_is_taken_from_a_sample(corpus, monkeypatch):
    objective = PrefixLM(SentinelFacts(1))
    batches = Batches(corpus, objective, seq_length=16, batch_size=1, packing="pad", epochs=1)
    assert batches.lengths == (16, 16)
    made = [batches.batch_at(step) for step in range(batches.num_batches)]
    real = [(inputs["padding_mask"].mean() + weights.mean()) / 2 for inputs, _, weights in made]
    monkeypatch.setattr(pipeline, "_SAMPLE", len(real))
    assert batches.real_share == pytest.approx(np.mean(real))
    part = Batches(corpus, objective, seq_length=16, batch_size=4, packing="pad", num_examples=7)
    assert part.spread(100).tolist() == list(range(7))
    assert part.spread(3).tolist() == [0, 2, 4]


def test_permute_of_one_position_is_that_of_all():
    size = 777
    epochs = np.repeat(np.arange(3), size)
    positions = np.tile(np.arange(size), 3)
    together = permute(positions, size, 5, epochs)
    some = np.random.default_rng(0).permutation(3 * size)[:50]
    np.testing.assert_array_equal(permute(positions[some], size, 5, epochs[some]), together[some])
    np.testing.assert_array_equal(np.sort(permute(np.arange(9), 2**40 + 9, 5, np.zeros(9, int))) < 2**40 + 9, True)


def test_permute_looks_random():
    epochs = 24_000
    orders = permute(np.tile(np.arange(4), epochs), 4, 11, np.repeat(np.arange(epochs), 4)).reshape(epochs, 4)
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 24  # every order of 4 rows is equally likely
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 49.7  # chi-squared, 23 degrees, p = 0.001
    size = 10_000
    mapped = permute(np.arange(size), size, 3, np.zeros(size, int))
    other = permute(np.arange(size), size, 3, np.ones(size, int))
    for one, two in [(mapped[:-1], mapped[1:]), (mapped, np.arange(size)), (mapped, other)]:
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.04
    assert (mapped == np.arange(size)).sum() < 10
    assert (mapped == other).sum() < 10
    halves = np.histogram2d(np.arange(size), mapped, bins=10)[0]
    assert ((halves - 100) ** 2 / 100).sum() < 160  # at most 149 at p = 0.001, were the cells free


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(["stream", "pad", "best-fit"]),
)
def test_one_pass_predicts_every_token_once(tmp_path_factory, lengths, seq_length, batch_size, packing):
    corpus = write_corpus(tmp_path_factory.mktemp("c") / "c", lengths)
    batches = Batches(corpus, Causal(), seq_length, batch_size, packing, shuffle=False, epochs=1)
    predicted, read = Counter(), Counter()
    for step in range(batches.num_batches):
        inputs, labels, weights = batches.batch_at(step)
        assert labels.shape == weights.shape == (batch_size, seq_length)
        read.update(inputs["token_ids"][inputs["segment_ids"] > 0].tolist())
        predicted.update(labels[weights > 0].tolist())
        assert set(np.unique(weights)) <= {0, 1}
        ends = inputs["token_ids"] == END
        assert not weights[ends].any()
        assert not labels[weights == 0].any()
    tokens = tokens_of(corpus)
    starts = corpus.document_ends - lengths
    assert read == Counter(tokens.tolist())
    assert predicted == Counter(np.delete(tokens, starts).tolist())  # all but the first of every document


def test_labels_are_the_next_tokens(corpus):
    inputs, labels, weights = Batches(corpus, Causal(), 16, 4, shuffle=False).batch_at(2)
    tokens = tokens_of(corpus)
    start = 2 * 4 * 16
    np.testing.assert_array_equal(inputs["token_ids"].reshape(-1), tokens[start : start + 64])
    following = tokens[start + 1 : start + 65]
    np.testing.assert_array_equal(labels.reshape(-1), following * (tokens[start : start + 64] != END))
    np.testing.assert_array_equal(weights.reshape(-1), tokens[start : start + 64] != END)
    assert list(inputs) == ["token_ids", "segment_ids", "positions"]
    assert [array.dtype for array in (*inputs.values(), labels, weights)] == [np.int32] * 4 + [np.float32]


def test_one_long_text(corpus):
    batches = Batches(corpus, Causal(separate_documents=False), 16, 4, shuffle=False, epochs=1)
    tokens = tokens_of(corpus)
    read, predicted, weight = [], [], 0
    for step in range(batches.num_batches):
        inputs, labels, weights = batches.batch_at(step)
        assert list(inputs) == ["token_ids"]
        read.append(inputs["token_ids"].reshape(-1))
        predicted.append(labels[weights > 0])
        weight += weights.sum()
    np.testing.assert_array_equal(np.concatenate(read)[: len(tokens)], tokens)
    np.testing.assert_array_equal(np.concatenate(predicted), tokens[1:])  # the first of the next document too
    assert weight == len(tokens) - 1
    with pytest.raises(ValueError, match="'best-fit' puts documents beside each other"):
        Batches(corpus, Causal(separate_documents=False), 16, 4, "best-fit")


def test_an_epoch_shows_every_row_once_and_the_next_one_in_another_order(corpus):
    batches = Batches(corpus, Causal(), 16, 4, seed=3)
    rows = batches.rows_at(np.arange(3 * batches.rows_per_epoch)).reshape(3, -1)
    for epoch in rows:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(batches.rows_per_epoch))
    assert (rows[0] != rows[1]).mean() > 0.8
    assert (rows[1] != rows[2]).mean() > 0.8
    assert (rows[0] != Batches(corpus, Causal(), 16, 4, seed=4).rows_at(np.arange(batches.rows_per_epoch))).mean() > 0.8
    plain = Batches(corpus, Causal(), 16, 4, shuffle=False)
    np.testing.assert_array_equal(plain.rows_at(np.array([0, 1, plain.rows_per_epoch])), [0, 1, 0])


def test_resuming_is_starting_at_an_index(corpus):
    whole = Batches(corpus, Causal(), 16, 4, seed=3, num_examples=90)
    resumed = Batches(corpus, Causal(), 16, 4, seed=3, num_examples=90, start_index=4 * 7)
    assert (whole.num_batches, resumed.num_batches) == (23, 16)
    for step in range(resumed.num_batches):
        assert_same(resumed.batch_at(step), whole.batch_at(step + 7))
    other_size = Batches(corpus, Causal(), 16, 14, seed=3, start_index=28).batch_at(0)
    for number in range(14):
        step, row = divmod(28 + number, 4)
        np.testing.assert_array_equal(other_size[1][number], whole.batch_at(step)[1][row])


def test_a_batch_does_not_depend_on_what_was_made_before(corpus):
    batches = Batches(corpus, Causal(), 16, 4, "best-fit", seed=3)
    forwards = [batches.batch_at(step) for step in range(6)]
    for step in (5, 0, 3):
        assert_same(Batches(corpus, Causal(), 16, 4, "best-fit", seed=3).batch_at(step), forwards[step])


def test_the_last_batch(corpus):
    rows = Batches(corpus, Causal(), 16, 7).rows_per_epoch
    assert rows % 7
    filled = Batches(corpus, Causal(), 16, 7, epochs=1)
    dropped = Batches(corpus, Causal(), 16, 7, epochs=1, drop_remainder=True)
    assert (filled.num_batches, dropped.num_batches) == (rows // 7 + 1, rows // 7)
    inputs, labels, weights = filled.batch_at(filled.num_batches - 1)
    for array in (*inputs.values(), labels, weights):
        assert array.shape == (7, 16)
        assert not array[rows % 7 :].any()
    assert weights[: rows % 7].any(axis=1).all()
    with pytest.raises(IndexError, match=f"no batch {rows // 7}; there are {rows // 7}"):
        dropped.batch_at(rows // 7)
    assert Batches(corpus, Causal(), 16, 7).num_batches is None
    assert Batches(corpus, Causal(), 16, 7, epochs=1, start_index=10**6).num_batches == 0


class Seeds(Causal):
    """An objective that shows the seeds it is given."""

    def __call__(self, rows):
        return {"seeds": rows.seeds.astype(np.int64)}, rows.next_token_ids, rows.has_next.astype(np.float32)


def test_every_example_has_its_own_seed(corpus):
    def seeds(seed, start_index):
        return Batches(corpus, Seeds(), 16, 100, seed=seed, start_index=start_index).batch_at(0)[0]["seeds"]

    np.testing.assert_array_equal(seeds(1, 0)[50:], seeds(1, 50)[:50])
    assert len({*seeds(1, 0), *seeds(1, 100), *seeds(2, 0), *seeds(3, 0)}) == 400
    assert len(np.unique(seeds(1, 0) & 0xFF)) > 60  # all bits vary


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seq_length": 0}, "seq_length: 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"seed": -1}, "seed: -1; it must be at least 0"),
        ({"start_index": -1}, "start_index: -1"),
        ({"num_examples": 0}, "num_examples: 0"),
        ({"epochs": 0}, "epochs: 0"),
        ({"epochs": 1, "num_examples": 1}, "give one of the two"),
        ({"packing": "tight"}, "packing: 'tight'"),
    ],
)
def test_bad_settings_are_told(corpus, wrong, message):
    with pytest.raises(ValueError, match=message):
        Batches(corpus, Causal(), **({"seq_length": 8, "batch_size": 2} | wrong))


def test_dataset_is_the_batches(corpus):
    for kwargs in ({"epochs": 1}, {"num_examples": 61, "start_index": 13}, {}):
        batches = Batches(corpus, Causal(), 16, 4, seed=3, **kwargs)
        dataset = batches.dataset()
        inputs, labels, weights = dataset.element_spec
        for spec in (*inputs.values(), labels, weights):
            assert spec.shape == (4, 16)
        assert int(dataset.cardinality()) == (-1 if batches.num_batches is None else batches.num_batches)
        made = list(dataset.take(40))
        assert len(made) == min(batches.num_batches or 40, 40)
        for step, batch in enumerate(made):
            assert_same(batch, batches.batch_at(step))


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 1), (3, 2), (1, 4), (12, 1)])
def test_shards_make_up_the_same_batches(corpus, shards, replicas):
    batches = Batches(corpus, Causal(), 16, 12, seed=3, epochs=1)
    parts = [iter(batches.dataset(shards, index, replicas)) for index in range(shards)]
    for step in range(batches.num_batches):
        slices = [next(part) for part in parts for _ in range(replicas)]
        labels = np.concatenate([labels for _, labels, _ in slices])
        inputs = {key: np.concatenate([inputs[key] for inputs, _, _ in slices]) for key in slices[0][0]}
        weights = np.concatenate([weights for _, _, weights in slices])
        assert_same((inputs, labels, weights), batches.batch_at(step))
    for part in parts:
        assert next(part, None) is None


def test_shards_that_do_not_fit_are_told(corpus):
    batches = Batches(corpus, Causal(), 16, 12)
    with pytest.raises(ValueError, match="batch_size: 12; it must be a multiple of 5 x 1 parts"):
        batches.dataset(5, 0)
    with pytest.raises(ValueError, match="shard_index: 2; with num_shards=2"):
        batches.dataset(2, 2)


def test_distributed_over_one_device(corpus):
    import tensorflow as tf

    batches = Batches(corpus, Causal(), 16, 12, seed=3, num_examples=36)
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    distributed = strategy.distribute_datasets_from_function(batches.dataset_fn)
    for step, batch in enumerate(distributed):
        assert_same(batch, batches.batch_at(step))
    assert step == 2


TWO_DEVICES = """
import sys
import numpy as np
import tensorflow as tf
from lmzoo.data.corpus import Corpus
from lmzoo.data.objectives import Causal
from lmzoo.data.pipeline import Batches

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
batches = Batches(Corpus.open(sys.argv[1]), Causal(), 16, 12, seed=3, epochs=1)
whole = strategy.experimental_distribute_dataset(batches.dataset())
slices = strategy.distribute_datasets_from_function(batches.dataset_fn)
assert whole.cardinality == batches.num_batches
for distributed in (whole, slices):
    steps = 0
    for step, (inputs, labels, weights) in enumerate(distributed):
        steps += 1
        expected_inputs, expected_labels, expected_weights = batches.batch_at(step)
        arrays = [*expected_inputs.values(), expected_labels, expected_weights]
        for got, expected in zip([*(inputs[key] for key in expected_inputs), labels, weights], arrays):
            first, second = (np.asarray(value) for value in strategy.experimental_local_results(got))
            assert len(first) == len(second) == 6
            np.testing.assert_array_equal(np.concatenate([first, second]), expected)
    assert steps == batches.num_batches, steps
print("same")
"""


@pytest.mark.distributed
def test_two_devices_share_the_same_batches(corpus):
    command = [sys.executable, "-c", TWO_DEVICES, corpus.directory]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "same", result.stderr[-3000:]


ENDS_WHILE_BATCHES_ARE_MADE = """
import sys
from lmzoo.data.corpus import Corpus
from lmzoo.data.objectives import Causal
from lmzoo.data.pipeline import Batches

dataset = Batches(Corpus.open(sys.argv[1]), Causal(), 16, 12).dataset()
iterators = [iter(dataset) for _ in range(100)]
for iterator in iterators:
    next(iterator)
print("done")
"""


def test_a_program_ends_though_batches_are_being_made(corpus):
    command = [sys.executable, "-c", ENDS_WHILE_BATCHES_ARE_MADE, corpus.directory]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr[-3000:]


def test_batch_at_needs_no_tensorflow(corpus):
    program = (
        "import sys; from lmzoo.data.corpus import Corpus; from lmzoo.data.objectives import Causal; "
        "from lmzoo.data.pipeline import Batches; Batches(Corpus.open(sys.argv[1]), Causal(), 16, 4).batch_at(0); "
        "print('tensorflow' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, corpus.directory], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
