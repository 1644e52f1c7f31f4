"""Artefacts are compared with their checkpoint by what they give, each in a process of its own."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tiny_encoders
from command_line import run_here
from tiny_pipeline import tiny_model, tiny_tokenizer

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert, from the extra tflite")

import lmzoo.training
from lmzoo import PretrainConfig, load_pipeline, pretrain
from lmzoo.cli import main
from lmzoo.data.sources import read_documents
from lmzoo.export import export_tflite
from lmzoo.models import ARCHITECTURES
from lmzoo.training import export_checkpoint_tflite
from lmzoo.training.verification import TOLERANCES, Tolerance, verify

LENGTH, TOKENS = 16, 48


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, a .tflite file of it, one of another model, and a text."""
    directory = tmp_path_factory.mktemp("verification")
    model = tiny_model()
    model.save_pretrained(directory / "checkpoint")
    tiny_tokenizer().save_pretrained(directory / "checkpoint")
    same = export_tflite(model, directory / "same.tflite", prefill_length=8).read_bytes()
    table = model.token_embedding.embeddings.numpy()
    noise = np.random.default_rng(9).normal(0.0, 0.1, table.shape).astype(np.float32)
    assert table.tobytes() in same
    (directory / "other.tflite").write_bytes(same.replace(table.tobytes(), (table + noise).tobytes()))
    (directory / "text.txt").write_text("the cat sat on the mat and that was that " * 20)
    return directory


@pytest.fixture(scope="module")
def results(place):
    return verify(
        [place / "same.tflite", place / "other.tflite"],
        place / "checkpoint",
        text=str(place / "text.txt"),
        num_tokens=TOKENS,
        length=LENGTH,
    )


def test_an_artefact_of_the_checkpoint_passes(results):
    reference, same, _ = results
    assert [result["kind"] for result in results] == ["Keras", "TFLite float32", "TFLite float32"]
    assert reference["max_difference"] == 0.0
    assert 0.0 < same["max_difference"] < 1e-4
    assert same["agreement"] == 1.0
    assert same["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-5)
    assert not reference["problems"]
    assert not same["problems"]


def test_an_artefact_of_another_model_is_told_by_all_that_differs(results):
    other = results[2]
    assert other["max_difference"] > 0.01
    assert other["agreement"] < 1.0
    assert len(other["problems"]) >= 2
    assert "outputs differ by" in other["problems"][0]


def test_perplexity_is_that_of_the_text(place, results):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = np.array(tokenizer.encode("the cat sat on the mat and that was that " * 20)[:TOKENS]).reshape(-1, LENGTH)
    logits = model(ids)[:, :-1].numpy().astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, ids[:, 1:, None], -1)
    assert results[0]["perplexity"] == pytest.approx(math.exp(-chosen.mean()), rel=1e-5)


def test_what_an_artefact_costs_is_measured(place, results):
    reference, same, _ = results
    for result in results:
        assert result["seconds_per_token"] > 0.0
        assert result["first_token_seconds"] > 0.0
    assert same["size_bytes"] == (place / "same.tflite").stat().st_size
    # What runs a phone's file needs no TensorFlow, so each artefact must have had a process of its own.
    assert same["peak_bytes"] < 0.5 * reference["peak_bytes"]


@pytest.mark.parametrize(("keep", "status"), [(2, 0), (3, 1)])
def test_the_command_prints_a_table_writes_json_and_tells_by_its_status(
    results, keep, status, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lmzoo.training, "verify", lambda *_, **__: results[:keep])
    with pytest.raises(SystemExit) as ended:
        main(["verify", "a.tflite", "--against", "run", "--json-file", str(tmp_path / "figures.json")])
    assert ended.value.code == status
    assert json.loads((tmp_path / "figures.json").read_text()) == results[:keep]
    printed = capsys.readouterr().out
    assert "TFLite float32" in printed
    assert ("outputs differ by" in printed) == bool(status)


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "checkpoint/config.json", "--against", "checkpoint"],
        ["verify", "absent.tflite", "--against", "checkpoint"],
        ["verify", "same.tflite", "--against", "checkpoint", "--length", "2"],
        ["verify", "same.tflite", "--against", "checkpoint", "--length", "64"],
        ["verify", "same.tflite", "--against", "checkpoint", "--text", "short.txt"],
        ["verify", "same.tflite"],
        ["verify", "--against", "checkpoint"],
    ],
)
def test_bad_usage_has_status_2(place, arguments, monkeypatch):
    monkeypatch.chdir(place)
    (place / "short.txt").write_text("the cat")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.slow
def test_an_artefact_that_cannot_be_run_is_a_failure(place):
    (place / "broken.tflite").write_bytes(b"no flatbuffer at all")
    with pytest.raises(ChildProcessError, match=r"broken.tflite could not be run \(status 1\)"):
        verify([place / "broken.tflite"], place / "checkpoint", text=str(place / "text.txt"), num_tokens=16, length=16)


def test_a_tolerance_counts_what_it_says():
    exact = Tolerance(max_difference=0.1, min_agreement=0.9, max_perplexity_change=0.01)
    good = {"max_difference": 0.1, "agreement": 0.9, "perplexity_change": 0.01}
    assert not exact.problems(good)
    assert not exact.problems({**good, "perplexity_change": -0.5})
    for name, value in (("max_difference", 0.11), ("agreement", 0.89), ("perplexity_change", 0.011)):
        assert len(exact.problems({**good, name: value})) == 1
    for name in ("max_difference", "perplexity_change"):
        assert len(TOLERANCES["TFLite int8"].problems({**good, name: math.nan})) == 1
    assert not exact.problems({"max_difference": 0.0, "agreement": None, "perplexity_change": None})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["single_label", "embeddings"])
def test_classifiers_and_embedders_are_compared_by_their_outputs(task, tmp_path):
    model, tokenizer = tiny_encoders.task_model(task), tiny_encoders.tiny_tokenizer()
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    export_tflite(model, tmp_path / "model.tflite")
    load_pipeline(tmp_path / "checkpoint").export(tmp_path / "served")
    artefacts = [tmp_path / "model.tflite", tmp_path / "served"]
    for result in verify(artefacts, tmp_path / "checkpoint", num_tokens=64, length=16):
        assert result["max_difference"] < 1e-4
        assert result["agreement"] == (None if task == "embeddings" else 1.0)
        assert result["perplexity"] is None
        assert result["seconds_per_token"] is None
        assert not result["problems"]


@pytest.mark.slow
def test_what_answers_texts_is_compared_by_its_answers(place, tmp_path):
    model_class = ARCHITECTURES["t5"]
    shape = {"vocab_size": 300, "num_layers": 1, "num_heads": 2, "head_dim": 8, "model_dim": 16, "feedforward_dim": 32}
    model = model_class(model_class.config_class.from_dict({**shape, "context_length": 24}))
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer().save_pretrained(tmp_path / "checkpoint")
    export_tflite(model, tmp_path / "t5.tflite")
    text = str(place / "text.txt")
    reference, same = verify([tmp_path / "t5.tflite"], tmp_path / "checkpoint", text=text, num_tokens=48, length=16)
    assert same["max_difference"] < 1e-4
    assert same["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-5)
    assert not same["problems"]


@pytest.mark.slow
def test_int8_of_a_trained_model_is_small_and_hardly_worse(tmp_path):
    """3.5 times smaller than float32, and at most 1% worse in perplexity, on documents that training never saw."""
    documents = list(read_documents("pydoc"))
    for name, chosen in (("learnt", documents[::2]), ("held-out", documents[1::2])):
        lines = [json.dumps({"text": document}) + "\n" for document in chosen]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = PretrainConfig(
        directory=tmp_path / "run",
        source=(str(tmp_path / "learnt.jsonl"),),
        vocab_size=2048,
        context_length=128,
        num_layers=4,
        num_heads=4,
        model_dim=256,
        steps=120,
        batch_size=8,
        evaluate_every=120,
        evaluation_batches=1,
        verbose=0,
    )
    pretrain(config)
    files = {
        weights: export_checkpoint_tflite(tmp_path / "run", tmp_path / f"{weights}.tflite", weights=weights)
        for weights in ("float32", "int8")
    }
    sizes = {weights: path.stat().st_size for weights, path in files.items()}
    assert sizes["float32"] > 3.5 * sizes["int8"]
    text = str(tmp_path / "held-out.jsonl")
    reference, same, small = verify(list(files.values()), tmp_path / "run", text=text, num_tokens=1024, length=128)
    assert reference["perplexity"] < 600, "it should have learnt something"
    assert same["max_difference"] < 1e-3
    assert abs(small["perplexity_change"]) < 0.01
    assert not same["problems"]
    assert not small["problems"]


@pytest.mark.slow
def test_the_command_from_beginning_to_end(place, monkeypatch):
    monkeypatch.chdir(place)
    exports = [[f"{weights}.tflite", "--weights", weights, "--length", "40"] for weights in ("float32", "int8-full")]
    for arguments in (*exports, ["served", "--max-new-tokens", "4"]):
        run_here("export", "checkpoint", *arguments)

    def run(*arguments):
        command = [sys.executable, "-m", "lmzoo", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    same = ("--against", "checkpoint", "--length", "16", "--tokens", "48", "--json-file", "figures.json")
    done = run("verify", "float32.tflite", "served", "checkpoint", *same)
    assert done.returncode == 0, done.stderr + done.stdout
    kinds = [result["kind"] for result in json.loads((place / "figures.json").read_text())]
    assert kinds == ["Keras", "TFLite float32", "SavedModel", "Keras"]
    done = run("verify", "int8-full.tflite", *same, "--max-difference", "0.0001")
    assert done.returncode == 1, done.stderr
    assert "outputs differ by" in done.stdout
