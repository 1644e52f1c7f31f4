"""Pretraining of encoders: objectives, phases, evaluation, and what is refused."""

import json
import math
import random
import re

import numpy as np
import pytest

from lmzoo import PretrainConfig, Tokenizer, evaluate, pretrain
from lmzoo.data.corpus import Corpus
from lmzoo.models import load_pretrained
from lmzoo.training.corpora import unigram_entropy
from lmzoo.training.phases import add_up, make_phases

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "to", "me"]
SHAPE = {"num_layers": 1, "num_heads": 2, "model_dim": 32, "context_length": 32}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents in which each word goes on with the one before it, so that a hidden one can be guessed."""
    generator = random.Random(0)
    directory = tmp_path_factory.mktemp("text")
    for number in range(60):
        place, words = generator.randrange(13), []
        for _ in range(generator.randrange(8, 60)):
            words.append(WORDS[place % 13] + ("." if generator.random() < 0.2 else ""))
            place += 1
        (directory / f"{number:02d}.txt").write_text(" ".join(words))
    return directory / "*.txt"


def settings(text, directory, **changes):
    return {
        "directory": directory,
        "source": (str(text),),
        "preset": "bert-tiny",
        "vocab_size": 60,
        **SHAPE,
        "seq_length": 16,
        "steps": 20,
        "batch_size": 16,
        "warmup_steps": 3,
        "learning_rate": 1e-2,
        "evaluate_every": 10,
        "log_every": 1,
        "validation_fraction": 0.15,
        "strategy": "one",
        "verbose": "0",
        **changes,
    }


def records(directory, kind="loss"):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in lines if kind in record}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of two phases that nothing interrupts, with dropout, and what it said."""
    said = []
    config = settings(text, tmp_path_factory.mktemp("whole"), **TWO_PHASES)
    return pretrain(**config, say=said.append), said


TWO_PHASES = {"long_seq_length": 32, "long_share": 0.3, "dropout_rate": 0.1}


def test_a_masked_lm_learns_in_two_phases(whole):
    result, said = whole
    assert any("BertModel" in line and "16 rows x 1 replicas" in line for line in said)
    assert any(line.startswith("steps 1 to 14 on 16 rows of 16 tokens") for line in said)
    assert any(line.startswith("steps 15 to 20 on 8 rows of 32 tokens") for line in said)
    trained = records(result.directory)
    assert list(trained) == list(range(1, 21))
    assert trained[1]["loss"] == pytest.approx(math.log(result.tokenizer.vocab_size), rel=0.1)
    assert trained[20]["loss"] < 0.8 * trained[1]["loss"]
    assert trained[14]["tokens"] == 14 * 16 * 16
    assert trained[20]["tokens"] == 14 * 16 * 16 + 6 * 8 * 32
    for record in trained.values():
        assert 0.5 < record["real_tokens_per_second"] / record["tokens_per_second"] <= 1.0
    assert (result.directory / "checkpoints" / "step-00000014").is_dir() or len(records(result.directory)) == 20
    assert result.tokenizer.kind == "wordpiece"
    assert result.model.config.pad_token_id == 0


def test_the_share_of_the_peak_is_that_of_the_phase(whole):
    result, _ = whole
    peaks = []
    for step, length in ((5, 16), (10, 16), (18, 32)):
        record = records(result.directory)[step]
        flops = result.model.config.training_flops_per_token(length)
        peaks.append(flops * record["tokens_per_second"] / record["mfu"])
    assert peaks == pytest.approx([peaks[0]] * 3, rel=0.2)  # mfu has four digits.


def test_evaluations_hide_the_same_tokens_and_are_told_beside_the_unigram_entropy(whole):
    result, said = whole
    evaluations = records(result.directory, "validation_loss")
    assert list(evaluations) == [10, 20]
    last = evaluations[20]
    scores = result.validation
    assert (last["validation_loss"], last["validation_total_loss"]) == (scores.loss, scores.total_loss)
    assert last["unigram_entropy"] == result.unigram_entropy
    assert scores.bits_per_byte is None
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    assert any(f"unigram entropy {result.unigram_entropy:.4f} nats a token" in line for line in said)
    assert f"loss {scores.loss:.4f} nats a token (unigram entropy {result.unigram_entropy:.4f})" in said[-1]
    corpus = result.directory / "corpus"
    again = [evaluate(result.directory / "last", corpus, batch_size=size, verbose=0) for size in (8, 8, 3)]
    assert again[0] == again[1]
    assert again[0].loss == pytest.approx(scores.loss, rel=1e-5)
    assert again[0].num_tokens == again[2].num_tokens == scores.num_tokens
    assert again[2].loss == pytest.approx(scores.loss, rel=1e-5)
    harder = evaluate(result.directory / "last", corpus, mask_rate=0.5, mask_unit="span", batch_size=8, verbose=0)
    assert harder.num_tokens > 2 * scores.num_tokens


def test_the_card_tells_of_data_recipe_and_scores(whole):
    result, _ = whole
    card = (result.directory / "last" / "README.md").read_text()
    assert "fill-mask" in card
    assert '"long_seq_length": 32' in card
    assert f"| loss | {result.validation.loss:.6g} |" in card
    assert f"| unigram_entropy | {result.unigram_entropy:.6g} |" in card


@pytest.mark.slow
@pytest.mark.parametrize("moment", [14, 17])
def test_a_run_stopped_in_either_phase_goes_on_as_if_never_stopped(text, whole, tmp_path, moment, monkeypatch):
    from lmzoo.training.checkpointing import CheckpointStore

    save = CheckpointStore.save

    def save_and_stop(self, model, progress):
        save(self, model, progress)
        if progress.step == moment:
            raise InterruptedError

    config = settings(text, tmp_path, **TWO_PHASES, **({"checkpoint_every": 17} if moment == 17 else {}))
    monkeypatch.setattr(CheckpointStore, "save", save_and_stop)
    with pytest.raises(InterruptedError):
        pretrain(**config, say=lambda line: None)
    monkeypatch.undo()
    progress = json.loads((tmp_path / "last" / "training.json").read_text())["progress"]
    assert progress["next_example"] == {14: 0, 17: 24}[moment]
    again = pretrain(**config, say=lambda line: None)
    result, _ = whole
    for kind in ("loss", "validation_loss"):
        expected, got = (
            {step: record[kind] for step, record in records(directory, kind).items()}
            for directory in (result.directory, tmp_path)
        )
        assert got == expected
    assert again.validation == result.validation


@pytest.mark.parametrize(
    ("preset", "objective", "kind", "more"),
    [
        ("bert-tiny", "mlm+nsp", "wordpiece", {}),
        ("roberta-base", "auto", "bpe", {"vocab_size": 300}),
        pytest.param("bert-tiny", "mlm+sop", "wordpiece", {"mask_unit": "word"}, marks=pytest.mark.slow),
        pytest.param("distilbert-base", "mlm", "wordpiece", {"mask_unit": "span"}, marks=pytest.mark.slow),
        pytest.param("albert-base-v2", "mlm+sop", "unigram", {}, marks=pytest.mark.slow),
        pytest.param("electra-small", "auto", "wordpiece", {}, marks=pytest.mark.slow),
    ],
)
def test_objectives_and_architectures(text, tmp_path, preset, objective, kind, more):
    config = settings(text, tmp_path, preset=preset, objective=objective, long_seq_length=None, **more)
    result = pretrain(**config, say=lambda line: None)
    trained, scores = records(tmp_path), result.validation
    assert trained[20]["loss"] < 0.95 * trained[1]["loss"]
    assert result.tokenizer.kind == kind
    if "+" in objective:
        assert set(scores.other) == {"next_sentence_loss", "next_sentence_accuracy"}
        assert scores.total_loss == pytest.approx(scores.loss + scores.other["next_sentence_loss"], rel=1e-4)
        assert records(tmp_path, "validation_next_sentence_loss")
    progress = json.loads((tmp_path / "last" / "training.json").read_text())["progress"]
    assert progress["validation_loss"] == scores.total_loss
    corpus = Corpus.open(tmp_path / "corpus" / "train")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "last")
    assert tokenizer.mask_token_id is not None
    assert not np.isin(corpus.document(0), [tokenizer.sep_token_id, tokenizer.eos_token_id]).any()
    assert type(load_pretrained(tmp_path / "last")) is type(result.model)


def test_the_kind_of_tokenizer_follows_the_architecture(text, tmp_path):
    result = pretrain(**settings(text, tmp_path, preset="gpt2-nano", vocab_size=300, steps=1), say=lambda line: None)
    assert result.tokenizer.kind == "bpe"
    assert result.validation.other == {}
    assert result.validation.bits_per_byte is not None
    assert 0.0 < result.unigram_entropy < math.log(300)


def test_the_unigram_entropy_is_that_of_smoothed_counts(whole):
    result, _ = whole
    parts = [Corpus.open(result.directory / "corpus" / name) for name in ("train", "validation")]
    tokens = [np.concatenate([part.document(number) for number in range(part.num_documents)]) for part in parts]
    counts = [np.bincount(each, minlength=parts[0].vocab_size).astype(float) for each in tokens]
    shares = (counts[0] + 1) / (counts[0] + 1).sum()
    assert unigram_entropy(*parts) == pytest.approx(-(counts[1] * np.log(shares)).sum() / counts[1].sum())
    common = int(counts[0].argmax())
    for each in counts:
        each[common] = 0
    kept = np.arange(len(shares)) != common
    shares = (counts[0][kept] + 1) / (counts[0][kept] + 1).sum()
    expected = -(counts[1][kept] * np.log(shares)).sum() / counts[1].sum()
    assert unigram_entropy(*parts, excluded=(common,)) == pytest.approx(expected)


def test_a_large_corpus_is_counted_in_parts_spread_over_it(whole, monkeypatch):
    from lmzoo.training import corpora

    result, _ = whole
    part = Corpus.open(result.directory / "corpus" / "train")
    monkeypatch.setattr(corpora, "_BLOCK_TOKENS", 7)
    counts = corpora._count_tokens(part, part.vocab_size)
    assert counts.sum() == part.num_tokens
    monkeypatch.setattr(corpora, "_MOST_BLOCKS", 5)
    blocks = -(-part.num_tokens // 7)
    firsts = [number * blocks // 5 * 7 for number in range(5)]
    taken = np.concatenate([part.take(np.arange(first, first + 7)) for first in firsts])
    np.testing.assert_array_equal(
        corpora._count_tokens(part, part.vocab_size), np.bincount(taken, minlength=part.vocab_size)
    )


def test_phases_have_about_as_many_tokens_a_step():
    config = PretrainConfig(steps=1000, batch_size=48, seq_length=128, long_seq_length=512)
    first, second = make_phases(config, 512, 1)
    assert (first.start, first.stop, first.batch_size, first.seq_length) == (0, 900, 48, 128)
    assert (second.start, second.stop, second.batch_size, second.seq_length) == (900, 1000, 12, 512)
    assert make_phases(config, 512, 8)[1].batch_size == 16
    assert make_phases(PretrainConfig(seq_length=128, long_seq_length=512, batch_size=2), 512, 2)[1].batch_size == 2
    given = PretrainConfig(seq_length=128, long_seq_length=512, long_batch_size=6)
    assert make_phases(given, 512, 1)[1].batch_size == 6
    (only,) = make_phases(PretrainConfig(steps=7, batch_size=3), 64, 1)
    assert (only.stop, only.seq_length, only.batch_size) == (7, 64, 3)
    (long,) = make_phases(PretrainConfig(steps=1, seq_length=8, long_seq_length=16, batch_size=4), 64, 1)
    assert (long.number, long.start, long.seq_length) == (1, 0, 16)
    tokens = [add_up((first, second), step, lambda phase: phase.step_tokens) for step in (0, 1, 900, 902, 1000)]
    assert tokens == [0, 6144, 900 * 6144, 902 * 6144, 1000 * 6144]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "causal"}, "objective is 'causal', but a BertModel learns mlm or mlm.nsp or mlm.sop"),
        ({"preset": "gpt2-nano", "objective": "mlm"}, "objective is 'mlm', but a GPTModel learns causal"),
        (
            {"preset": "roberta-base", "objective": "mlm+nsp"},
            "objective is 'mlm.nsp', but a RobertaModel without a pooler learns mlm",
        ),
        ({"mask_rate": 0.0}, r"mask_rate is 0.0, but must lie in \(0, 1\]"),
        ({"long_share": 1.0}, r"long_share is 1.0, but must lie in \(0, 1\)"),
        ({"seq_length": 64}, "seq_length is 64, but the model reads 32 tokens at most"),
        ({"long_seq_length": 16}, "long_seq_length is 16, but must be above seq_length, which is 16"),
        ({"seq_length": None, "long_seq_length": 32}, "which is 32, as many as the model has positions"),
        ({"long_seq_length": 32, "long_batch_size": 3, "micro_batches": 2}, "global batch of 3"),
        ({"separate_documents": False}, "separate_documents is False, but objective 'mlm' keeps documents apart"),
        ({"packing": "stream"}, "packing: 'stream'; for MaskedLM it must be"),
    ],
)
def test_what_cannot_be_trained_is_refused(text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(**settings(text, tmp_path, **changes), say=lambda line: None)


def test_a_tokenizer_without_a_mask_token_is_refused_before_the_text_is_read(text, tmp_path):
    Tokenizer.train([str(path) for path in text.parent.glob("*.txt")], kind="bpe", vocab_size=300).save_pretrained(
        tmp_path / "tokenizer"
    )
    with pytest.raises(ValueError, match="the tokenizer has no mask_token"):
        pretrain(**settings(text, tmp_path / "run", tokenizer=str(tmp_path / "tokenizer")), say=lambda line: None)
    assert not (tmp_path / "run" / "corpus").exists()


def test_a_jump_of_the_loss_after_the_boundary_goes_back_no_further(text, tmp_path, monkeypatch):
    from lmzoo.data.pipeline import Batches

    examples = Batches.examples

    def with_noise(self, indices):
        inputs, labels, weights = examples(self, indices)
        if self.shuffle and self.seq_length == 32:
            noise = np.random.default_rng(0).integers(0, 50, labels.shape).astype("int32")
            labels = np.where(((indices >= 40) & (indices < 48))[:, None], noise, labels)
        return inputs, labels, weights

    monkeypatch.setattr(Batches, "examples", with_noise)
    said = []
    config = settings(text, tmp_path, steps=40, **{**TWO_PHASES, "dropout_rate": 0.0}, spike_factor=1.5)
    pretrain(**config, say=said.append)
    (turn,) = [line for line in said if "back to step" in line]
    first, last = map(int, re.search(r"back to step (?:28|30), and on without examples (\d+) to (\d+)", turn).groups())
    assert first < 40 <= last
    progress = json.loads((tmp_path / "last" / "training.json").read_text())["progress"]
    assert progress["skipped_examples"] == [[first, last + 1]]
