"""Text to text: a tiny T5 that is trained from scratch to copy, and what each setting does."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import rouge_score.rouge_scorer
import sacrebleu
import safetensors.numpy
from command_line import run_here

from lmzoo.checkpoints import CheckpointError
from lmzoo.data.records import Records, read_records
from lmzoo.data.text_to_text import Mixture
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import load_pretrained
from lmzoo.pipelines import load_pipeline
from lmzoo.training import FinetuneConfig, evaluate_task, finetune, make_untrained
from lmzoo.training.checkpointing import CheckpointStore
from lmzoo.training.finetune_tasks import RECIPES
from lmzoo.training.finetune_text import TextToText
from lmzoo.training.metrics import text_scores

PAIRS = [{"source": f"{letter} {letter}", "target": f"{letter} {letter}"} for letter in "abcdefghijkl"]
TINY = {"num_layers": 1, "num_heads": 2, "head_dim": 16, "model_dim": 32, "feedforward_dim": 64}


ALONE = {"validation": (), "validation_fraction": 0.0, "test": ()}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with an untrained T5 in start, and pairs in pairs.jsonl."""
    directory = tmp_path_factory.mktemp("place")
    write(directory / "pairs.jsonl", PAIRS)
    texts = [pair[side] for pair in PAIRS for side in ("source", "target")]
    make_untrained(directory / "start", "t5-small", texts, vocab_size=60, **TINY)
    return directory


def run(place, directory, **changes):
    said = []
    data = str(place / "pairs.jsonl")
    settings = {
        "task": "text-to-text",
        "model": place / "start",
        "train": data,
        "validation": data,
        "test": data,
        "directory": directory,
        "max_length": 16,
        "max_target_length": 8,
        "batch_size": 6,
        "optimizer": "muon",
        "learning_rate": 2e-2,
        "verbose": "0",
        "log_every": 1,
        **changes,
    }
    return finetune(say=said.append, **settings), said


def weights_of(checkpoint):
    return safetensors.numpy.load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def learnt(place, tmp_path_factory):
    """A run that has learnt all pairs."""
    directory = tmp_path_factory.mktemp("runs") / "learnt"
    return run(place, directory, epochs=40, max_steps=39, metric="exact_match", dropout_rate=0.0)


def test_a_model_from_scratch_learns_to_write_what_it_is_to_write(learnt):
    result, said = learnt
    scores = result.metrics["test"]
    assert scores["exact_match"] == scores["rouge1"] == 1.0
    assert scores["chrf"] == pytest.approx(100.0)
    assert scores == result.metrics["validation"]
    predictions = [json.loads(line) for line in (result.directory / "predictions.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in predictions] == [pair["target"] for pair in PAIRS]
    epochs = [line for line in said if line.startswith("epoch ")]
    ends = [line.split(":")[0] for line in (epochs[0], epochs[-1])]
    assert ends == ["epoch 1, step 2", "epoch 20, step 39"]  # It ends within an epoch.
    assert len(epochs) == 20
    best = json.loads((result.directory / "metrics.json").read_text())["epoch"]
    found = ["exact_match 1.0000" in line for line in epochs]
    assert found.index(True) == best - 1


def test_its_checkpoint_is_evaluated_and_is_a_model_of_its_own(learnt, place, capsys):
    result, _ = learnt
    data = str(place / "pairs.jsonl")
    scores = evaluate_task(result.directory, [data], max_length=16, max_target_length=8)
    assert scores == result.metrics["test"]
    run_here("evaluate", result.directory, data, "--max-target-length", 8)
    assert json.loads(capsys.readouterr().out) == scores
    model, tokenizer = load_pretrained(result.checkpoint), Tokenizer.from_pretrained(result.checkpoint)
    ids = [*tokenizer.encode("d d"), tokenizer.eos_token_id]
    assert tokenizer.decode(model.generate([ids], 8, temperature=0.0))[0] == "d d"
    pipeline = load_pipeline(result.directory)
    assert (pipeline.max_new_tokens, pipeline.prefix, pipeline.beams.num_beams) == (8, "", 1)
    assert pipeline(["d d", "f f"]) == ["d d", "f f"]
    card = (result.checkpoint / "README.md").read_text()
    assert "lmzoo.models import load_pretrained" in card
    assert "text2text-generation" in card
    assert f'"value": {result.metrics["test"]["bleu"]}' in card


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(place, tmp_path, monkeypatch):
    settings = {"epochs": 3, "optimizer": "adamw", "dropout_rate": 0.1, "label_smoothing": 0.1, "z_loss": 1e-4, **ALONE}
    whole, _ = run(place, tmp_path / "whole", **settings)
    original = CheckpointStore.save

    def save(store, model, progress):
        if progress.step == 4:
            raise Interrupted
        return original(store, model, progress)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", save)
        with pytest.raises(Interrupted):
            run(place, tmp_path / "parts", **settings)
    parts, said = run(place, tmp_path / "parts", **settings)
    assert any("going on after step 2" in line for line in said)
    for name, value in weights_of(whole.checkpoint).items():
        np.testing.assert_array_equal(weights_of(parts.checkpoint)[name], value)


def recipe_of(place, **settings):
    config = FinetuneConfig(**{"task": "text-to-text", "model": place / "start", "train": ("x",), **settings})
    return TextToText(config, None)


def test_each_source_is_a_task_with_its_prefix_and_its_share(place, tmp_path):
    one, two = write(tmp_path / "one.jsonl", PAIRS[:10]), write(tmp_path / "two.jsonl", PAIRS[10:])
    records = read_records([one, two])
    assert records.sources == [0] * 10 + [1] * 2
    assert records.take([11, 0]).sources == [1, 0]
    recipe = recipe_of(
        place, train=(one, two), prefix=("one ", "two "), mixing_temperature=math.inf, max_target_length=8
    )
    tokenizer = Tokenizer.from_pretrained(place / "start")
    training = recipe.encode_training(records, tokenizer, 16)
    assert isinstance(training, Mixture)
    np.testing.assert_allclose(training.rates, [0.5, 0.5])
    capped = recipe_of(place, train=(one, two), mixing_cap=6).encode_training(records, tokenizer, 16)
    np.testing.assert_allclose(capped.rates, [6 / 8, 2 / 8])
    scored = recipe.encode(records, tokenizer, 16)
    assert scored.targets == [pair["target"] for pair in PAIRS]
    for examples in (training, scored):
        for number in (0, 9, 10, 11):
            prefix = "one " if number < 10 else "two "
            expected = [*tokenizer.encode(prefix + PAIRS[number]["source"]), tokenizer.eos_token_id]
            assert examples.inputs["token_ids"][number].tolist() == expected


@pytest.mark.slow
def test_packed_rows_hold_several_pairs_and_train(place, tmp_path):
    recipe = recipe_of(place, packing=True, max_target_length=32)
    tokenizer = Tokenizer.from_pretrained(place / "start")
    packed = recipe.encode_training(Records(PAIRS), tokenizer, 32)
    assert len(packed) <= len(PAIRS) / 3
    assert packed.inputs["segment_ids"][0].max() >= 3
    assert "segment_ids" not in recipe.encode(Records(PAIRS), tokenizer, 32).inputs
    run(
        place, tmp_path / "run", packing=True, max_length=32, max_target_length=32, optimizer="adamw", epochs=3, **ALONE
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3  # Of one batch each.
    assert losses[2] < losses[0]


def test_scores_are_those_of_the_libraries():
    targets = ["Der Hund läuft schnell über die Wiese.", "The cat sat on the mat today.", "Ja."]
    texts = ["Der Hund läuft über die grüne Wiese.", "The cat sat on a mat.", "Ja."]
    scores = text_scores(targets, texts)
    assert scores["bleu"] == sacrebleu.BLEU().corpus_score(texts, [targets]).score
    assert scores["chrf"] == sacrebleu.CHRF().corpus_score(texts, [targets]).score
    scorer = rouge_score.rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [scorer.score(*pair)[name].fmeasure for pair in zip(targets, texts, strict=True)]
        assert scores[name] == pytest.approx(sum(each) / 3)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert text_scores(texts, targets)["bleu"] != scores["bleu"]


def test_decoding_is_as_the_settings_say(learnt, place):
    result, _ = learnt
    tokenizer = result.tokenizer
    settings = dataclasses.asdict(FinetuneConfig(task="text-to-text", model=place, train=("x",), max_new_tokens=3))
    recipe = RECIPES["text-to-text"](FinetuneConfig(**settings), None)
    ids = [*tokenizer.encode("d d"), tokenizer.eos_token_id]
    inputs = result.model.pad_sources([ids])
    greedy = recipe.outputs(result.model, inputs).numpy()
    np.testing.assert_array_equal(greedy, result.model.generate([ids], 3, temperature=0.0))
    for penalty in (0.0, 4.0):
        beams = FinetuneConfig(**{**settings, "num_beams": 3, "length_penalty": penalty, "max_new_tokens": 8})
        found = RECIPES["text-to-text"](beams, None).outputs(result.model, inputs).numpy()
        expected = result.model.beam_search([ids], 8, num_beams=3, length_penalty=penalty).token_ids[:, 0]
        np.testing.assert_array_equal(found, expected)
    saved = RECIPES["text-to-text"](FinetuneConfig(**{**settings, "num_beams": 3, "prefix": ("copy: ",)}), None)
    ends = {"decoder_start_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    writing = {"max_new_tokens": 3, "num_beams": 3, "length_penalty": 1.0, "prefix": "copy: "}
    assert saved.generation_config(tokenizer) == {**ends, **writing}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix": ("a", "b")}, "FinetuneConfig.prefix has 2 prefixes, but train has 1 sources"),
        ({"freeze": 1}, "FinetuneConfig.freeze is 1, but text-to-text has no use for it"),
        ({"num_beams": 0}, "FinetuneConfig.num_beams is 0, but must be an integer of 1 or more"),
        ({"z_loss": -1.0}, r"FinetuneConfig.z_loss is -1\.0, but must be 0 or more"),
        ({"task": "classify", "embedding_rate": 2.0}, r"FinetuneConfig.embedding_rate is 2\.0, but only text-to-text"),
        ({"label": "german"}, "no field 'german' among"),
        ({"mixing_temperature": 0.0}, r"FinetuneConfig.mixing_temperature is 0\.0, but must be above 0"),
    ],
)
def test_what_is_wrong_is_told(place, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(place, tmp_path / "run", **settings)


def test_a_model_that_answers_no_texts_is_refused(place, tmp_path):
    texts = [pair["source"] for pair in PAIRS]
    tiny = {"num_layers": 1, "num_heads": 2, "model_dim": 16}
    directory = make_untrained(tmp_path / "gpt", "gpt2", texts, vocab_size=300, **tiny)
    with pytest.raises(CheckpointError, match="holds a GPTModel, but text-to-text needs an encoder and a decoder"):
        recipe_of(place).load(directory)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_devices_write_what_one_writes(learnt, place, tmp_path):
    """In a process of its own, which has one strategy."""
    result, _ = learnt
    code = f"""
import json
from lmzoo.training import finetune
data = {str(place / "pairs.jsonl")!r}
result = finetune(
    task="text-to-text", model={str(result.checkpoint)!r}, train=data, validation=data, test=data,
    directory={str(tmp_path / "two")!r}, max_length=16, max_target_length=8, batch_size=8, epochs=1, verbose="0",
    learning_rate=1e-4, num_beams=2, strategy="mirrored", virtual_cpus=2, dropout_rate=0.0,
)
print(json.dumps(result.metrics))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 replicas" in done.stdout
    settings = {"model": result.checkpoint, "optimizer": "adamw", "learning_rate": 1e-4, "batch_size": 8, "epochs": 1}
    one, _ = run(place, tmp_path / "one", num_beams=2, dropout_rate=0.0, **settings)
    assert json.loads(done.stdout.splitlines()[-1]) == one.metrics
    two = weights_of(tmp_path / "two" / "best")
    for name, value in weights_of(one.checkpoint).items():
        np.testing.assert_allclose(two[name], value, atol=1e-4)
