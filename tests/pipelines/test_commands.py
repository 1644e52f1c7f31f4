"""`lmzoo predict` and `lmzoo export` of whatever a checkpoint holds."""

import json

import numpy as np
import pytest
import tensorflow as tf
from tiny_encoders import task_model, tiny_encoder, tiny_tokenizer

from lmzoo.cli import main
from lmzoo.pipelines import MaskFiller, TextEmbedder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    models = {name: task_model(name) for name in ("single_label", "answers", "embeddings")} | {"filler": tiny_encoder()}
    for name, model in models.items():
        model.save_pretrained(directory / name)
        tiny_tokenizer().save_pretrained(directory / name)
    return directory


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return exit_.value.code or 0, captured.out.splitlines(), captured.err


@pytest.mark.slow
def test_predict_prints_a_line_for_each_text(checkpoints, capsys):
    status, lines, _ = run(capsys, "predict", checkpoints / "single_label", "the cat", "漢字")
    assert status == 0
    assert [set(json.loads(line)) for line in lines] == [{"label", "score", "scores"}] * 2
    _, lines, _ = run(capsys, "predict", checkpoints / "filler", "a [MASK] 漢")
    filled = json.loads(lines[0])
    assert filled == MaskFiller(tiny_encoder(), tiny_tokenizer())("a [MASK] 漢")
    assert "漢" in lines[0]
    _, lines, _ = run(capsys, "predict", checkpoints / "embeddings", "the cat")
    vector = TextEmbedder(task_model("embeddings"), tiny_tokenizer())("the cat")
    np.testing.assert_allclose(json.loads(lines[0]), vector, atol=1e-5)
    contexts = ("sat on the mat", "the cat sat")
    _, lines, _ = run(capsys, "predict", checkpoints / "answers", *contexts, "--question", "the cat")
    for line, context in zip(lines, contexts, strict=True):
        answer = json.loads(line)
        assert context[answer["start"] : answer["end"]] == answer["answer"] != ""


def test_a_question_is_for_those_who_answer(checkpoints, capsys):
    status, _, error = run(capsys, "predict", checkpoints / "answers", "the cat")
    assert (status, "QuestionAnswerer, which needs a --question" in error) == (1, True)
    status, _, error = run(capsys, "predict", checkpoints / "filler", "[MASK]", "--question", "who?")
    assert (status, "MaskFiller, which takes no --question" in error) == (1, True)


def test_export_writes_what_the_checkpoint_is_for(checkpoints, capsys, tmp_path):
    status, lines, _ = run(capsys, "export", checkpoints / "single_label", tmp_path)
    assert (status, lines) == (0, [str(tmp_path / "1")])
    assert set(tf.saved_model.load(lines[0]).signatures) == {"serving_default", "pairs", "tokens"}
    _, lines, _ = run(capsys, "export", checkpoints / "embeddings", tmp_path / "more", "--attention", True)
    assert set(tf.saved_model.load(lines[0]).signatures) == {"serving_default", "tokens", "attention"}
    status, _, error = run(capsys, "export", checkpoints / "embeddings", tmp_path / "a.tflite", "--attention", True)
    assert (status, "has neither version nor attention" in error) == (1, True)
    status, _, error = run(capsys, "export", checkpoints / "single_label", tmp_path, "--top-k", 3)
    assert (status, "TextClassifier, which generates no tokens" in error) == (1, True)
