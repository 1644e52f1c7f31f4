"""The command as a user runs it: in a process of its own where it trains, else in this one, which starts faster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_here

from lmzoo.cli import main

ROOT = Path(__file__).parents[1]
TINY = (
    *("--vocab-size", "300", "--context-length", "16", "--num-layers", "1", "--num-heads", "2", "--model-dim", "16"),
    *("--steps", "4", "--batch-size", "4", "--evaluate-every", "2", "--verbose", "0"),
)


def run(*arguments: object, directory: Path, command: tuple[str, ...] = ("-m", "lmzoo")) -> subprocess.CompletedProcess:
    words = [sys.executable, *command, *map(str, arguments)]
    return subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with a text, a prepared corpus and a trained run."""
    directory = tmp_path_factory.mktemp("cli")
    for number in range(30):
        (directory / f"{number}.txt").write_text(f"Sentence number {number} of this text says hello to you. " * 10)
    done = run("prepare", "*.txt", "--directory", "corpus", "--vocab-size", 300, directory=directory)
    assert done.returncode == 0, done.stderr
    done = run("pretrain", "--corpus", "corpus", "--directory", "run", *TINY, directory=directory)
    assert done.returncode == 0, done.stderr
    return directory


def test_a_run_is_evaluated_generated_from_and_exported(workplace, monkeypatch, capsys):
    scores = run("evaluate", "run", "corpus", directory=workplace)
    assert scores.returncode == 0, scores.stderr
    assert json.loads(scores.stdout.splitlines()[-1])["bits_per_byte"] > 0

    flags = ("--max-new-tokens", 4, "--seed", 1)
    generated = run("generate", "run", "Sentence", *flags, directory=workplace)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("Sentence")

    monkeypatch.chdir(workplace)
    run_here("generate", "run", "Sentence", *flags)
    assert capsys.readouterr().out == generated.stdout

    run_here("export", "run", "served", "--max-new-tokens", 4)
    assert Path(capsys.readouterr().out.strip(), "saved_model.pb").is_file()


def test_the_same_command_again_goes_on(workplace):
    done = run("pretrain", "--corpus", "corpus", "--directory", "run", *TINY, directory=workplace)
    assert done.returncode == 0, done.stderr
    assert "going on after step 4" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["prepare", "nothing.txt", "--directory", "other"], 1, "nothing.txt"),
        (["pretrain", "--preset", "gpt3", "--directory", "other"], 1, "there is no preset 'gpt3'"),
        (["pretrain", "--steps", "0"], 2, "steps is 0"),
        (["evaluate", "nowhere", "corpus"], 1, "nowhere"),
        (["generate", "run", "x", "--temperature", "-1"], 2, "temperature=-1"),
        (["pretrain", "--no-such-flag", "1"], 2, "no-such-flag"),
        (["nonsense"], 2, "nonsense"),
        (["serve", "run"], 1, "run has no numbered version"),
    ],
)
def test_an_error_is_one_line_and_a_status(workplace, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(workplace)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == status
    told = capsys.readouterr().err
    assert message in told
    if status == 1:
        assert [line for line in told.splitlines() if line.startswith("lmzoo: ")]


def test_a_process_says_an_error_without_a_traceback(tmp_path):
    done = run("evaluate", "nowhere", "corpus", directory=tmp_path)
    assert done.returncode == 1
    assert "lmzoo: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["prepare"],
        ["pretrain"],
        ["evaluate"],
        ["generate"],
        ["export"],
        ["serve"],
        ["demo"],
        ["predict"],
        ["finetune"],
        ["launch"],
        ["plan"],
        ["verify"],
    ],
)
def test_help_says_what_there_is(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    expected = {"pretrain": "--learning-rate", "generate": "--top-k", "prepare": "--vocab-size"}
    assert expected.get(command[0] if command else "", "-h") in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "made"),
    [
        ("pretrain_gpt", "runs/gpt-smoke/metrics.jsonl"),
        ("pretrain_bert", "runs/bert-smoke/metrics.jsonl"),
        ("pretrain_t5", "runs/t5-smoke/metrics.jsonl"),
        ("finetune_classifier", "saved_models/run/1/saved_model.pb"),
        ("finetune_tagger", "saved_models/run/1/saved_model.pb"),
        ("finetune_qa", "saved_models/run/1/saved_model.pb"),
        ("finetune_similarity", "saved_models/run/1/saved_model.pb"),
        ("translate_t5", "runs/translate-smoke/run/predictions.jsonl"),
        ("summarize_t5", "runs/summarize-smoke/run/metrics.json"),
        ("tf_serving_client", None),
    ],
)
def test_the_examples_run(tmp_path, script, made):
    done = run("--smoke", directory=tmp_path, command=(str(ROOT / "examples" / f"{script}.py"),))
    assert done.returncode == 0, done.stderr
    assert made is None or (tmp_path / made).is_file()


def test_examples_are_short():
    for script in (ROOT / "examples").glob("*.py"):
        assert len(script.read_text().splitlines()) <= 100, script
