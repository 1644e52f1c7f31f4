"""BERT and its kin against answers that transformers gave, kept in tests/golden/bert; needs no torch."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from lmzoo.models import MaskedLM, load_pretrained
from lmzoo.models.bert import BertConfig, BertModel, DistilBertModel, RobertaModel

GOLDEN = Path(__file__).parent.parent / "golden" / "bert"
CASES = sorted(path.name for path in GOLDEN.iterdir())
INPUTS = ("token_ids", "padding_mask", "token_type_ids", "mask_positions")


def inputs_of(batch, *others):
    return {name: batch[name] for name in (*INPUTS, *others)}


def sums_and_gradients(model, batch):
    """Means of the objectives, and gradients by name in the checkpoint."""
    inputs = inputs_of(batch, *(["next_sentence_labels"] if model.config.pooler else []))
    entries = model.checkpoint_entries()
    with tf.GradientTape() as tape:
        sums = model.compute_sums(inputs, batch["labels"], None, training=True)
        loss = sums["loss"][0] / sums["loss"][1]
    gradients = tape.gradient(loss, [variable.value for variable in entries.values()])
    means = {name: value / weight for name, (value, weight) in sums.items() if float(weight)}
    return means, by_name(entries, gradients)


def by_name(entries, gradients):
    """Gradients by name in the checkpoint."""
    return {
        name: entry.piece(name, tf.convert_to_tensor(gradient).numpy())
        for entry, gradient in zip(entries, gradients, strict=True)
        for name in entry.names
        if gradient is not None
    }


def assert_parity(model, batch, answers, tolerance=1e-5):
    """All that the reference answered: hidden states, logits, pooled vectors, losses and gradients."""
    mask = batch["padding_mask"]
    inputs = inputs_of(batch)
    del inputs["mask_positions"]

    def compare(actual, expected, name):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=name)

    states = model.hidden_states(inputs)
    assert len(states) == model.config.num_layers + 1
    for number, state in enumerate(states):
        compare(np.asarray(state)[mask], answers[f"hidden.{number}"][mask], f"hidden {number}")
    compare(np.asarray(model(inputs))[mask], answers["logits"][mask], "logits")
    if isinstance(model, MaskedLM):
        compare_masked_lm(model, batch, answers, states, compare)
    else:
        compare_detection(model, batch, answers, compare)


def compare_masked_lm(model, batch, answers, states, compare):
    mask = batch["padding_mask"]
    at_places = answers["logits"][np.arange(len(mask))[:, None], batch["mask_positions"]]
    compare(model(inputs_of(batch)), at_places, "logits of hidden tokens")
    means, gradients = sums_and_gradients(model, batch)
    names = ["loss", "masked_lm_loss"]
    if "pooled" in answers:
        names.append("next_sentence_loss")
        compare(model.pooled(states[-1]), answers["pooled"], "pooled")
        compare(model.next_sentence_logits(states[-1]), answers["next_sentence_logits"], "next sentence")
    for name in names:
        compare(means[name], answers[name], name)
    compare_gradients(gradients, answers, compare)


def compare_detection(model, batch, answers, compare):
    """As if all odd ids had been replaced; rows count by their tokens, so that the loss is the mean over tokens."""
    counts = batch["padding_mask"].sum(1).astype("float32")
    entries = model.checkpoint_entries()
    with tf.GradientTape() as tape:
        is_replaced = (batch["token_ids"] % 2).astype("float32")
        loss = model.detection_sums(inputs_of(batch), is_replaced, counts, training=True)[0] / counts.sum()
    found = tape.gradient(loss, [variable.value for variable in entries.values()])
    compare(loss, answers["loss"], "loss")
    compare_gradients(by_name(entries, found), answers, compare)


def compare_gradients(gradients, answers, compare):
    compared = [name.removeprefix("gradient.") for name in answers if name.startswith("gradient.")]
    assert compared
    for name in compared:
        compare(gradients[name], answers[f"gradient.{name}"], name)


def golden(case):
    answers = safetensors.numpy.load_file(GOLDEN / case / "answers.safetensors")
    batch = {name: answers.pop(name) for name in (*INPUTS, "labels", "next_sentence_labels")}
    batch["padding_mask"] = batch["padding_mask"].astype(bool)
    return batch, answers


@pytest.mark.parametrize("case", CASES)
def test_answers_of_transformers(case):
    batch, answers = golden(case)
    assert not batch["padding_mask"].all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # No weight is missing.
        model = load_pretrained(GOLDEN / case)
    model = type(model).from_pretrained(GOLDEN / case, dropout_rate=0.0)
    assert_parity(model, batch, answers)


def rewritten(source, directory, change, config=None):
    """A copy of a golden checkpoint with its tensors changed."""
    tensors = change(dict(safetensors.numpy.load_file(source / "model.safetensors")))
    directory.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((source / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def old_names(tensors):
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }


def with_copies(tensors):
    """What older versions of transformers wrote beside the weights: tied copies, and a count."""
    if "lm_head.bias" in tensors:
        copies = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight"}
        copies["lm_head.decoder.bias"] = "lm_head.bias"
    elif "vocab_projector.bias" in tensors:
        copies = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
    else:
        copies = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
        copies["cls.predictions.decoder.bias"] = "cls.predictions.bias"
    prefix = next(iter(tensors)).split(".")[0] if "lm_head.bias" not in tensors else "roberta"
    prefix = {"cls": "bert", "vocab_layer_norm": "distilbert"}.get(prefix, prefix)
    return (
        tensors
        | {copy: tensors[name] for copy, name in copies.items()}
        | {f"{prefix}.embeddings.position_ids": np.arange(12)[None]}
    )


def without_prefix(tensors):
    return {
        name.removeprefix("bert.").removeprefix("roberta.").removeprefix("distilbert."): tensors[name]
        for name in tensors
    }


def only_in_the_copy(tensors):
    """The bias of the head under its other name, as some converters leave it."""
    return {name.replace("predictions.bias", "predictions.decoder.bias"): tensors[name] for name in tensors}


FORMS = {form.__name__: form for form in (old_names, with_copies, without_prefix, only_in_the_copy)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert"])
def test_other_forms_of_a_checkpoint(case, form, tmp_path):
    expected = load_pretrained(GOLDEN / case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_pretrained(rewritten(GOLDEN / case, tmp_path, FORMS[form]))
    for one, other in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def without(*beginnings):
    return lambda tensors: {name: tensors[name] for name in tensors if not name.startswith(beginnings)}


@pytest.mark.parametrize(
    ("case", "lost", "named"),
    [
        ("bert", ("cls.",), ["cls.predictions.bias", "cls.seq_relationship.weight"]),
        ("bert", ("bert.pooler",), ["pooler.dense.weight", "pooler.dense.bias"]),
        ("roberta", ("lm_head.",), ["lm_head.dense.weight", "lm_head.bias"]),
        ("distilbert", ("vocab_",), ["vocab_transform.weight", "vocab_projector.bias"]),
    ],
)
def test_a_head_that_is_missing_stays_random(case, lost, named, tmp_path):
    """With one warning, which names its tensors; the rest is read."""
    with pytest.warns(UserWarning, match=r"stay as they are, which is random in a new model") as caught:
        model = load_pretrained(rewritten(GOLDEN / case, tmp_path, without(*lost)))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert all(name in message for name in named)
    assert "embeddings" not in message
    batch, answers = golden(case)
    inputs = inputs_of(batch)
    np.testing.assert_allclose(
        np.asarray(model.features(inputs))[batch["padding_mask"]],
        answers["hidden.2"][batch["padding_mask"]],
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("lost", ["embeddings.Lay", "encoder.layer.1.attention.self.key.weight"])
def test_a_backbone_that_is_missing_is_an_error(lost, tmp_path):
    with pytest.raises(ValueError, match=f"missing: {lost}"):
        load_pretrained(rewritten(GOLDEN / "bert", tmp_path, without(f"bert.{lost}")))


def with_task_heads(tensors):
    zeros = np.zeros((2, 8), "float32")
    heads = ("classifier.weight", "classifier.dense.weight", "qa_outputs.bias")
    return tensors | dict.fromkeys(heads, zeros)


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert"])
def test_heads_of_tasks_are_left_out_by_name(case, tmp_path):
    expected = load_pretrained(GOLDEN / case)
    model = load_pretrained(rewritten(GOLDEN / case, tmp_path, with_task_heads))
    for one, other in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"unknown: novel_head\.weight"):
        load_pretrained(
            rewritten(GOLDEN / case, tmp_path, lambda tensors: tensors | {"novel_head.weight": np.zeros(3, "f4")})
        )


def test_a_checkpoint_with_a_pooler_for_a_model_without(tmp_path):
    model = BertModel.from_pretrained(GOLDEN / "bert", pooler=False)
    assert model.pooler is None
    with pytest.raises(ValueError, match="has no pooler: its config says pooler=False"):
        model.pooled(np.zeros((1, 2, 8), "float32"))
    model.save_pretrained(tmp_path)
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if "pooler" in name or "seq_relationship" in name]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert BertModel.from_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert"])
def test_what_is_written_is_what_was_read(case, tmp_path):
    """Names, shapes and numbers are those of transformers' own file."""
    load_pretrained(GOLDEN / case).save_pretrained(tmp_path)
    expected = safetensors.numpy.load_file(GOLDEN / case / "model.safetensors")
    actual = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, err_msg=name)
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (GOLDEN / case, tmp_path))
    assert {name: ours[name] for name in theirs if name in ours} == {
        name: theirs[name] for name in theirs if name in ours
    }


def test_each_class_reads_its_own_kind():
    for model_class in (BertModel, RobertaModel, DistilBertModel):
        for case in ("bert", "roberta", "distilbert"):
            if model_class.config_class.model_type == case:
                assert type(load_pretrained(GOLDEN / case)) is model_class
            else:
                with pytest.raises(ValueError, match=f"holds a checkpoint of model_type '{case}'"):
                    model_class.from_pretrained(GOLDEN / case)


class TestGoogle:
    """The form of Google's releases, made here from the golden weights by the op that TensorFlow 1 wrote with."""

    ENDINGS: ClassVar = {"LayerNorm.weight": "LayerNorm/gamma", "LayerNorm.bias": "LayerNorm/beta"}
    NAMES: ClassVar = {
        "cls.predictions.bias": "cls/predictions/output_bias",
        "cls.seq_relationship.weight": "cls/seq_relationship/output_weights",
        "cls.seq_relationship.bias": "cls/seq_relationship/output_bias",
    }

    def write(self, directory, left_out=()):
        tensors = {"global_step": np.array(7, "int64"), "bert/pooler/dense/kernel/adam_m": np.ones((8, 8), "float32")}
        for name, tensor in safetensors.numpy.load_file(GOLDEN / "bert" / "model.safetensors").items():
            for ending, theirs in self.ENDINGS.items():
                name = name.replace(ending, theirs)
            if name in self.NAMES:
                name = self.NAMES[name]
            elif name.endswith("_embeddings.weight"):
                name = name.removesuffix(".weight")
            elif name.endswith(".weight"):
                name, tensor = name.removesuffix("weight") + "kernel", tensor.T
            name = name.replace("encoder.layer.", "encoder.layer_").replace(".", "/")
            if not name.startswith(tuple(left_out)):
                tensors[name] = tensor
        tf.raw_ops.SaveV2(
            prefix=str(directory / "bert_model.ckpt"),
            tensor_names=list(tensors),
            shape_and_slices=[""] * len(tensors),
            tensors=[tf.constant(tensor) for tensor in tensors.values()],
        )
        values = json.loads((GOLDEN / "bert" / "config.json").read_text())
        names = ("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads")
        names += ("hidden_dropout_prob", "num_hidden_layers", "type_vocab_size", "vocab_size", "initializer_range")
        (directory / "bert_config.json").write_text(json.dumps({name: values[name] for name in names}))
        return directory

    def test_the_weights_are_those_of_hugging_face(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = BertModel.from_google_checkpoint(self.write(tmp_path), dropout_rate=0.0)
        batch, answers = golden("bert")
        assert_parity(model, batch, answers)
        assert model.config == BertConfig.from_hugging_face(
            json.loads((GOLDEN / "bert" / "config.json").read_text())
        ).replace(dropout_rate=0.0)

    def test_what_is_missing(self, tmp_path):
        with pytest.warns(UserWarning, match=r"has no cls\.predictions"):
            BertModel.from_google_checkpoint(self.write(tmp_path, ["cls/"]))
        with pytest.raises(ValueError, match=r"missing: encoder\.layer\.1\.intermediate\.dense\.weight \[12, 8\]"):
            BertModel.from_google_checkpoint(self.write(tmp_path, ["bert/encoder/layer_1/intermediate"]))
        with pytest.raises(ValueError, match=r"other\.ckpt\.index is missing"):
            BertModel.from_google_checkpoint(tmp_path, name="other.ckpt")
        (tmp_path / "bert_model.ckpt.index").write_bytes(b"no index")
        with pytest.raises(ValueError, match=r"damaged or not a TensorFlow checkpoint"):
            BertModel.from_google_checkpoint(tmp_path)
        shutil.move(tmp_path / "bert_config.json", tmp_path / "config.json")
        with pytest.raises(ValueError, match=r"bert_config\.json is missing"):
            BertModel.from_google_checkpoint(tmp_path)
