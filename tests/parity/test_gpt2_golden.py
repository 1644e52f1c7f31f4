"""GPT-2 against answers that transformers gave, kept in tests/golden/gpt2; needs neither transformers nor torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from lmzoo.models.gpt import GPTModel

GOLDEN = Path(__file__).parent.parent / "golden" / "gpt2"


def loss_and_gradients(model, batch):
    """Mean loss over the labels that are not padding, and gradients by name in the checkpoint."""
    weights = batch["padding_mask"].astype("float32")
    inputs = {name: batch[name] for name in ("token_ids", "padding_mask")}
    variables = model.checkpoint_variables()
    with tf.GradientTape() as tape:
        value, weight = model.compute_sums(inputs, batch["labels"], weights, training=True)["loss"]
        loss = value / weight
    gradients = tape.gradient(loss, [variable.value for variable in variables.values()])
    return loss, dict(zip(variables, map(tf.convert_to_tensor, gradients), strict=True))


def assert_parity(model, batch, answers, tolerance=1e-5):
    mask = batch["padding_mask"]
    logits = np.asarray(model({name: batch[name] for name in ("token_ids", "padding_mask")}))
    np.testing.assert_allclose(logits[mask], answers["logits"][mask], rtol=0, atol=tolerance)
    if mask.all():
        np.testing.assert_allclose(model(batch["token_ids"]), answers["logits"], rtol=0, atol=tolerance)
    loss, gradients = loss_and_gradients(model, batch)
    np.testing.assert_allclose(loss, answers["loss"], rtol=0, atol=tolerance)
    compared = [name.removeprefix("gradient.") for name in answers if name.startswith("gradient.")]
    assert compared
    for name in compared:
        np.testing.assert_allclose(gradients[name], answers[f"gradient.{name}"], rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir()))
def test_answers_of_transformers(case):
    answers = safetensors.numpy.load_file(GOLDEN / case / "answers.safetensors")
    batch = {name: answers.pop(name) for name in ("token_ids", "padding_mask", "labels")}
    assert not batch["padding_mask"].all()
    assert_parity(GPTModel.from_pretrained(GOLDEN / case, dropout_rate=0.0), batch, answers)


def rewritten(source, directory, change):
    """A copy of a golden checkpoint with its tensors changed."""
    tensors = change(dict(safetensors.numpy.load_file(source / "model.safetensors")))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


def bare(tensors):
    """Names as the first GPT-2 checkpoints had them."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


def with_buffers(tensors):
    for number in range(2):
        tensors[f"transformer.h.{number}.attn.bias"] = np.tril(np.ones((1, 1, 10, 10), bool))
        tensors[f"transformer.h.{number}.attn.masked_bias"] = np.array(-1e4, "float32")
    return tensors


@pytest.mark.parametrize("changes", [(bare,), (with_head,), (with_buffers,), (with_head, with_buffers, bare)])
def test_older_forms_of_the_checkpoint(tmp_path, changes):
    directory = GOLDEN / "published"
    for number, change in enumerate(changes):
        (tmp_path / str(number)).mkdir()
        directory = rewritten(directory, tmp_path / str(number), change)
    expected = GPTModel.from_pretrained(GOLDEN / "published")
    for one, other in zip(GPTModel.from_pretrained(directory).weights, expected.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_untied_head_is_refused(tmp_path):
    """config.json does not say so, but the tensors do; transformers would use the head."""

    def untie(tensors):
        return tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 0.1}

    with pytest.raises(ValueError, match=r"not tied: lm_head\.weight is not equal to transformer\.wte\.weight"):
        GPTModel.from_pretrained(rewritten(GOLDEN / "published", tmp_path, untie))


def test_a_head_for_a_task_is_left_alone_and_an_unknown_tensor_refused(tmp_path):
    def classify(tensors):
        return tensors | {"score.weight": np.zeros((2, 8), "float32")}

    def judge(tensors):
        return tensors | {"judge.weight": np.zeros((2, 8), "float32")}

    bare = GPTModel.from_pretrained(GOLDEN / "published")
    classifier = GPTModel.from_pretrained(rewritten(GOLDEN / "published", tmp_path, classify))
    for one, other in zip(classifier.weights, bare.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"unknown: judge\.weight \[2, 8\]"):
        GPTModel.from_pretrained(rewritten(GOLDEN / "published", tmp_path, judge))
