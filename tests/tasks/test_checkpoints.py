"""Task models on disk: with their head and labels, or from a bare encoder; and what never gets there."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from examples import LABELS, TASKS, WITH_HEADS, make_batch, make_task, quick
from lmzoo.checkpoints import CheckpointError, ModelCard
from lmzoo.models import load_pretrained
from lmzoo.tasks import (
    EmbeddingModel,
    QuestionAnsweringModel,
    SequenceClassificationModel,
    TokenClassificationModel,
    find_task,
    load_task,
)

TESTED = ("bert",)
EVERY = pytest.mark.parametrize("name", TASKS)
SETTINGS = ("labels", "problem", "pooling", "normalize")


def values_of(variables):
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def assert_same_weights(one, other):
    for a, b in zip(values_of(one.weights), values_of(other.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@EVERY
@pytest.mark.parametrize("architecture", WITH_HEADS, indirect=True)
def test_there_and_back_again(model, name, tmp_path):
    task = make_task(name, model)
    task.save_pretrained(tmp_path)
    twin = load_task(tmp_path)
    assert type(twin) is type(task) is find_task(tmp_path)
    for setting in SETTINGS:
        assert getattr(twin, setting, None) == getattr(task, setting, None)
    assert_same_weights(twin, task)
    inputs, _, _ = make_batch(name)
    np.testing.assert_array_equal(twin(inputs), task(inputs))


@pytest.mark.parametrize("architecture", WITH_HEADS, indirect=True)
def test_only_what_the_task_reads_is_made_counted_and_saved(model, tmp_path):
    """Neither a masked-LM head nor one of sentence labels, and a pooler only under a head that stands on it."""
    config = model.config
    pooler = config.model_dim * (config.model_dim + 1) if getattr(config, "pooler", False) else 0
    body = config.count_params() - pooler
    for task, expected in [
        (QuestionAnsweringModel(model), body + 2 * config.model_dim + 2),
        (EmbeddingModel(model), body),
        (TokenClassificationModel(model, LABELS), body + 3 * config.model_dim + 3),
    ]:
        assert task.count_params() == sum(int(np.prod(each.shape)) for each in task.trainable_variables) == expected
        task.save_pretrained(tmp_path)
        assert sum(tensor.size for tensor in load_file(tmp_path / "model.safetensors").values()) == expected
    heads = type(model).task_heads
    if heads.pools == "pooler":
        task = SequenceClassificationModel(model)
        assert task.count_params() == body + pooler + 2 * config.model_dim + 2
        np.testing.assert_array_equal(task.encoder.pooler.kernel, model.pooler.kernel)


def test_the_encoder_given_stays_whole_and_is_not_trained(make_model):
    model = make_model()
    before = values_of(model.weights)
    task = make_task("single_label", model)
    task.compile(keras.optimizers.SGD(0.1))
    task.train_on_batch(*make_batch("single_label"))
    for one, other in zip(values_of(model.weights), before, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(task.encoder.features(np.ones((1, 3), "int32")).shape, (1, 3, 16))
    with pytest.raises(ValueError, match="output_head=False"):
        task.encoder(np.ones((1, 3), "int32"))


def test_an_encoder_that_fits_is_taken_as_it_is(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    encoder = load_pretrained(tmp_path, output_head=False)
    assert SequenceClassificationModel(encoder).encoder is encoder
    task = QuestionAnsweringModel(encoder)
    assert task.encoder is not encoder
    assert EmbeddingModel(task.encoder).encoder is task.encoder


@EVERY
@pytest.mark.parametrize("architecture", ["bert", "gpt2"], indirect=True)
def test_a_bare_encoder_gets_a_new_head(model, name, tmp_path):
    model.save_pretrained(tmp_path)
    task_class, arguments = TASKS[name]
    if name in ("cosine", "contrastive"):
        task = task_class.from_pretrained(tmp_path, **arguments)
    else:
        with pytest.warns(UserWarning, match="has no .*stay as they are") as caught:
            task = task_class.from_pretrained(tmp_path, **arguments)
        assert len(caught) == 1
    inputs, _, _ = make_batch(name)
    np.testing.assert_array_equal(task.encoder.features(inputs), model.features(inputs))


@pytest.mark.parametrize("task_class", [SequenceClassificationModel, TokenClassificationModel])
def test_a_bare_encoder_needs_labels(model, task_class, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"give labels=\(\.\.\.\)"):
        task_class.from_pretrained(tmp_path)


def test_other_labels_make_a_new_head_and_as_many_rename_it(model, tmp_path):
    old = SequenceClassificationModel(model, LABELS, problem="multi_label", dropout_rate=0.4)
    old.save_pretrained(tmp_path)
    renamed = SequenceClassificationModel.from_pretrained(tmp_path, labels=("rot", "grün", "blau"))
    assert (renamed.labels, renamed.problem, renamed.dropout.rate) == (("rot", "grün", "blau"), "multi_label", 0.4)
    assert_same_weights(renamed, old)
    with pytest.warns(UserWarning, match=r"has no classifier\.weight, classifier\.bias: "):
        new = SequenceClassificationModel.from_pretrained(tmp_path, labels=("yes", "no"))
    assert (new.problem, new.output_layer.kernel.shape) == ("single_label", (16, 2))
    np.testing.assert_array_equal(new.encoder.pooler.kernel, old.encoder.pooler.kernel)


def test_the_head_of_another_task_is_left_alone(model, tmp_path):
    """Even if it has the same names and shapes."""
    tokens = TokenClassificationModel(model, LABELS)
    tokens.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has no pooler\.dense\.weight, pooler\.dense\.bias, classifier\.weight"):
        task = SequenceClassificationModel.from_pretrained(tmp_path, labels=LABELS)
    assert np.abs(np.asarray(task.output_layer.kernel) - np.asarray(tokens.output_layer.kernel)).max() > 0


def test_files_that_do_not_hold_what_their_config_says(model, tmp_path):
    SequenceClassificationModel(model, LABELS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"has no classifier"):
        load_task(tmp_path)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"], indirect=True)
def test_overrides(model, tmp_path):
    SequenceClassificationModel(model, LABELS, dropout_rate=0.3).save_pretrained(tmp_path)
    plain = load_task(tmp_path)
    assert (plain.dropout.rate, plain.config.dropout_rate) == (0.3, 0.0)
    task = SequenceClassificationModel.from_pretrained(tmp_path, dropout_rate=0.2)
    assert (task.dropout.rate, task.config.dropout_rate) == (0.2, 0.2)


def test_dtype(model, tmp_path):
    task = SequenceClassificationModel(model, LABELS)
    task.save_pretrained(tmp_path)
    half = load_task(tmp_path, dtype="mixed_bfloat16")
    assert (half.dtype_policy.name, half.encoder.compute_dtype, half.output_layer.compute_dtype) == (
        "mixed_bfloat16",
        "bfloat16",
        "bfloat16",
    )
    inputs, _, _ = make_batch("single_label")
    assert half(inputs).dtype == "float32"
    np.testing.assert_allclose(half(inputs), task(inputs), atol=0.1)


def test_load_task_names_what_it_cannot_take(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds BertForPreTraining, which is no model of a task; known: BertForS"
    ):
        load_task(tmp_path)


@pytest.mark.parametrize("architecture", ["t5"], indirect=True)
def test_architectures_without_heads_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="T5Model has no heads for these tasks"):
        QuestionAnsweringModel(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="T5Model has no heads for these tasks"):
        EmbeddingModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="which is no model of a task; known: none of its architecture"):
        load_task(tmp_path)


def test_id2label_in_the_order_of_numbers(model, tmp_path):
    labels = [f"label {number}" for number in range(12)]
    TokenClassificationModel(model, labels).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert list(values["id2label"])[1:3] == ["1", "10"]  # As sorted when it was written.
    assert values["label2id"]["label 10"] == 10
    assert load_task(tmp_path).labels == tuple(labels)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("normalize", [True, False])
def test_files_of_sentence_transformers(model, pooling, normalize, tmp_path):
    EmbeddingModel(model, pooling=pooling, normalize=normalize).save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    assert [module["type"] for module in modules] == [f"sentence_transformers.models.{kind}" for kind in kinds]
    assert [(tmp_path / module["path"]).is_dir() for module in modules] == [True] * len(kinds)
    values = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert values == {
        "word_embedding_dimension": 16,
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_cls_token": pooling == "first",
    }
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text())["max_seq_length"] == 24
    twin = load_task(tmp_path)
    assert (twin.pooling, twin.normalize) == (pooling, normalize)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "asks for pooling_mode_max_tokens"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "asks for .*max.*mean"),
    ],
)
def test_pooling_of_another_kind_is_refused(model, values, message, tmp_path):
    EmbeddingModel(model).save_pretrained(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        load_task(tmp_path)


def test_modules_of_another_kind_are_refused(model, tmp_path):
    EmbeddingModel(model).save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="lists Transformer, Pooling, Dense, but only"):
        load_task(tmp_path)
    (tmp_path / "modules.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a list of modules"):
        load_task(tmp_path)


def test_the_card_says_how_to_open_it(model, tmp_path):
    task = SequenceClassificationModel(model, LABELS)
    task.card = ModelCard(name="Colours", license="apache-2.0")
    task.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for part in ("# Colours", "from lmzoo.tasks import load_task", "text-classification", "BertForSequenceClass"):
        assert part in text
    EmbeddingModel(model).save_pretrained(tmp_path / "vectors")
    assert "sentence-transformers" in (tmp_path / "vectors" / "README.md").read_text()


@pytest.mark.parametrize("name", quick("single_label", "cosine"))
def test_keras_files(make_model, name, tmp_path):
    """Weights, optimizer, objective and what is frozen: the next step of the copy is that of the original."""
    task = make_task(name, make_model())
    task.freeze(1)
    weights = {"class_weights": (1.0, 2.0, 3.0)} if name in ("single_label", "multi_label", "tokens") else {}
    task.compile(keras.optimizers.AdamW(1e-3), **weights)
    batch = make_batch(name)
    task.train_on_batch(*batch)
    task.save(tmp_path / "task.keras")
    twin = keras.saving.load_model(tmp_path / "task.keras")
    assert type(twin) is type(task)
    for setting in (*SETTINGS, "objective", "temperature"):
        assert getattr(twin, setting, None) == getattr(task, setting, None)
    assert [each.path for each in twin.trainable_variables] == [each.path for each in task.trainable_variables]
    for each in (task, twin):
        each.reset_metrics()
    assert twin.train_on_batch(*batch, return_dict=True) == task.train_on_batch(*batch, return_dict=True)
    assert_same_weights(twin, task)


@pytest.mark.slow
def test_another_process_has_only_to_import_the_tasks(model, tmp_path):
    make_task("tokens", model).save(tmp_path / "task.keras")
    code = "import sys, keras, lmzoo.tasks; print(type(keras.saving.load_model(sys.argv[1])).__name__)"
    command = [sys.executable, "-c", code, tmp_path / "task.keras"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "TokenClassificationModel", result.stderr
