"""Pretraining of encoders with decoders: objectives, lengths of both sides, evaluation, and what is refused."""

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from command_line import run_here

from lmzoo import Tokenizer, evaluate, pretrain
from lmzoo.data.corpus import Corpus
from lmzoo.data.corruption import SentinelFacts
from lmzoo.data.denoising import SpanCorruption
from lmzoo.data.pipeline import Batches
from lmzoo.models import find_preset, load_pretrained
from lmzoo.training.building import make_model
from lmzoo.training.settings import PretrainConfig

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "to", "me"]
SHAPE = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "model_dim": 16, "feedforward_dim": 32, "context_length": 32}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents in which each word goes on with the one before it, so that a missing one can be guessed."""
    generator = random.Random(0)
    directory = tmp_path_factory.mktemp("text")
    for number in range(60):
        place, length = generator.randrange(13), generator.randrange(8, 60)
        words = [WORDS[(place + step) % 13] + "." * (generator.random() < 0.2) for step in range(length)]
        (directory / f"{number:02d}.txt").write_text(" ".join(words))
    return directory / "*.txt"


def settings(text, directory, **changes):
    return {
        "directory": directory,
        "source": (str(text),),
        "preset": "t5-small",
        "vocab_size": 70,
        "num_sentinels": 20,
        **SHAPE,
        "seq_length": 16,
        "steps": 12,
        "batch_size": 16,
        "warmup_steps": 3,
        "learning_rate": 1e-2,
        "embedding_rate": 10.0,
        "evaluate_every": 6,
        "checkpoint_every": 4,
        "dropout_rate": 0.1,
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
    """A run that nothing interrupts, with dropout, and what it said."""
    said = []
    return pretrain(**settings(text, tmp_path_factory.mktemp("whole")), say=said.append), said


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    """A corpus whose tokenizer has what every objective needs, made by the command."""
    directory = tmp_path_factory.mktemp("prepared")
    words = ["prepare", *map(str, sorted(text.parent.glob("*.txt"))), "--directory", str(directory), "--overwrite"]
    words += ["True", "--tokenizer", "unigram", "--vocab-size", "80", "--num-sentinels", "20", "--mode-tokens", "True"]
    run_here(*words, "--validation-fraction", 0.15)
    return directory


def test_a_t5_learns_span_corruption(whole):
    result, said = whole
    facts = SentinelFacts.of(result.tokenizer)
    written = SpanCorruption(facts).target_length(16)
    assert any(f"steps 1 to 12 on 16 rows of 16 tokens, and {written} that are written" in line for line in said)
    trained = records(result.directory)
    assert list(trained) == list(range(1, 13))
    assert trained[12]["loss"] < 0.9 * trained[1]["loss"]
    assert trained[12]["tokens"] == 12 * 16 * (16 + written)
    assert 0.5 < trained[12]["real_tokens_per_second"] / trained[12]["tokens_per_second"] < 1.0
    assert (result.tokenizer.kind, len(facts.sentinel_ids)) == ("unigram", 20)
    shape = result.model.config
    assert (shape.vocab_size, shape.pad_token_id, shape.start_token_id) == (result.tokenizer.vocab_size, 0, 0)
    assert (shape.head_dim, shape.feedforward_dim, shape.decoder_layers) == (8, 32, 1)
    assert not np.isin(Corpus.open(result.directory / "corpus" / "train").document(0), [0, 1]).any()


@pytest.mark.slow
def test_a_second_phase_has_longer_rows_on_both_sides(text, prepared, tmp_path):
    said = []
    config = settings(text, tmp_path, corpus=prepared, long_seq_length=32, long_share=0.25)
    result = pretrain(**config, say=said.append)
    objective = result.held_out.objective
    short, long = (objective.target_length(length) for length in (16, 32))
    assert any(f"steps 1 to 9 on 16 rows of 16 tokens, and {short} that are written" in line for line in said)
    assert any(f"steps 10 to 12 on 8 rows of 32 tokens, and {long} that are written" in line for line in said)
    assert result.held_out.lengths == (32, long)
    trained = records(tmp_path)
    assert trained[12]["tokens"] == 9 * 16 * (16 + short) + 3 * 8 * (32 + long)
    peaks = []
    for step, lengths in ((5, (16, short)), (8, (16, short)), (12, (32, long))):
        flops = result.model.config.training_flops_per_token(*lengths)
        peaks.append(flops * trained[step]["tokens_per_second"] / trained[step]["mfu"])
    assert peaks == pytest.approx([peaks[0]] * 3, rel=0.3)  # mfu has four digits.


def test_evaluations_take_out_the_same_spans(whole, capsys):
    result, _ = whole
    scores, corpus = result.validation, result.directory / "corpus"
    assert records(result.directory, "validation_loss")[12]["validation_loss"] == scores.loss
    assert scores.bits_per_byte is None
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    weights = sum(result.held_out.batch_at(step)[2].sum() for step in range(result.held_out.num_batches))
    assert scores.num_tokens == weights
    again = [evaluate(result.directory / "last", corpus, seq_length=16, batch_size=size, verbose=0) for size in (8, 3)]
    for each in again:
        assert (each.num_tokens, each.loss) == (scores.num_tokens, pytest.approx(scores.loss, rel=1e-5))
    run_here("evaluate", result.directory, corpus, "--noise-density", 0.5, "--mean-span-length", 4)
    harder = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert harder["num_tokens"] > 1.5 * scores.num_tokens


def test_the_unigram_entropy_is_that_of_what_is_written(whole):
    result, said = whole
    corpus = Corpus.open(result.directory / "corpus" / "train")
    training = Batches(corpus, result.held_out.objective, 16, 1, epochs=1)
    trained, scored = np.ones(corpus.vocab_size), np.zeros(corpus.vocab_size)
    for counts, batches in ((trained, training), (scored, result.held_out)):
        for step in range(batches.num_batches):
            _, labels, weights = batches.batch_at(step)
            np.add.at(counts, labels[weights > 0], 1)
    expected = -(scored * np.log(trained / trained.sum())).sum() / scored.sum()
    assert result.unigram_entropy == pytest.approx(expected)
    assert any(f"unigram entropy {expected:.4f} nats a token" in line for line in said)
    assert (
        scored[1] == result.held_out.rows_per_epoch
        or scored[1] >= Corpus.open(result.directory / "corpus" / "validation").num_documents
    )


def test_the_card_tells_what_was_learnt(whole):
    result, _ = whole
    card = (result.directory / "last" / "README.md").read_text()
    assert "text2text-generation" in card
    assert '"noise_density": 0.15' in card
    assert f"| loss | {result.validation.loss:.6g} |" in card


def test_a_run_that_was_stopped_goes_on_as_if_never_stopped(text, whole, tmp_path, monkeypatch):
    from lmzoo.training.checkpointing import CheckpointStore

    save = CheckpointStore.save

    def save_and_stop(self, model, progress):
        save(self, model, progress)
        if progress.step == 8:
            raise InterruptedError

    config = settings(text, tmp_path)
    monkeypatch.setattr(CheckpointStore, "save", save_and_stop)
    with pytest.raises(InterruptedError):
        pretrain(**config, say=lambda line: None)
    monkeypatch.undo()
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
    ("objective", "more", "lengths"),
    [
        ("ul2", {"mode_tokens": True}, None),
        ("decoder", {}, (1, 16)),
        pytest.param("prefix", {"separate_documents": False}, (16, 16), marks=pytest.mark.slow),
        pytest.param("prefix", {}, (16, 16), marks=pytest.mark.slow),
        pytest.param("span", {"separate_documents": False, "noise_density": 0.3}, None, marks=pytest.mark.slow),
    ],
)
def test_objectives(text, prepared, tmp_path, objective, more, lengths):
    config = settings(text, tmp_path, objective=objective, corpus=prepared, steps=2, evaluate_every=2, **more)
    result = pretrain(**config, say=lambda line: None)
    assert list(records(tmp_path)) == [1, 2]
    batches, scores = result.held_out, result.validation
    assert lengths in (None, batches.lengths)
    inputs, _, weights = batches.batch_at(0)
    assert ("segment_ids" in inputs) == config.get("separate_documents", True)
    modes = dict(batches.objective.facts.mode_ids)
    begins = inputs["token_ids"][weights.any(axis=1), 0]
    assert np.isin(begins, [*modes.values()]).all() == (objective == "ul2")
    assert (scores.bits_per_byte is not None) == (objective == "decoder")
    if objective == "decoder":
        part = Corpus.open(prepared / "validation")
        assert scores.num_tokens == part.num_tokens + batches.rows_per_epoch  # An end behind each piece.
        assert scores.bits_per_byte == pytest.approx(scores.num_tokens * scores.loss / math.log(2) / part.num_bytes)
    assert type(load_pretrained(tmp_path / "last")) is type(result.model)


@pytest.mark.slow
def test_a_byt5_reads_bytes(text, tmp_path):
    config = settings(text, tmp_path, preset="byt5-small", vocab_size=None, num_sentinels=None, steps=2)
    result = pretrain(**{**config, "num_decoder_layers": 1}, say=lambda line: None)
    assert (result.tokenizer.kind, result.model.config.vocab_size) == ("byte", 384)
    assert result.held_out.objective.mean_span_length == 20
    assert len(SentinelFacts.of(Tokenizer.from_pretrained(tmp_path / "last")).sentinel_ids) == 125


def test_adafactor_with_the_schedule_of_t5_is_reachable_by_flags():
    tyro = pytest.importorskip("tyro")
    words = "--optimizer adafactor --schedule inverse_sqrt_flat --learning-rate 0.01 --warmup-steps 10000"
    config = tyro.cli(PretrainConfig, args=[*words.split(), "--clip-norm", "None", "--steps", "5"])
    model_class, shape = find_preset("t5-small")
    shape = shape.replace(**{**SHAPE, "vocab_size": 64})
    optimizer = make_model(config, model_class, shape).optimizer
    assert (type(optimizer).__name__, optimizer.global_clipnorm) == ("Adafactor", None)
    for step in (0, 4, 40_000):
        assert float(optimizer._learning_rate(step)) == pytest.approx(1 / math.sqrt(max(step + 1, 10_000)))


def test_embeddings_learn_at_a_rate_of_their_own():
    model_class, shape = find_preset("t5-v1.1-small")
    shape = shape.replace(**{**SHAPE, "vocab_size": 64})
    optimizer = make_model(PretrainConfig(embedding_rate=7.0), model_class, shape).optimizer
    factors = dict(zip([each.path for each in optimizer._trainable_variables], optimizer._factors, strict=True))
    assert sorted(path for path, factor in factors.items() if factor == 7.0) == sorted(
        path for path in factors if path.endswith(("token_embedding/embeddings", "head_table"))
    )
    assert len([factor for factor in factors.values() if factor == 7.0]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "mlm"}, "objective is 'mlm', but a T5Model learns span or prefix or ul2 or decoder: take that"),
        ({"preset": "gpt2-nano", "objective": "span", "head_dim": None}, "is 'span', but a GPTModel learns causal"),
        ({"preset": "bert-tiny", "objective": "ul2", "head_dim": None}, "is 'ul2', but a BertModel learns mlm or mlm"),
        ({"preset": "gpt2-nano"}, "GPTConfig has no field 'head_dim'"),
        ({"noise_density": 1.0}, r"PretrainConfig.noise_density is 1.0, but must lie in \(0, 1\)"),
        ({"mean_span_length": 0.5}, "PretrainConfig.mean_span_length is 0.5, but must be 1 or more"),
        ({"embedding_rate": 0.0}, "PretrainConfig.embedding_rate is 0.0, but must be above 0"),
        ({"num_sentinels": 0}, "PretrainConfig.num_sentinels is 0, but must be an integer of 1 or more"),
        ({"seq_length": 64}, "seq_length is 64, but the model reads 32 tokens at most"),
        ({"mode_tokens": True}, "mode_tokens is True, but objective 'span' has no modes, only ul2 has"),
        ({"num_sentinels": 60}, "vocab_size=70 is too small for this text"),
        ({"num_sentinels": 1, "seq_length": 32}, "up to 2 spans, but the tokenizer has 1 sentinels: take shorter rows"),
        ({"tokenizer": "bpe", "vocab_size": 300}, "num_sentinels=20: kinds unigram and byte have sentinels, bpe has"),
        ({"packing": "stream"}, "packing: 'stream'; for SpanCorruption it must be 'best-fit' or 'pad'"),
    ],
)
def test_what_cannot_be_trained_is_refused(text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(**settings(text, tmp_path, **changes), say=lambda line: None)


def test_a_tokenizer_without_sentinels_is_refused_before_the_text_is_read(text, tmp_path):
    files = [str(path) for path in text.parent.glob("*.txt")]
    Tokenizer.train(files, kind="unigram", vocab_size=60).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="the tokenizer has no sentinels"):
        pretrain(**settings(text, tmp_path / "run", tokenizer=str(tmp_path / "tokenizer")), say=lambda line: None)
    assert not (tmp_path / "run" / "corpus").exists()


PROGRAM = """
import json, sys
from lmzoo import pretrain
strategy, config = sys.argv[1:]
result = pretrain(**json.loads(config), strategy=strategy, virtual_cpus=2 if strategy == "mirrored" else None)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_devices_give_the_losses_of_one(text, prepared, tmp_path):
    losses = []
    for strategy in ("one", "mirrored"):
        config = settings(text, str(tmp_path / strategy), corpus=str(prepared), steps=6, evaluate_every=6)
        config["dropout_rate"] = 0.0  # Each device drops other units.
        del config["strategy"]
        command = [sys.executable, "-c", PROGRAM, strategy, json.dumps(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        losses.append(
            [
                record[kind]
                for kind in ("loss", "validation_loss")
                for record in records(tmp_path / strategy, kind).values()
            ]
        )
    assert len(losses[0]) == 7
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
