import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from denoised import EOS, FACTS, FIRST, PAD, SENTINELS, START, V, pieces_of, put_back, texts_of, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import training_text

from lmzoo.data.corruption import Pieces, SentinelFacts, put_together, random_spans, replace_spans, span_counts
from lmzoo.data.denoising import UL2, DecoderLM, Denoiser, PrefixLM, SpanCorruption
from lmzoo.data.pipeline import Batches
from lmzoo.data.tokenizers import Tokenizer

MODES = SentinelFacts(EOS, SENTINELS, PAD, START, (("NLU", 7), ("NLG", 8), ("S2S", 9)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    lengths = np.random.default_rng(1).geometric(1 / 120, 1500)
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c", lengths)


def batches(corpus, objective, **settings):
    return Batches(corpus, objective, **{"seq_length": 128, "batch_size": 64, "seed": 7} | settings)


def all_texts(run):
    return [text for step in range(run.num_batches) for text in texts_of(run.batch_at(step))]


def spans_of(source, target):
    """Lengths of the spans of noise."""
    ends = [place for place, token in enumerate(target) if token in SENTINELS]
    return np.diff([*ends, len(target)]) - 1


@pytest.mark.parametrize(
    ("objective", "seq_length", "raw", "target"),
    [
        (SpanCorruption(FACTS), 512, 568, 114),  # Raffel et al. 2020
        (SpanCorruption(FACTS), 256, 284, 58),
        (SpanCorruption(FACTS, 0.5, 3.0), 128, 190, 128),
        (PrefixLM(FACTS), 100, 100, 100),
        (DecoderLM(FACTS), 100, 99, 100),
    ],
)
def test_a_row_is_made_of_as_many_tokens_as_fill_it(tmp_path, objective, seq_length, raw, target):
    assert len(objective.costs(seq_length)) - 1 == raw
    assert objective.target_length(seq_length) == target
    corpus = write_corpus(tmp_path / "c", [raw * 8])
    inputs, labels, weights = batches(corpus, objective, seq_length=seq_length, batch_size=8, epochs=1).batch_at(0)
    assert labels.shape == weights.shape == inputs["decoder_token_ids"].shape == (8, target)
    assert inputs["token_ids"].shape == inputs["padding_mask"].shape == (8, 1 if raw == 99 else seq_length)
    if not isinstance(objective, PrefixLM):
        assert inputs["padding_mask"].all()
        if objective != SpanCorruption(FACTS, 0.5, 3.0):
            assert weights.all()
    dtypes = [array.dtype for array in (*inputs.values(), labels, weights)]
    assert dtypes == [np.int32, np.bool_, np.int32, np.int32, np.float32]


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=15),
    st.integers(6, 40),
    st.sampled_from(
        [
            (SpanCorruption, {"noise_density": 0.15}),
            (SpanCorruption, {"noise_density": 0.5, "mean_span_length": 1.0}),
            (SpanCorruption, {"noise_density": 0.85, "mean_span_length": 2.5}),
            (UL2, {}),
            (UL2, {"modes": True}),
            (PrefixLM, {}),
        ]
    ),
    st.sampled_from(["stream", "pad", "best-fit"]),
    st.integers(0, 1000),
)
def test_a_pass_gives_every_text_back(tmp_path_factory, lengths, seq_length, kind, packing, seed):
    objective_class, arguments = kind
    objective = objective_class(MODES, separate_documents=packing == "best-fit", **arguments)
    corpus = write_corpus(tmp_path_factory.mktemp("c") / "c", lengths)
    run = batches(
        corpus, objective, seq_length=seq_length, batch_size=3, packing=packing, seed=seed, shuffle=False, epochs=1
    )
    texts = []
    for source, target in all_texts(run):
        if arguments.get("modes"):
            assert source.pop(0) in (7, 8, 9)
        texts.append(source + target if objective_class is PrefixLM else put_back(source, target))
    if packing == "stream":
        assert [*itertools.chain(*texts)] == corpus.take(np.arange(corpus.num_tokens)).tolist()
    else:
        assert sorted(map(tuple, texts)) == pieces_of(corpus, len(objective.costs(seq_length)) - 1)


def test_positions_count_in_each_document(corpus):
    run = batches(corpus, SpanCorruption(FACTS, separate_documents=True))
    inputs, _, _ = run.batch_at(0)
    assert list(inputs) == [
        *("token_ids", "segment_ids", "positions"),
        *("decoder_token_ids", "decoder_segment_ids", "decoder_positions"),
    ]
    assert inputs["segment_ids"].max() > 2
    for side in ("", "decoder_"):
        for segments, positions in zip(inputs[f"{side}segment_ids"], inputs[f"{side}positions"], strict=True):
            expected = np.zeros_like(positions)
            for number in range(1, segments.max() + 1):
                expected[segments == number] = np.arange((segments == number).sum())
            np.testing.assert_array_equal(positions, expected)
    assert (inputs["decoder_token_ids"][inputs["decoder_positions"] == 0] != START).sum() == (
        inputs["decoder_segment_ids"] == 0
    ).sum()  # The first token of each document, and no other, is the start.


def test_rows_of_documents_waste_little(corpus):
    """Cutting documents of 120 tokens on average into rows of 512 leaves less than 5% of the encoder's places empty."""
    run = batches(corpus, SpanCorruption(FACTS, separate_documents=True), seq_length=512, epochs=1)
    filled = [run.batch_at(step)[0]["segment_ids"] > 0 for step in range(run.num_batches)]
    rows = np.concatenate(filled)[: run.rows_per_epoch - 1]
    assert rows.mean() > 0.95


def test_noise_is_as_dense_and_spans_as_long_as_asked(corpus):
    for density, length in [(0.15, 3.0), (0.3, 6.0), (0.5, 5.0)]:
        run = batches(corpus, SpanCorruption(FACTS, density, length), seq_length=450, batch_size=16, epochs=1)
        texts = all_texts(run)[:-1]
        spans = np.concatenate([spans_of(*text) for text in texts])
        raw = len(texts) * (len(run.objective.costs(450)) - 1)
        assert spans.sum() / raw == pytest.approx(density, abs=0.004)
        assert spans.mean() == pytest.approx(length, rel=0.03)
        assert spans.min() == 1
        assert spans.max() > 2 * length  # They are no spans of one length.


def test_all_ways_to_cut_are_equally_likely():
    """Of 6 tokens of noise in 3 spans and 5 of text in 3, there are 10 x 6 ways."""
    rows = 60_000
    pieces = Pieces.of(np.ones((rows, 11), np.int32))
    counts = np.full(rows, 6), np.full(rows, 3)
    noise = random_spans(pieces, *counts, np.arange(rows).astype(np.uint64)).reshape(rows, 11)
    assert (noise.sum(1) == 6).all()
    assert not noise[:, 0].any()
    assert noise[:, -1].all()
    _, numbers = np.unique(noise, axis=0, return_counts=True)
    assert len(numbers) == 60
    assert ((numbers - 1000) ** 2 / 1000).sum() < 98.3  # chi-squared, 59 degrees, p = 0.001


def test_every_document_has_noise_of_its_own():
    """Also where it stands behind others of one token, which have none."""
    lengths = [[1, 7, 1, 1, 40, 2], [3, 1, 30, 12], [1], [25, 1, 2, 1, 1, 9]]
    segments = np.zeros((4, 60), np.int32)
    for row, sizes in zip(segments, lengths, strict=True):
        row[: sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    pieces = Pieces.of(segments)
    counts = span_counts(pieces.lengths, 0.3, 3.0)
    noise = random_spans(pieces, *counts, np.arange(4).astype(np.uint64))
    for piece, (length, tokens, spans) in enumerate(zip(itertools.chain(*lengths), *counts, strict=True)):
        mask = noise[pieces.number == piece]
        assert (len(mask), mask.sum()) == (length, tokens)
        if length > 1:
            assert (np.diff(mask.astype(int)) == 1).sum() == spans
            assert (mask[0], mask[-1]) == (False, True)


def test_a_row_is_the_same_in_any_batch():
    segments = np.ones((50, 300), np.int32)
    segments[:, 100:] = 2
    segments[::3, 250:] = 0
    segments[1::3, 101:] = 3
    seeds = np.random.default_rng(0).integers(0, 2**63, 50).astype(np.uint64)

    def noise(rows):
        pieces = Pieces.of(segments[rows])
        counts = span_counts(pieces.lengths, 0.3, 3.0)
        full = np.zeros((len(rows), 300), bool)
        full[pieces.real] = random_spans(pieces, *counts, seeds[rows])
        return full

    together = noise(np.arange(50))
    for row in range(50):
        np.testing.assert_array_equal(noise(np.array([row]))[0], together[row])


def test_an_example_is_the_same_whenever_it_is_made_and_another_in_each_epoch(corpus):
    for objective in (
        SpanCorruption(FACTS),
        SpanCorruption(FACTS, separate_documents=True),
        UL2(MODES, modes=True),
        PrefixLM(FACTS),
    ):
        run = batches(corpus, objective, shuffle=False)
        some = np.array([5, 3, 20])
        inputs, labels, weights = run.examples(some)
        together = run.examples(np.arange(30))
        for key, array in inputs.items():
            np.testing.assert_array_equal(array, together[0][key][some])
        np.testing.assert_array_equal(labels, together[1][some])
        np.testing.assert_array_equal(weights, together[2][some])
        later = run.examples(some + run.rows_per_epoch)
        other_seed = batches(corpus, objective, shuffle=False, seed=8).examples(some)
        for others in (later, other_seed):
            assert (others[1] != labels).any(1).all()
        resumed = batches(corpus, objective, shuffle=False, start_index=64 * 3).batch_at(1)
        np.testing.assert_array_equal(resumed[1], run.batch_at(4)[1])


def test_the_last_row_of_one_long_text_is_padded(tmp_path):
    corpus = write_corpus(tmp_path / "c", [300])
    run = batches(corpus, SpanCorruption(FACTS), batch_size=2, shuffle=False, epochs=1)
    raw = len(run.objective.costs(128)) - 1
    assert (run.num_batches, run.rows_per_epoch) == (2, 3)
    inputs, labels, weights = run.batch_at(1)
    assert len(put_back(*texts_of((inputs, labels, weights))[0])) == 300 - 2 * raw
    assert not inputs["padding_mask"][1].any()
    assert not weights[1].any()
    assert not labels[1].any()
    assert batches(corpus, SpanCorruption(FACTS), batch_size=2, epochs=1, drop_remainder=True).num_batches == 1


def test_prefixes_are_of_any_length(tmp_path):
    corpus = write_corpus(tmp_path / "c", [20 * 2000])
    run = batches(corpus, PrefixLM(FACTS), seq_length=20, batch_size=2000, epochs=1)
    lengths = [len(source) for source, _ in texts_of(run.batch_at(0))]
    numbers = np.bincount(lengths, minlength=20)
    assert numbers[0] == 0
    assert ((numbers[1:20] - 2000 / 19) ** 2 / (2000 / 19)).sum() < 42.3  # chi-squared, 18 degrees, p = 0.001


def test_the_decoder_alone_writes_the_text(tmp_path):
    corpus = write_corpus(tmp_path / "c", [50, 20])
    batch = batches(corpus, DecoderLM(FACTS), seq_length=30, batch_size=3, shuffle=False).batch_at(0)
    assert batch[0]["token_ids"].tolist() == [[EOS]] * 3
    texts = [target for _, target in texts_of(batch)]
    assert [*itertools.chain(*texts)] == corpus.take(np.arange(70)).tolist()
    assert list(map(len, texts)) == [29, 29, 12]
    run = batches(corpus, DecoderLM(FACTS, separate_documents=True), seq_length=30, batch_size=3, shuffle=False)
    assert [len(target) for _, target in texts_of(run.batch_at(0))] == [29, 21, 20]


def test_denoisers_are_drawn_at_their_rates(corpus):
    """With rates 1, 2 and 1; and each is what it is said to be."""
    denoisers = (Denoiser(0.15, 3.0, "NLU"), Denoiser(0.25, None, "S2S", rate=2.0), Denoiser(0.5, 20.0, "NLG"))
    run = batches(corpus, UL2(MODES, denoisers, modes=True))
    raw = len(run.objective.costs(128)) - 1
    texts = list(itertools.chain.from_iterable(texts_of(run.batch_at(step)) for step in range(20)))
    shares = [np.mean([source[0] == mode for source, _ in texts]) for mode in (7, 9, 8)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.04)
    spans = {mode: [spans_of(*text) for text in texts if text[0][0] == mode] for mode in (7, 8, 9)}
    assert np.mean(np.concatenate(spans[7])) == pytest.approx(3, rel=0.1)
    assert {sum(lengths) for lengths in spans[8]} == {round(raw / 2)}
    assert {len(lengths) for lengths in spans[8]} == {round(raw / 2 / 20)}
    ends = np.concatenate(spans[9])
    assert len(ends) == len(spans[9])
    assert ends.mean() / raw == pytest.approx(0.25, abs=0.01)
    assert (ends.min() / raw, ends.max() / raw) == pytest.approx((0.125, 0.375), abs=0.01)
    for source, _ in texts:
        if source[0] == 9:
            assert source[-1] == SENTINELS[0]


def test_ul2_as_published(corpus):
    inputs, labels, _ = batches(corpus, UL2(FACTS), seq_length=256, batch_size=512).batch_at(0)
    spans = [spans_of(*text) for text in texts_of((inputs, labels, _))]
    longest = len(UL2(FACTS).costs(256)) - 1
    kinds = {(round(sum(lengths) / longest, 2), len(lengths)) for lengths in spans}
    published = [(0.15, 3), (0.15, 8), (0.5, 3), (0.5, 8), (0.15, 64), (0.5, 64)]
    for density, length in published:
        noise, number = span_counts(np.array([longest]), density, length)
        assert (round(noise[0] / longest, 2), number[0]) in kinds


def reference_replace(tokens, hidden):
    """The paper's words: each run of hidden tokens becomes one sentinel, numbered from the first."""
    replaced, number, before = [], 0, False
    for token, is_hidden in zip(tokens, hidden, strict=True):
        if is_hidden and not before:
            replaced.append(SENTINELS[number])
            number += 1
        elif not is_hidden:
            replaced.append(token)
        before = is_hidden
    return replaced


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=4))
def test_any_mask_gives_the_spans_of_the_definition(masks):
    """Several documents in a row, with masks that may begin and end with noise."""
    lengths = list(map(len, masks))
    segments = np.repeat(np.arange(1, len(masks) + 1), lengths)[None]
    tokens = np.arange(10, 10 + sum(lengths), dtype=np.int32)
    pieces, noise = Pieces.of(segments), np.concatenate(masks)
    for hidden in (noise, ~noise):
        side = put_together(*replace_spans(tokens, hidden, pieces, FACTS), pieces, sum(lengths) + 4, FACTS, None)
        expected = []
        for number in range(1, len(masks) + 1):
            here = segments[0] == number
            expected += [*reference_replace(tokens[here].tolist(), hidden[here]), EOS]
        assert side.token_ids[0].tolist() == expected + [PAD] * (sum(lengths) + 4 - len(expected))


def test_facts_of_a_tokenizer():
    tokenizer = Tokenizer.train(iter([training_text()]), kind="unigram", vocab_size=500, num_sentinels=20)
    facts = SentinelFacts.of(tokenizer)
    size = tokenizer.vocab_size
    assert facts == SentinelFacts(1, tuple(range(size - 1, size - 21, -1)), 0, 0)
    assert SentinelFacts.of(Tokenizer.train(iter([training_text()]), kind="unigram", vocab_size=500)).sentinel_ids == ()
    ids = {"▁<extra_id_0>": 30, "▁<extra_id_1>": 29, "[NLG]": 7, "[NLU]": 8, "[S2S]": 9}  # as mT5 and UL2 have them
    named = SimpleNamespace(eos_token_id=1, pad_token_id=0, token_to_id=ids.get)
    assert SentinelFacts.of(named) == SentinelFacts(1, (30, 29), 0, 0, (("NLU", 8), ("NLG", 7), ("S2S", 9)))
    with pytest.raises(ValueError, match="no pad_token"):
        SentinelFacts.of(Tokenizer.train(iter([training_text()]), kind="bpe", vocab_size=300))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanCorruption(FACTS, 1.0), "noise_density: 1.0"),
        (lambda: SpanCorruption(FACTS, mean_span_length=0.5), "mean_span_length: 0.5"),
        (lambda: Denoiser(rate=0), "rate: 0"),
        (lambda: UL2(FACTS, ()), "denoisers: none"),
        (lambda: UL2(FACTS, modes=True), "of mode NLU, but the tokenizer has mode tokens for none"),
        (lambda: SpanCorruption(SentinelFacts(EOS)), "no sentinels"),
        (lambda: SpanCorruption(SentinelFacts(EOS, (9, 8))).costs(64), "up to 3 spans, but the tokenizer has 2 sent"),
        (lambda: SpanCorruption(FACTS).costs(2), "seq_length: 2; it is too short"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_that_were_packed_for_another_objective_are_refused(corpus):
    with pytest.raises(ValueError, match=r"packing: 'best-fit'; for SpanCorruption it must be 'stream' or 'pad'"):
        batches(corpus, SpanCorruption(FACTS), packing="best-fit")
    pieces = Pieces.of(np.ones((2, 9), np.int32))
    with pytest.raises(ValueError, match="a row of 10 tokens; it has 9 places"):
        put_together(np.arange(18), np.ones(18, bool), pieces, 9, FACTS, None)
    assert V == 400


def assert_same(first, second):
    for one, other in zip([*first[0].values(), *first[1:]], [*second[0].values(), *second[1:]], strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("separate", [False, True])
def test_shards_make_up_the_same_batches(corpus, separate):
    run = batches(corpus, SpanCorruption(FACTS, separate_documents=separate), batch_size=8, start_index=16, epochs=1)
    parts = [iter(run.dataset(2, index, 2)) for index in range(2)]
    for step in range(3):
        slices = [next(part) for part in parts for _ in range(2)]
        inputs = {key: np.concatenate([inputs[key] for inputs, _, _ in slices]) for key in slices[0][0]}
        labels, weights = (np.concatenate([part[place] for part in slices]) for place in (1, 2))
        assert_same((inputs, labels, weights), run.batch_at(step))
    target_length = run.objective.target_length(128)
    inputs, labels, weights = run.dataset(2, 0, 2).element_spec
    assert labels.shape == weights.shape == inputs["decoder_token_ids"].shape == (2, target_length)
    assert inputs["token_ids"].shape == (2, 128)


def test_distributed_over_one_device(corpus):
    import tensorflow as tf

    run = batches(corpus, UL2(FACTS), batch_size=12, num_examples=36)
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    distributed = list(strategy.distribute_datasets_from_function(run.dataset_fn))
    assert len(distributed) == 3
    for step, batch in enumerate(distributed):
        assert_same(batch, run.batch_at(step))


def test_a_model_learns_from_the_batches(tmp_path):
    """Each token follows from the one before; but where spans end cannot be known, so the loss stays above 0.6."""
    import keras

    from lmzoo.data.corpus import Corpus, CorpusWriter
    from lmzoo.models.t5 import T5Config, T5Model

    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 60, 300)
    tokens = np.concatenate([FIRST + (generator.integers(12) + np.arange(length)) % 12 for length in lengths])
    with CorpusWriter.create(tmp_path / "c", vocab_size=40, tokenizer_fingerprint="x") as writer:
        writer.add(tokens, lengths, num_bytes=100)
    facts = SentinelFacts(EOS, tuple(range(39, 27, -1)))
    objective = SpanCorruption(facts, 0.3, 3.0, separate_documents=True)
    run = Batches(Corpus.open(tmp_path / "c"), objective, seq_length=48, batch_size=16, seed=1)
    keras.utils.set_random_seed(0)
    config = T5Config(
        vocab_size=40, num_layers=1, num_heads=2, head_dim=16, model_dim=32, feedforward_dim=64, dropout_rate=0.0
    )
    model = T5Model(config)
    model.compile(optimizer=keras.optimizers.Adam(5e-3))
    losses = model.fit(run.dataset(), epochs=3, steps_per_epoch=50, shuffle=False, verbose=0).history["loss"]
    assert losses[0] > 1.5
    assert losses[-1] < 0.7 * losses[0]


def test_documents_that_share_a_row_are_to_a_model_as_if_they_were_alone(tmp_path):
    """The sum of the losses of packed rows is that of their documents in rows of their own."""
    import keras

    from lmzoo.models.t5 import T5Config, T5Model

    corpus = write_corpus(tmp_path / "c", np.random.default_rng(0).integers(1, 30, 20))
    run = batches(corpus, SpanCorruption(FACTS, separate_documents=True), seq_length=64, batch_size=4)
    inputs, labels, weights = run.batch_at(0)
    alone = [(row, number) for row in range(4) for number in range(1, inputs["segment_ids"][row].max() + 1)]
    assert len(alone) > 6

    def cut(array, side, fill=0):
        rows = [array[row][inputs[f"{side}segment_ids"][row] == number] for row, number in alone]
        return np.array([np.pad(values, (0, array.shape[1] - len(values)), constant_values=fill) for values in rows])

    single = {
        "token_ids": cut(inputs["token_ids"], ""),
        "padding_mask": cut(inputs["segment_ids"], "") > 0,
        "decoder_token_ids": cut(inputs["decoder_token_ids"], "decoder_"),
    }
    keras.utils.set_random_seed(0)
    shape = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "model_dim": 16, "feedforward_dim": 32}
    model = T5Model(T5Config(vocab_size=V, dropout_rate=0.0, **shape))
    together = model.compute_sums(inputs, labels, weights, training=False)["loss"]
    apart = model.compute_sums(single, cut(labels, "decoder_"), cut(weights, "decoder_"), training=False)["loss"]
    np.testing.assert_allclose(together, apart, rtol=1e-5)
