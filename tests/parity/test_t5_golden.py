"""T5 against answers that transformers gave, kept in tests/golden/t5; needs neither transformers nor torch."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from lmzoo.models import load_pretrained

GOLDEN = Path(__file__).parent.parent / "golden"
SCRIPT = runpy.run_path(str(GOLDEN / "make_t5_golden.py"))
CASES = sorted(path.name for path in (GOLDEN / "t5").iterdir())


def source_of(batch):
    return {name: batch[name] for name in ("token_ids", "padding_mask")}


def inputs_of(model, batch):
    """Source and target; the labels are moved on by hand here, and by the model where it scores them."""
    labels = batch["labels"]
    start = np.full_like(labels[:, :1], model.config.start_token_id)
    return {**source_of(batch), "decoder_token_ids": np.concatenate([start, labels[:, :-1]], axis=1)}


def loss_and_gradients(model, batch):
    """Mean loss over the labels that count, and gradients by name in the checkpoint."""
    entries = model.checkpoint_entries()
    with tf.GradientTape() as tape:
        weights = batch["counts"].astype("float32")
        value, weight = model.compute_sums(source_of(batch), batch["labels"], weights, training=True)["loss"]
        loss = value / weight
    gradients = tape.gradient(loss, [variable.value for variable in entries.values()])
    return loss, {
        name: entry.piece(name, tf.convert_to_tensor(gradient).numpy())
        for entry, gradient in zip(entries, gradients, strict=True)
        for name in entry.names
    }


def assert_parity(model, batch, answers, tolerance=1e-5):
    """Encoder states and logits at real tokens, the loss, and all gradients that the answers hold.

    The reference is the tolerance's scale: logits of untied heads of random models are tens, and so are gradients.
    """

    def compare(actual, expected, name, factor=1.0):
        scale = factor * max(1.0, float(np.abs(expected).max(initial=0.0)))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=name)

    mask, seen = batch["padding_mask"], batch["padding_mask"].any(axis=1)
    states = np.asarray(model.encode(source_of(batch)))
    compare(states[mask], answers["states"][mask], "states")
    logits = np.asarray(model(inputs_of(model, batch)))
    compare(logits[seen], answers["logits"][seen], "logits")
    loss, gradients = loss_and_gradients(model, batch)
    compare(loss, answers["loss"], "loss")
    compared = [name.removeprefix("gradient.") for name in answers if name.startswith("gradient.")]
    assert compared
    for name in compared:
        # Scores without a scale let the rounding of one pass grow in the other.
        compare(gradients[name], answers[f"gradient.{name}"], name, factor=5.0)


def golden(case):
    answers = safetensors.numpy.load_file(GOLDEN / "t5" / case / "answers.safetensors")
    return {name: answers.pop(name) for name in ("token_ids", "padding_mask", "labels", "counts")}, answers


@pytest.mark.parametrize("case", CASES)
def test_answers_of_transformers(case):
    batch, answers = golden(case)
    assert not batch["padding_mask"].all()
    model = load_pretrained(GOLDEN / "t5" / case)
    assert model.config.tied_head == (case == "t5")
    assert_parity(model, batch, answers)


@pytest.mark.parametrize("case", CASES)
def test_texts_of_transformers(case):
    batch, answers = golden(case)
    model = load_pretrained(GOLDEN / "t5" / case)
    greedy = model.generate(source_of(batch), max_new_tokens=8, temperature=0.0)
    np.testing.assert_array_equal(greedy, answers["greedy"])
    result = model.beam_search(source_of(batch), num_return_sequences=4, **SCRIPT["BEAMS"])
    np.testing.assert_array_equal(np.reshape(result.token_ids, (12, 8)), answers["beams"])
    np.testing.assert_allclose(np.ravel(result.scores), answers["scores"], rtol=0, atol=1e-4)


def changed(case, directory, tensors=lambda tensors: tensors, **config):
    """A copy of a golden checkpoint with other tensors, and with fields of config.json replaced, or removed by None."""
    shutil.copytree(GOLDEN / "t5" / case, directory)
    stored = tensors(dict(safetensors.numpy.load_file(directory / "model.safetensors")))
    safetensors.numpy.save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((directory / "config.json").read_text()) | config
    values = {name: value for name, value in values.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("t5", {"tie_word_embeddings": None, "scale_decoder_outputs": None}),  # As T5 1.0 was published.
        ("t5-1.1", {"tie_word_embeddings": False, "scale_decoder_outputs": None}),  # As T5 1.1 and flan-T5 were.
        ("mt5", {"tie_word_embeddings": False}),  # As mT5 was.
    ],
)
def test_files_as_they_were_published(tmp_path, case, config):
    """Other files, equal logits: an untied head is that of the file, and it is not scaled."""
    batch, answers = golden(case)
    directory = changed(case, tmp_path / "old", **config)
    assert_parity(load_pretrained(directory), batch, answers)


def with_all_tables(tensors):
    """As the first checkpoints were: a copy of the table wherever it is used, and positions that nothing reads."""
    table = tensors["shared.weight"]
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return tensors | dict.fromkeys(names, table) | {unread: np.zeros((6, 2), "float32")}


def with_one_table(tensors):
    """As a copy by another tool may be: under the encoder's name alone."""
    return {"encoder.embed_tokens.weight": tensors.pop("shared.weight"), **tensors}


@pytest.mark.parametrize("tensors", [with_all_tables, with_one_table])
def test_other_names_of_the_table(tmp_path, tensors):
    batch, answers = golden("t5")
    model = load_pretrained(changed("t5", tmp_path / "other", tensors))
    assert model.config.tied_head
    assert_parity(model, batch, answers)


def test_a_head_that_is_not_scaled_though_it_is_tied(tmp_path):
    """What transformers 5 makes of a new T5 1.1."""
    model = load_pretrained(changed("t5", tmp_path / "new", scale_decoder_outputs=False))
    assert (model.config.tied_head, model.config.scaled_head) == (True, False)
    batch, answers = golden("t5")
    logits = np.asarray(model(inputs_of(model, batch)))
    np.testing.assert_allclose(logits / 8**0.5, answers["logits"], rtol=0, atol=1e-5)
