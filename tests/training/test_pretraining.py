import dataclasses
import json
import lzma
import math
import random
import shutil

import numpy as np
import pytest

from lmzoo import GPTModel, PretrainConfig, Tokenizer, evaluate, pretrain
from lmzoo.data.corpus import Corpus

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "to", "me"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences that a tiny model can learn something about: each word decides the next but one."""
    generator = random.Random(0)
    lines = []
    for _ in range(400):
        words = [generator.choice(WORDS)]
        for _ in range(11):
            words.append(WORDS[(WORDS.index(words[-1]) + generator.choice((1, 2))) % len(WORDS)])
        lines.append(" ".join(words) + ".")
    directory = tmp_path_factory.mktemp("text")
    for number in range(40):
        (directory / f"{number:02d}.txt").write_text("\n".join(lines[number * 10 : number * 10 + 10]) + "\n")
    return directory


def settings(text, directory, **changes):
    return PretrainConfig(
        **{
            "directory": directory,
            "source": (str(text / "*.txt"),),
            "vocab_size": 300,
            "context_length": 16,
            "num_layers": 1,
            "num_heads": 2,
            "model_dim": 32,
            "steps": 30,
            "batch_size": 8,
            "warmup_steps": 5,
            "learning_rate": 1e-2,
            "evaluate_every": 10,
            "log_every": 1,
            "validation_fraction": 0.1,
            "strategy": "one",
            "verbose": "0",
            **changes,
        }
    )


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory):
    return {record["step"]: record["loss"] for record in records(directory) if "loss" in record}


@pytest.fixture(scope="module")
def whole_run(text, tmp_path_factory):
    """A run that nothing interrupts."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return pretrain(settings(text, directory), say=lambda line: None)


def test_the_loss_falls_and_is_logged(whole_run):
    trained = losses(whole_run.directory)
    assert sorted(trained) == list(range(1, 31))
    assert trained[1] == pytest.approx(math.log(whole_run.tokenizer.vocab_size), rel=0.05)
    assert trained[30] < 0.6 * trained[1]
    last = [record for record in records(whole_run.directory) if "loss" in record][-1]
    assert last["tokens"] == 30 * 8 * 16
    assert last["tokens_per_second"] > 0
    assert 0 < last["mfu"] < 1
    assert last["gradient_norm"] > 0
    assert last["learning_rate"] == pytest.approx(1e-3, rel=0.05)  # The cosine ends at a tenth of the peak.
    evaluations = [record["step"] for record in records(whole_run.directory) if "validation_loss" in record]
    assert evaluations == [10, 20, 30]
    assert list((whole_run.directory / "tensorboard").glob("events.*"))


def test_the_checkpoint_scores_as_the_run_said(whole_run):
    scores = evaluate(whole_run.directory / "last", whole_run.directory / "corpus", batch_size=4, verbose=0)
    assert scores.loss == pytest.approx(whole_run.validation.loss, rel=1e-5)
    assert scores.bits_per_byte == pytest.approx(whole_run.validation.bits_per_byte, rel=1e-5)
    assert scores.num_tokens == whole_run.validation.num_tokens


def test_bits_per_byte_is_what_coding_the_text_costs(whole_run):
    """Against a sum over documents, one at a time, with the whole of a document's past up to the row's start."""
    corpus = Corpus.open(whole_run.directory / "corpus" / "validation")
    stream = np.concatenate([corpus.document(number) for number in range(corpus.num_documents)])
    ends = set(np.cumsum([len(corpus.document(number)) for number in range(corpus.num_documents)]).tolist())
    starts = {0, *ends}
    bits = 0.0
    for row in range(0, len(stream), 16):
        tokens = stream[row : row + 17]
        first = row
        for place in range(row, min(row + 16, len(stream) - 1)):
            if place in starts:
                first = place
            if place + 1 in starts:
                continue
            context = tokens[first - row : place - row + 1]
            logits = np.asarray(whole_run.model(context[None]))[0, -1].astype("float64")
            bits += (np.log(np.exp(logits).sum()) - logits[tokens[place - row + 1]]) / math.log(2)
    bits += corpus.num_documents * math.log2(whole_run.model.config.vocab_size)
    assert whole_run.validation.bits_per_byte == pytest.approx(bits / corpus.num_bytes, rel=1e-4)


def test_the_held_out_text_is_what_a_compressor_would_see(whole_run):
    corpus = Corpus.open(whole_run.directory / "corpus" / "validation")
    text = "".join(whole_run.tokenizer.decode([corpus.document(number) for number in range(corpus.num_documents)]))
    assert len(text.encode()) == corpus.num_bytes
    assert len(lzma.compress(text.encode(), preset=9)) > 0


def test_a_stopped_run_goes_on_with_the_same_losses(text, whole_run, tmp_path):
    class StopError(Exception):
        pass

    def stop_after_20(line):
        if line.startswith("step 20"):
            raise StopError

    config = settings(text, tmp_path / "stopped")
    with pytest.raises(StopError):
        pretrain(config, say=stop_after_20)
    said = []
    again = pretrain(config, say=said.append)
    assert any("going on after step 20" in line for line in said)
    assert losses(again.directory) == losses(whole_run.directory)
    assert again.validation == whole_run.validation
    assert pretrain(config, say=said.append).validation == whole_run.validation  # Nothing left to do.


def test_documents_may_run_on(text, tmp_path):
    result = pretrain(settings(text, tmp_path, separate_documents=False, steps=4), say=lambda line: None)
    validation = Corpus.open(tmp_path / "corpus" / "validation")
    assert result.validation.num_tokens == validation.num_tokens - 1


@pytest.mark.parametrize("optimizer", ["lion", "adafactor", "muon", "lamb"])
@pytest.mark.slow
def test_every_optimizer_learns(text, tmp_path, optimizer):
    rate = {"lion": 3e-3, "muon": 1e-2, "adafactor": 3e-2, "lamb": 3e-2}[optimizer]
    config = settings(text, tmp_path, steps=60, optimizer=optimizer, learning_rate=rate, jit_compile=True)
    pretrain(config, say=lambda line: None)
    trained = losses(tmp_path)
    assert trained[max(trained)] < 0.8 * trained[min(trained)]


def test_a_mixed_precision_run_learns(text, tmp_path):
    config = settings(text, tmp_path, dtype="mixed_bfloat16", micro_batches=2, z_loss=1e-4, steps=20)
    pretrain(config, say=lambda line: None)
    assert losses(tmp_path)[20] < 0.8 * losses(tmp_path)[1]


def test_other_settings_in_the_same_directory_are_refused(text, whole_run):
    config = settings(text, whole_run.directory, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"learning_rate was 0.01 and is 0.5.*another directory"):
        pretrain(config, say=lambda line: None)


def test_settings_may_change_until_there_is_a_checkpoint(text, tmp_path):
    def vocab_size(**changes):
        return pretrain(settings(text, tmp_path, steps=1, **changes), say=lambda line: None).tokenizer.vocab_size

    with pytest.raises(FileNotFoundError, match="nothing"):
        vocab_size(source=("nothing.txt",))
    assert vocab_size(vocab_size=270) == 270
    with pytest.raises(ValueError, match="vocab_size was 270 and is 280"):
        vocab_size(vocab_size=280)
    shutil.rmtree(tmp_path / "checkpoints")
    assert vocab_size(vocab_size=280) == 280


def test_a_run_without_a_finite_gradient_stops(text, tmp_path, monkeypatch):
    def broken(self, *arguments, **keywords):
        sums = compute_sums(self, *arguments, **keywords)
        return {**sums, "loss": (sums["loss"][0] * math.nan, sums["loss"][1])} if keywords["training"] else sums

    compute_sums = GPTModel.compute_sums
    monkeypatch.setattr(GPTModel, "compute_sums", broken)
    with pytest.raises(
        FloatingPointError,
        match=r"nor gradient was finite in 12 steps in a row, 1 to 12; .* examples 0 to 95 .*step-00000010\. Try",
    ):
        pretrain(settings(text, tmp_path, max_skipped=12), say=lambda line: None)


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
    config = settings(text, tmp_path, learning_rate=1e30, clip_norm=None, schedule="constant", warmup_steps=1)
    with pytest.raises(FloatingPointError, match=r"step 10; the last good checkpoint is none"):
        pretrain(config, say=lambda line: None)
    assert not list(tmp_path.glob("checkpoints/step-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"source": ()}, "source is empty"),
        ({"preset": "gpt3"}, "no preset 'gpt3'.*gpt2"),
        ({"batch_size": 9, "micro_batches": 2}, "global batch of 9"),
    ],
)
def test_a_setting_out_of_range_is_an_error(text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(settings(text, tmp_path, **changes), say=lambda line: None)


def test_fields_replace_those_of_a_config(text, tmp_path):
    config = settings(text, tmp_path)
    assert dataclasses.replace(config, steps=2).steps == 2
    result = pretrain(config, steps=2, say=lambda line: None)
    assert result.steps == 2
    assert isinstance(GPTModel.from_pretrained(result.checkpoint), GPTModel)
    assert Tokenizer.from_pretrained(result.checkpoint).fingerprint == result.tokenizer.fingerprint
