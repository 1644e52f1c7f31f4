"""The pipeline that a checkpoint is loaded as."""

import json

import pytest
from tiny_encoders import TEXTS, task_model, tiny_encoder, tiny_tokenizer
from tiny_pipeline import shared_model
from tiny_pipeline import tiny_tokenizer as causal_tokenizer

from lmzoo.checkpoints import CheckpointError
from lmzoo.pipelines import (
    MaskFiller,
    QuestionAnswerer,
    TextClassifier,
    TextEmbedder,
    TextGenerator,
    TokenClassifier,
    find_pipeline,
    load_pipeline,
)

CASES = {
    "generator": (TextGenerator, shared_model, {"max_new_tokens": 5, "temperature": 0}, TEXTS),
    "filler": (MaskFiller, tiny_encoder, {"top_k": 2}, ["a [MASK] b"]),
    "classifier": (TextClassifier, lambda: task_model("multi_label"), {"threshold": 0.3}, TEXTS),
    "tagger": (TokenClassifier, lambda: task_model("tokens"), {"max_length": 9}, TEXTS),
    "embedder": (TextEmbedder, lambda: task_model("embeddings"), {}, TEXTS),
    "answerer": (QuestionAnswerer, lambda: task_model("answers"), {"n_best": 2}, (["the cat"], ["sat on the mat"])),
}


def save(directory, model, tokenizer):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize("name", CASES)
def test_it_is_found_and_gives_the_same(tmp_path, name):
    pipeline_class, make_model, settings, texts = CASES[name]
    model, tokenizer = make_model(), causal_tokenizer() if name == "generator" else tiny_tokenizer()
    save(tmp_path / "checkpoint", model, tokenizer)
    (tmp_path / "best").symlink_to("checkpoint")
    for directory in (tmp_path / "checkpoint", tmp_path):
        assert find_pipeline(directory) is pipeline_class
    loaded = load_pipeline(str(tmp_path), **settings)
    assert type(loaded) is pipeline_class
    arguments = texts if isinstance(texts, tuple) else (texts,)
    assert str(loaded(*arguments)) == str(pipeline_class(model, tokenizer, **settings)(*arguments))


def rename(directory, name):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": [name]}))


def test_bare_models_embed_or_continue(tmp_path):
    for directory, model in ((tmp_path / "bert", tiny_encoder()), (tmp_path / "gpt2", shared_model())):
        model.save_pretrained(directory)
    rename(tmp_path / "bert", "BertModel")
    rename(tmp_path / "gpt2", "GPT2Model")
    assert find_pipeline(tmp_path / "bert") is TextEmbedder
    assert find_pipeline(tmp_path / "gpt2") is TextGenerator
    (tmp_path / "gpt2" / "modules.json").write_text("[]")
    assert find_pipeline(tmp_path / "gpt2") is TextEmbedder


def test_what_no_pipeline_serves_is_named(tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    rename(tmp_path, "BertForMultipleChoice")
    with pytest.raises(CheckpointError, match="holds BertForMultipleChoice, which no pipeline serves"):
        load_pipeline(tmp_path)
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        load_pipeline(tmp_path / "nothing")
