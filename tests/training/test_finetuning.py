"""Fine-tuning on made-up tasks that a tiny encoder can learn or that show what a setting does."""

import dataclasses
import json
import random
import subprocess
import sys

import keras
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY

from lmzoo.data.records import read_records
from lmzoo.data.tokenizers import Tokenizer
from lmzoo.models import ARCHITECTURES
from lmzoo.tasks import load_task
from lmzoo.training import FinetuneConfig, evaluate_task, finetune
from lmzoo.training.checkpointing import CheckpointStore
from lmzoo.training.finetune_tasks import RECIPES
from lmzoo.training.finetuning import _split

GOOD, BAD = ["good", "fine", "great", "nice"], ["bad", "poor", "awful", "sad"]
OTHERS = ["the", "film", "was", "a", "story", "that", "plays", "in", "rome"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with an untrained encoder and its tokenizer, and reviews in train.jsonl and test.jsonl."""
    directory = tmp_path_factory.mktemp("place")
    generator = random.Random(0)
    rows = []
    for number in range(240):
        words = [*generator.sample(OTHERS, generator.randint(2, 6)), generator.choice((GOOD, BAD)[number % 2])]
        generator.shuffle(words)
        rows.append({"text": " ".join(words), "label": ("good", "bad")[number % 2]})
    write(directory / "train.jsonl", rows[:200])
    write(directory / "test.jsonl", rows[200:])
    texts = [" ".join(GOOD + BAD + OTHERS), "what ?"] * 3
    tokenizer = Tokenizer.train(iter(texts), kind="wordpiece", vocab_size=120)
    model_class = ARCHITECTURES["bert"]
    keras.utils.set_random_seed(0)
    shape = {**TINY["bert"], "vocab_size": tokenizer.vocab_size, "num_layers": 1, "model_dim": 32}
    encoder = model_class(model_class.config_class.from_dict(shape))
    numbers = np.random.default_rng(0)
    for variable in encoder.trainable_variables:  # As new weights are, attention sees next to nothing of the words.
        variable.assign_add(numbers.normal(0.0, 0.1, variable.shape))
    encoder.save_pretrained(directory / "encoder")
    tokenizer.save_pretrained(directory / "encoder")
    return directory


def run(place, directory, **changes):
    said = []
    settings = {
        "model": place / "encoder",
        "train": str(place / "train.jsonl"),
        "directory": directory,
        "max_length": 16,
        "batch_size": 16,
        "epochs": 1,
        "learning_rate": 2e-2,
        "verbose": "0",
        "log_every": 5,
        **changes,
    }
    return finetune(say=said.append, **settings), said


def records_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights_of(checkpoint):
    return safetensors.numpy.load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def whole_run(place, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return run(place, directory, epochs=3, test=str(place / "test.jsonl"), dropout_rate=0.1)


def test_a_run_learns_and_leaves_its_results(whole_run, place):
    result, said = whole_run
    assert result.metrics["test"]["accuracy"] > 0.8
    assert set(result.metrics["validation"]) == {"accuracy", "f1", "macro_f1", "matthews"}
    assert result.model.labels == ("bad", "good")
    written = json.loads((result.directory / "metrics.json").read_text())
    assert written["test"] == result.metrics["test"]
    evaluations = [record for record in records_of(result.directory) if "validation_loss" in record]
    assert [record["step"] for record in evaluations] == [12, 24, 36]  # 180 of 200 examples in batches of 16.
    best = max(evaluations, key=lambda record: record["validation_accuracy"])
    assert written["epoch"] == best["step"] // 12
    assert result.metrics["validation"]["accuracy"] == pytest.approx(best["validation_accuracy"])
    predictions = [json.loads(line) for line in (result.directory / "predictions.jsonl").read_text().splitlines()]
    assert [row["text"] for row in predictions] == [row["text"] for row in read_records(place / "test.jsonl")]
    right = sum(row["label"] == row["prediction"] for row in predictions)
    assert right / len(predictions) == result.metrics["test"]["accuracy"]
    assert all(max(row["scores"], key=row["scores"].get) == row["prediction"] for row in predictions)
    assert any("classifier.weight" in line for line in said)  # The head is new, which is said.


def test_the_checkpoint_is_a_model_of_its_own(whole_run, place):
    result, _ = whole_run
    loaded = load_task(result.checkpoint)
    assert loaded.labels == result.model.labels
    assert evaluate_task(result.directory, [str(place / "test.jsonl")], max_length=16) == result.metrics["test"]
    card = (result.checkpoint / "README.md").read_text()
    assert "text-classification" in card
    assert f'"value": {result.metrics["test"]["accuracy"]}' in card
    assert CheckpointStore(result.directory).restore is not None
    assert Tokenizer.from_pretrained(result.checkpoint).vocab_size == result.tokenizer.vocab_size


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("moment", ["evaluation", "training"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(whole_run, place, tmp_path, monkeypatch, moment):
    result, _ = whole_run
    settings = {"epochs": 3, "test": str(place / "test.jsonl"), "dropout_rate": 0.1}
    if moment == "evaluation":  # The checkpoint of epoch 2 is there, its evaluation is not.
        original = CheckpointStore.save_evaluation

        def save_evaluation(store, progress):
            if progress.step == 24:
                raise Interrupted
            original(store, progress)

        patched = ("save_evaluation", save_evaluation)
    else:  # A checkpoint in the middle of an epoch, as SIGTERM leaves one, is followed by nothing else.
        original = CheckpointStore.save

        def save(store, model, progress):
            if progress.step == 24:
                raise Interrupted
            return original(store, model, progress)

        patched = ("save", save)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, *patched)
        with pytest.raises(Interrupted):
            run(place, tmp_path / "run", **settings)
    again, said = run(place, tmp_path / "run", **settings)
    after = 24 if moment == "evaluation" else 12
    assert any(f"going on after step {after}" in line for line in said)
    assert again.metrics == result.metrics
    for name, value in weights_of(result.checkpoint).items():
        np.testing.assert_array_equal(weights_of(again.checkpoint)[name], value)
    kept = ("step", "loss", "validation_loss")
    logs = [[{k: r[k] for k in kept if k in r} for r in records_of(each.directory)] for each in (result, again)]
    assert logs[0] == logs[1]


TAGGED = [
    {"tokens": ["the", "story", "plays", "in", "rome"], "tags": ["O", "O", "O", "O", "B-LOC"]},
    {"tokens": ["rome", "was", "nice"], "tags": ["B-LOC", "O", "O"]},
] * 8
ASKED = [
    {
        "question": "what ?",
        "context": "the story was nice " * 6 + "rome",
        "answers": {"text": ["rome"], "answer_start": [114]},
    },
    {"question": "what ?", "context": "a film was sad", "answers": []},
] * 8
ALIKE = [{"text": "good film", "pair": "great film", "score": 4}, {"text": "bad film", "pair": "nice", "score": 0}] * 8
TASKS = {
    "multilabel": ([{"text": "good film", "label": ["x", "y"]}, {"text": "bad film", "label": ["y"]}] * 8, {}),
    "regress": ([{"text": "good film", "label": 1.0}, {"text": "bad film", "label": -1}] * 8, {"metric": "mse"}),
    "tag": (TAGGED, {"max_length": 8, "class_weights": "balanced"}),
    "answer": (ASKED, {"max_length": 20, "n_best": 2}),
    "embed": (ALIKE, {"label": "score", "max_score": 5.0}),
}


@pytest.mark.parametrize(
    "task", [task if task == "tag" else pytest.param(task, marks=pytest.mark.slow) for task in TASKS]
)
def test_every_task_learns(place, tmp_path, task):
    rows, settings = TASKS[task]
    data = write(tmp_path / "rows.jsonl", rows)
    parts = {"train": data, "validation": data, "test": data}
    result, _ = run(
        place, tmp_path / "run", task=task, epochs=40, batch_size=8, learning_rate=5e-3, **parts, **settings
    )
    recipe = RECIPES[task](
        dataclasses.replace(FinetuneConfig(model=place, train=("x",), task=task), **{**settings, "metric": None}), None
    )
    assert result.metrics["test"][recipe.metric] > 0.9
    assert result.metrics["test"] == result.metrics["validation"]
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == len(rows)
    said = [row["prediction"] for row in predictions[:2]]
    if task == "answer":
        assert said == ["rome", ""]
        assert [predictions[0]["context"][slice(*(predictions[0][key] for key in ("start", "end")))]] == ["rome"]
        assert len(predictions[0]["n_best"]) == 2
    elif task in ("regress", "embed"):
        assert said[0] > said[1] + 0.1 * (task == "regress")
    else:
        assert said == [row["tags" if task == "tag" else "label"] for row in rows[:2]]
    fields = {"label": settings.get("label"), "max_score": settings.get("max_score", 1.0), "max_length": 20}
    assert evaluate_task(tmp_path / "run", [data], **fields)[recipe.metric] > 0.9


@pytest.mark.slow
def test_pairs_without_scores_are_learnt_by_contrast(place, tmp_path):
    rows = [{"text": word, "pair": f"a {word} film"} for word in GOOD + BAD]
    data = write(tmp_path / "rows.jsonl", rows)
    result, _ = run(place, tmp_path / "run", task="embed", train=data, validation=data, batch_size=8, epochs=3)
    assert result.model.objective == "contrastive"
    assert set(result.metrics["validation"]) == {"accuracy", "mrr"}


def test_a_run_ends_early_and_keeps_its_best_epoch(place, tmp_path):
    result, said = run(place, tmp_path / "run", epochs=9, early_stopping=2, learning_rate=1e-9, metric="accuracy")
    epochs = [line for line in said if line.startswith("epoch ")]
    assert len(epochs) == 3  # The first is the best, two bring nothing better.
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epoch"] == 1
    assert result.checkpoint.name == "step-00000012"
    again, said = run(place, tmp_path / "run", epochs=9, early_stopping=2, learning_rate=1e-9, metric="accuracy")
    assert again.metrics == result.metrics
    assert not [line for line in said if line.startswith("epoch ")]


def test_frozen_and_anchored_weights(place, tmp_path):
    start = weights_of(place / "encoder")

    def distance(**settings):
        name = f"run{len(list(tmp_path.iterdir()))}"
        result, said = run(place, tmp_path / name, validation_fraction=0.0, **settings)
        assert result.metrics == {}
        after = weights_of(result.checkpoint)
        encoder = [key for key in after if key in start]
        assert len(encoder) > 10
        return {key: float(np.abs(after[key] - start[key]).max()) for key in encoder}, said

    frozen, said = distance(freeze="all")
    assert not any(frozen.values())
    assert any(" 66 of them trained" in line for line in said)  # The head: 2 x 32 weights and 2 biases.
    free, _ = distance()
    pulled, _ = distance(l2_sp=20.0)
    assert max(pulled.values()) < 0.5 * max(free.values())
    decayed, _ = distance(layer_decay=0.01)
    table = "bert.embeddings.word_embeddings.weight"
    assert decayed[table] < 0.01 * free[table]
    assert decayed["bert.pooler.dense.weight"] > 0.1 * free["bert.pooler.dense.weight"]


def test_going_on_from_a_model_with_the_same_head(whole_run, place, tmp_path):
    result, _ = whole_run
    again, said = run(
        place, tmp_path / "run", model=result.checkpoint, learning_rate=1e-9, test=str(place / "test.jsonl")
    )
    assert again.metrics["test"] == result.metrics["test"]
    assert not any("classifier" in line for line in said)


def test_balanced_class_weights():
    config = FinetuneConfig(model="m", train=("t",), class_weights="balanced", labels=("a", "b", "c"))
    recipe = RECIPES["classify"](config, [])
    assert recipe._class_weights(np.array([0, 0, 0, 1])) == pytest.approx([4 / 6, 2.0, 2.0])


def test_the_held_out_part_depends_on_the_seed(place):
    records = read_records(place / "train.jsonl")
    parts = [_split(records, 0.1, seed) for seed in (0, 0, 1)]
    assert [len(part) for part in parts[0]] == [180, 20]
    assert parts[0][1].places == parts[1][1].places != parts[2][1].places
    assert sorted(parts[0][0].places + parts[0][1].places) == sorted(records.places)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "summarise"}, "FinetuneConfig.task is 'summarise', but must be one of classify, "),
        ({"epochs": 0}, "FinetuneConfig.epochs is 0, but must be an integer of 1 or more"),
        ({"learning_rate": 0.0}, r"FinetuneConfig.learning_rate is 0\.0, but must be above 0"),
        ({"layer_decay": 1.5}, r"FinetuneConfig.layer_decay is 1\.5, but must be in \(0, 1\]"),
        ({"task": "regress", "class_weights": "balanced"}, "regress has no classes to weigh"),
        ({"task": "tag", "pair": "other"}, "words have no second text"),
        ({"early_stopping": 1, "validation_fraction": 0.0}, "early_stopping needs a validation part"),
        ({"train": ()}, r"FinetuneConfig.train is \(\), but must be the name of a source"),
        ({"metric": "bleu"}, "FinetuneConfig.metric is 'bleu', but must be one of loss, accuracy, f1"),
        ({"text": "review"}, r"train.jsonl, line \d+: no field 'review' among \['label', 'text'\]"),
        ({"labels": ("good", "mixed")}, "'label' has 'bad', which is none of the labels"),
    ],
)
def test_what_is_wrong_is_told(place, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(place, tmp_path / "run", **settings)


def test_a_directory_belongs_to_one_run(whole_run, place):
    result, _ = whole_run
    with pytest.raises(ValueError, match="other settings: epochs was 3 and is 1"):
        run(place, result.directory, dropout_rate=0.1)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_devices_give_what_one_gives(place, tmp_path):
    """In a process of its own, which has one strategy."""
    code = f"""
import json
from lmzoo.training import finetune
result = finetune(
    model={str(place / "encoder")!r}, train={str(place / "train.jsonl")!r}, test={str(place / "test.jsonl")!r},
    directory={str(tmp_path / "two")!r}, max_length=16, batch_size=16, epochs=1, learning_rate=5e-3, verbose="0",
    strategy="mirrored", virtual_cpus=2, dropout_rate=0.0,
)
print(json.dumps(result.metrics))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads(done.stdout.splitlines()[-1])
    one, _ = run(place, tmp_path / "one", test=str(place / "test.jsonl"), dropout_rate=0.0, learning_rate=5e-3)
    assert metrics == one.metrics
    assert "2 replicas" in done.stdout
    two = weights_of(tmp_path / "two" / "best")
    for name, value in weights_of(one.checkpoint).items():
        np.testing.assert_allclose(two[name], value, atol=1e-4)
