import numpy as np
import pytest
from test_masking import CLS, FACTS, MASK, SEP, V, restored, write_corpus

from lmzoo.data.corpus import Corpus, CorpusWriter
from lmzoo.data.masking import MaskedLM
from lmzoo.data.pipeline import Batches
from lmzoo.data.sentence_pairs import NextSentence, SentenceOrder

MASKED = MaskedLM(FACTS)
OBJECTIVES = [NextSentence(MASKED), SentenceOrder(MASKED)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Every document has tokens of its own, in ascending order, so that a token tells where it comes from."""
    lengths = np.random.default_rng(1).integers(2, 110, 400)
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c", lengths)


def make(corpus, objective, **settings):
    return Batches(corpus, objective, **{"seq_length": 48, "batch_size": 64, "packing": "pad", "seed": 3} | settings)


def texts(batch):
    """The two texts of each row, as they were, and its label."""
    inputs, labels, weights = batch
    token_ids = restored(inputs, labels, weights)
    for row, types, mask, label in zip(
        token_ids, inputs["token_type_ids"], inputs["padding_mask"], inputs["next_sentence_labels"], strict=True
    ):
        first, second = row[mask & (types == 0)], row[mask & (types == 1)]
        assert (first[0], first[-1], second[-1]) == (CLS, SEP, SEP)
        assert not row[~mask].any()
        assert not types[~mask].any()
        yield first[1:-1].tolist(), second[:-1].tolist(), int(label)


def contained(corpus, tokens):
    """Whether the tokens stand in one document, one after another."""
    text = b"".join(token.to_bytes(2, "little") for token in tokens)
    documents = [corpus.document(number).astype("<u2").tobytes() for number in range(corpus.num_documents)]
    return any(text in document for document in documents)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shapes_and_shares(corpus, objective):
    run = make(corpus, objective)
    labels, hidden, real = [], 0, 0
    for step in range(40):
        inputs, originals, weights = run.batch_at(step)
        assert {key: (array.shape, array.dtype.name) for key, array in inputs.items()} == {
            "token_ids": ((64, 48), "int32"),
            "padding_mask": ((64, 48), "bool"),
            "token_type_ids": ((64, 48), "int32"),
            "mask_positions": ((64, 8), "int32"),
            "next_sentence_labels": ((64,), "int32"),
        }
        labels.append(inputs["next_sentence_labels"])
        hidden += weights.sum()
        real += (~FACTS.is_special[restored(inputs, originals, weights)]).sum()
        assert not FACTS.is_special[originals[weights > 0]].any()
    assert abs(np.mean(labels) - 0.5) < 0.04
    assert hidden / real == pytest.approx(0.15, abs=0.002)


def test_next_sentences_follow_and_others_are_of_other_documents(corpus):
    pairs = [pair for step in range(4) for pair in texts(make(corpus, OBJECTIVES[0]).batch_at(step))]
    for first, second, label in pairs:
        assert contained(corpus, first)
        assert contained(corpus, second)
        if len(first) > 2 and len(second) > 2:
            assert contained(corpus, first + second) == (label == 0)
    assert {label for *_, label in pairs} == {0, 1}


def test_others_are_of_another_document_where_there_are_but_two(tmp_path):
    with CorpusWriter.create(tmp_path / "c", vocab_size=V, tokenizer_fingerprint="x") as writer:
        writer.add([*range(20, 120), *range(300, 400)], [100, 100], num_bytes=1)
    run = make(Corpus.open(tmp_path / "c"), OBJECTIVES[0], seq_length=13, batch_size=200)
    for first, second, label in texts(run.batch_at(0)):
        assert ((first[0] < 200) == (second[0] < 200)) == (label == 0)


def test_the_length_of_a_pair_does_not_tell_its_label(corpus):
    sizes = {0: [], 1: []}
    for step in range(40):
        for first, second, label in texts(make(corpus, OBJECTIVES[0]).batch_at(step)):
            sizes[label].append((len(first), len(second)))
    gap = np.mean(sizes[0], axis=0) - np.mean(sizes[1], axis=0)
    assert np.abs(gap).max() < 1.2


def test_swapped_texts_are_the_piece_the_other_way_round(corpus):
    pairs = [pair for step in range(4) for pair in texts(make(corpus, OBJECTIVES[1]).batch_at(step))]
    for first, second, label in pairs:
        assert contained(corpus, second + first if label else first + second)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_texts_are_cut_behind_a_sentence_or_else_before_a_word(corpus, objective):
    ends, words = [], []
    for step in range(8):
        for first, second, label in texts(make(corpus, objective).batch_at(step)):
            if label == 0 and len(first) + len(second) > 10:
                sentence_ends = FACTS.ends_sentence[(first + second)[:-1]].any()
                (ends if sentence_ends else words).append((first[-1], second[0]))
    assert all(FACTS.ends_sentence[last] for last, _ in ends)
    assert len(ends) > 20
    assert np.mean([not FACTS.continues_word[token] for _, token in words]) > 0.99


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pairs_are_the_same_for_an_index_and_others_in_each_epoch(corpus, objective):
    run = make(corpus, objective, shuffle=False)
    some = np.arange(30)
    first, again, later = (list(texts(run.examples(i))) for i in (some, some, some + run.rows_per_epoch))
    assert first == again
    assert list(texts(run.examples(some[7:9]))) == first[7:9]
    assert sum(one == other for one, other in zip(first, later, strict=True)) < 15


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_last_batch_is_filled_with_padding_of_weight_0(corpus, objective):
    run = make(corpus, objective, shuffle=False, num_examples=5, batch_size=8)
    inputs, _, weights = run.batch_at(0)
    assert not weights[5:].any()
    for name in ("token_ids", "padding_mask", "token_type_ids", "next_sentence_labels"):
        assert not inputs[name][5:].any()
    assert inputs["padding_mask"][:5].any(1).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("lengths", [[1], [1, 1], [200], [3, 1, 2]])
def test_the_smallest_corpora(tmp_path, objective, lengths):
    with CorpusWriter.create(tmp_path / "c", vocab_size=V, tokenizer_fingerprint="x") as writer:
        writer.add(np.arange(5, 5 + sum(lengths)), lengths, num_bytes=1)
    run = make(Corpus.open(tmp_path / "c"), objective, seq_length=12, batch_size=4)
    for first, second, _ in texts(run.batch_at(0)):
        assert 1 <= len(first) + len(second) <= 9
        assert MASK not in first + second


def test_pairs_have_a_row_to_themselves(corpus):
    with pytest.raises(ValueError, match="packing: 'best-fit'; for NextSentence it must be 'pad'"):
        make(corpus, OBJECTIVES[0], packing="best-fit")
