import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import training_text

from lmzoo.data.corpus import Corpus, CorpusWriter
from lmzoo.data.masking import MaskedLM, TokenFacts, _span_lengths
from lmzoo.data.pipeline import Batches
from lmzoo.data.tokenizers import Tokenizer

V, PAD, UNK, CLS, SEP, MASK = 600, 0, 1, 2, 3, 4
CONTINUES = np.arange(V) >= 400  # so a third of the tokens go on with a word
FACTS = TokenFacts(V, MASK, CLS, SEP, (PAD, UNK, CLS, SEP, MASK), CONTINUES, np.isin(np.arange(V), [10, 11]))
UNITS = ["token", "word", "span"]


def write_corpus(directory, lengths, seed=0):
    """Documents of random tokens, a few of them unknown."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, V, sum(lengths))
    tokens[generator.random(len(tokens)) < 0.01] = UNK
    with CorpusWriter.create(directory, vocab_size=V, tokenizer_fingerprint="x") as writer:
        writer.add(tokens, lengths, num_bytes=100)
    return Corpus.open(directory)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    lengths = np.random.default_rng(1).geometric(1 / 90, 1500)
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c", lengths)


def batches(corpus, objective, **settings):
    return Batches(
        corpus, objective, **{"seq_length": 64, "batch_size": 128, "packing": "best-fit", "seed": 7} | settings
    )


def restored(inputs, labels, weights):
    """The rows as they were before tokens were hidden."""
    token_ids = inputs["token_ids"].copy()
    row, place = np.nonzero(weights)
    token_ids[row, inputs["mask_positions"][row, place]] = labels[row, place]
    return token_ids


def chosen(inputs, weights):
    """The hidden tokens, [B, T] bool."""
    hidden = np.zeros(inputs["token_ids"].shape, bool)
    row, place = np.nonzero(weights)
    hidden[row, inputs["mask_positions"][row, place]] = True
    return hidden


@pytest.mark.parametrize("unit", UNITS)
def test_shares(corpus, unit):
    """15% +- 0.1% of the ordinary tokens, of which 80% are masks, 10% are others and 10% stay."""
    free = hidden = 0
    fates = np.zeros(3)
    replaced = []
    run = batches(corpus, MaskedLM(FACTS, unit=unit))
    for step in range(100 if unit == "span" else 24):  # a span's tokens are not independent
        inputs, labels, weights = run.batch_at(step)
        original = restored(inputs, labels, weights)
        free += (~FACTS.is_special[original]).sum()
        assert (weights.sum(1) <= np.ceil(0.15 * (~FACTS.is_special[original]).sum(1))).all()
        hidden += weights.sum()
        now = inputs["token_ids"][chosen(inputs, weights)]
        before = original[chosen(inputs, weights)]
        is_mask, same = now == MASK, now == before
        fates += is_mask.sum(), (~is_mask & ~same).sum(), same.sum()
        replaced.append(now[~is_mask & ~same])
    assert hidden / free == pytest.approx(0.15, abs=0.001)
    np.testing.assert_allclose(fates / hidden, [0.8, 0.1, 0.1], atol=0.01)
    replaced = np.concatenate(replaced)
    assert not FACTS.is_special[replaced].any()
    assert abs(replaced.mean() - (5 + V - 1) / 2) < 15


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(3, 40),
    st.sampled_from(UNITS),
    st.sampled_from(["pad", "best-fit"]),
    st.sampled_from([0.15, 0.5, 1.0]),
    st.sampled_from([None, 1, 4, 50]),
)
def test_a_pass_gives_the_corpus_back_in_frames(tmp_path_factory, lengths, seq_length, unit, packing, rate, most):
    corpus = write_corpus(tmp_path_factory.mktemp("c") / "c", lengths)
    run = batches(
        corpus, MaskedLM(FACTS, rate, unit, most), seq_length=seq_length, batch_size=3, packing=packing, epochs=1
    )
    pieces, shapes = [], set()
    for step in range(run.num_batches):
        inputs, labels, weights = run.batch_at(step)
        assert list(inputs) == ["token_ids", "segment_ids", "positions", "mask_positions"]
        assert [array.dtype for array in (*inputs.values(), labels, weights)] == [np.int32] * 5 + [np.float32]
        shapes.add((labels.shape, weights.shape, inputs["mask_positions"].shape))
        original, hidden = restored(inputs, labels, weights), chosen(inputs, weights)
        assert hidden.sum() == weights.sum()  # no place twice
        assert not FACTS.is_special[original[hidden]].any()
        assert not labels[weights == 0].any()
        assert not inputs["mask_positions"][weights == 0].any()
        for row in range(3):
            assert (np.diff(inputs["mask_positions"][row][weights[row] > 0]) > 0).all()
            for segment in range(1, inputs["segment_ids"][row].max() + 1):
                here = inputs["segment_ids"][row] == segment
                piece = original[row, here]
                np.testing.assert_array_equal(inputs["positions"][row, here], np.arange(len(piece)))
                assert (piece[0], piece[-1]) == (CLS, SEP)
                assert len(piece) > 2
                pieces.append(tuple(piece[1:-1]))
        assert not original[inputs["segment_ids"] == 0].any()
    places = int(np.ceil(rate * seq_length)) if most is None else min(most, seq_length)
    assert shapes == {((3, places),) * 3}
    expected = []
    for number in range(corpus.num_documents):
        document = corpus.document(number)
        expected += [
            tuple(document[start : start + seq_length - 2]) for start in range(0, len(document), seq_length - 2)
        ]
    assert sorted(pieces) == sorted(expected)


def test_an_example_is_the_same_whenever_it_is_made_and_another_in_each_epoch(corpus):
    run = batches(corpus, MaskedLM(FACTS), shuffle=False)
    rows = run.rows_per_epoch
    some = np.array([5, 3, 90])
    inputs, labels, weights = run.examples(some)
    together = run.examples(np.arange(100))
    for key, array in inputs.items():
        np.testing.assert_array_equal(array, together[0][key][some])
    np.testing.assert_array_equal(labels, together[1][some])
    later = run.examples(some + rows)
    np.testing.assert_array_equal(restored(*later), restored(inputs, labels, weights))
    assert (chosen(later[0], later[2]) & chosen(inputs, weights)).sum() < 0.5 * weights.sum()
    other_seed = batches(corpus, MaskedLM(FACTS), shuffle=False, seed=8).examples(some)
    assert (chosen(other_seed[0], other_seed[2]) & chosen(inputs, weights)).sum() < 0.5 * weights.sum()


def test_whole_words_are_hidden_whole(corpus):
    inputs, labels, weights = batches(corpus, MaskedLM(FACTS, unit="word")).batch_at(0)
    original, hidden = restored(inputs, labels, weights), chosen(inputs, weights)
    same_word = CONTINUES[original[:, 1:]] & ~FACTS.is_special[original[:, :-1]]
    np.testing.assert_array_equal(hidden[:, 1:][same_word], hidden[:, :-1][same_word])
    assert (hidden[:, 1:] & same_word).any()
    tokens = batches(corpus, MaskedLM(FACTS)).batch_at(0)
    assert (chosen(tokens[0], tokens[2])[:, 1:] != chosen(tokens[0], tokens[2])[:, :-1])[same_word].any()


def test_spans_are_contiguous_begin_with_words_and_have_one_fate(corpus):
    objective = MaskedLM(FACTS, unit="span")
    inputs, labels, weights = batches(corpus, objective, seq_length=256).batch_at(0)
    original, hidden = restored(inputs, labels, weights), chosen(inputs, weights)
    begins = hidden.copy()
    begins[:, 1:] &= ~hidden[:, :-1]
    runs = hidden.sum() / begins.sum()
    assert 3.5 < runs < 9  # a span has 3.8 words of 1.5 tokens on average, unless it is cut
    inside_word = CONTINUES[original] & ~np.roll(FACTS.is_special[original], 1, 1)
    assert not (begins & inside_word).any()
    masked = (inputs["token_ids"] == MASK) & hidden
    same_fate = (masked[:, 1:] == masked[:, :-1])[hidden[:, 1:] & hidden[:, :-1]]
    assert same_fate.mean() > 0.95  # runs may be two spans side by side


def test_lengths_of_spans_are_geometric():
    lengths = _span_lengths(np.random.default_rng(0).random(200_000))
    shares = np.bincount(lengths, minlength=11)[1:] / len(lengths)
    expected = 0.2 * 0.8 ** np.arange(10)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.004)


def test_every_place_is_as_likely(corpus):
    for unit in UNITS:
        run = batches(corpus, MaskedLM(FACTS, unit=unit))
        hidden, free = np.zeros(64), np.zeros(64)
        for step in range(30):
            inputs, labels, weights = run.batch_at(step)
            hidden += chosen(inputs, weights).sum(0)
            free += (~FACTS.is_special[restored(inputs, labels, weights)]).sum(0)
        share = hidden[1:-1] / free[1:-1]
        assert abs(share - 0.15).max() < 0.045, unit


def test_facts_of_a_tokenizer():
    tokenizer = Tokenizer.train(iter([training_text()]), kind="wordpiece", vocab_size=600)
    facts = TokenFacts.of(tokenizer)
    assert (facts.mask_token_id, facts.cls_token_id, facts.sep_token_id) == (4, 2, 3)
    assert facts.special_token_ids == (0, 1, 2, 3, 4)
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.vocab_size)]
    assert [token for token, ends in zip(tokens, facts.ends_sentence, strict=True) if ends] == ["!", ".", "?", "…"]
    for token, continues in zip(tokens, facts.continues_word, strict=True):
        assert continues == token.startswith("##")
    with pytest.raises(ValueError, match="no mask_token"):
        TokenFacts.of(Tokenizer.train(iter([training_text()]), kind="bpe", vocab_size=300))


def test_what_cannot_be_is_refused(corpus):
    with pytest.raises(ValueError, match="mask_rate: 0"):
        MaskedLM(FACTS, mask_rate=0)
    with pytest.raises(ValueError, match="unit: 'line'"):
        MaskedLM(FACTS, unit="line")
    with pytest.raises(ValueError, match="max_predictions: 0"):
        MaskedLM(FACTS, max_predictions=0)
    with pytest.raises(ValueError, match="special token id 600"):
        TokenFacts(V, V, CLS, SEP, (), CONTINUES, CONTINUES)
    with pytest.raises(ValueError, match="continues_word: shape"):
        TokenFacts(V, MASK, CLS, SEP, (), CONTINUES[1:], CONTINUES)
    with pytest.raises(ValueError, match="packing: 'stream'; for MaskedLM it must be 'best-fit' or 'pad'"):
        batches(corpus, MaskedLM(FACTS), packing="stream")
    with pytest.raises(ValueError, match="seq_length: 2; a row holds at least 3 tokens"):
        batches(corpus, MaskedLM(FACTS), seq_length=2)
