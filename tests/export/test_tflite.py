"""A .tflite file gives what the model gives, in a runtime without TensorFlow, from built-in operators alone."""

import numpy as np
import pytest
from conftest import TINY
from tiny_pipeline import tiny_model

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert, from the extra tflite")
pytest.importorskip("ai_edge_quantizer", reason="needs ai-edge-quantizer, from the extra tflite")

import keras
import tensorflow as tf

from lmzoo import EmbeddingModel, SequenceClassificationModel
from lmzoo.export import TFLiteGenerator, TFLiteModel, export_tflite
from lmzoo.export.flatbuffers import operators, read_notes, require_builtins
from lmzoo.export.tflite import Signature, convert
from lmzoo.export.tflite_runtime import choose
from lmzoo.models import ARCHITECTURES

CONTEXT_LENGTH, NEW = 96, 64


def tiny(architecture, **overrides):
    """A tiny model whose every weight matters."""
    keras.utils.set_random_seed(0)
    model_class = ARCHITECTURES[architecture]
    model = model_class(model_class.config_class.from_dict({**TINY[architecture], **overrides}))
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(keras.ops.convert_to_numpy(variable) + random.normal(0.0, 0.25, variable.shape))
    return model


@pytest.fixture(scope="module")
def gpt():
    return tiny_model(context_length=CONTEXT_LENGTH)


@pytest.fixture(scope="module")
def files(gpt, tmp_path_factory):
    """One row in float32; two in int8, with 7 places, as the converter takes a clip to [0, 6] for a Relu6."""
    directory = tmp_path_factory.mktemp("gpt")
    return {
        "float32": export_tflite(gpt, directory / "float32.tflite", prefill_length=8),
        "int8": export_tflite(gpt, directory / "int8.tflite", weights="int8", batch_size=2, prefill_length=7),
    }


@pytest.fixture(scope="module")
def generator(files):
    return TFLiteGenerator(files["float32"])


def prompts(count, seed=0):
    """Rows of ids of all lengths up to those that fill the context with their new tokens."""
    random = np.random.default_rng(seed)
    longest = CONTEXT_LENGTH - NEW
    return [random.integers(1, 300, length).tolist() for length in np.linspace(1, longest, count).astype(int)]


def test_greedy_texts_are_those_of_the_model(gpt, generator):
    rows = prompts(20)
    expected = gpt.generate(rows, NEW, temperature=0).numpy()
    assert len({tuple(row) for row in expected.tolist()}) > 10, "the texts should depend on the prompts"
    for row, new in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(generator.generate([row], NEW, temperature=0)[0], new)


def test_logits_are_those_of_the_model_after_any_prefix(gpt, generator):
    (row,) = prompts(1, seed=1)
    row = row * 20
    expected = gpt(np.array([row]))[0].numpy()
    logits = np.concatenate([generator.read([row[:11]]), *(generator.step([token]) for token in row[11:])])
    np.testing.assert_allclose(logits, expected[10:], atol=2e-4)


def test_a_prompt_that_ends_where_no_piece_fits_is_read_to_its_end(gpt, generator):
    row = prompts(1, seed=2)[0] * CONTEXT_LENGTH
    row = row[: CONTEXT_LENGTH - 3]
    np.testing.assert_allclose(generator.read([row]), gpt(np.array([row]))[:, -1], atol=2e-4)
    generator.read([row[:4]])
    assert generator._num_taken == 4, "a new text begins with an empty cache"


def test_rows_of_different_lengths_do_not_disturb_one_another(files):
    pair = TFLiteGenerator(files["int8"])
    rows = [prompts(20)[3], prompts(20)[12]]
    together = pair.generate(rows, 20, temperature=0)
    # Activations are quantized by row, so that a row alone gives the same to rounding.
    for place, row in enumerate(rows):
        alone = pair.read([row])[0]
        both = pair.read(rows)[place]
        np.testing.assert_allclose(alone, both, atol=2e-3)
    assert together.shape == (2, 20)


def test_every_operator_is_built_in(files):
    for path in files.values():
        found = operators(path.read_bytes())
        assert set(found) == {"prefill", "decode"}
        for names in found.values():
            assert {"FULLY_CONNECTED", "EMBEDDING_LOOKUP", "DYNAMIC_UPDATE_SLICE"} <= names
            assert not [name for name in names if name.startswith("CUSTOM")]


def test_an_operator_that_is_not_built_in_is_refused(gpt):
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [tf.function(tf.math.atan).get_concrete_function(tf.TensorSpec([2]))], tf.Module()
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.SELECT_TF_OPS]
    with pytest.raises(ValueError, match="CUSTOM:FlexAtan"):
        require_builtins(converter.convert())
    foreign = Signature(lambda x: {"y": tf.raw_ops.Cross(a=x, b=x)}, {"x": tf.TensorSpec([2, 3], name="x")})
    with pytest.raises(ValueError, match="the graph has Cross, which TFLite has not built in"):
        convert(gpt, {"cross": foreign})


def test_the_table_is_stored_once(gpt, files):
    content = files["float32"].read_bytes()
    table = gpt.token_embedding.embeddings.numpy()
    assert content.count(table[7].tobytes()) == 1
    scale = np.abs(table[7]).max() / 127
    row = np.round(table[7] / scale).astype(np.int8).tobytes()
    content = files["int8"].read_bytes()
    assert content.count(row) == 1
    assert content.count(table[7].tobytes()) == 0


def test_what_a_program_needs_to_know_is_in_the_file(files):
    notes = read_notes(files["int8"])
    assert notes["weights"] == "int8"
    assert (notes["model_type"], notes["vocab_size"], notes["eos_token_id"]) == ("gpt2", 300, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is no .tflite file"),
        (lambda content: b"no model at all", "is no .tflite file"),
        (lambda content: content[:8], "damaged or cut short"),
        (lambda content: content[: len(content) // 2], "damaged"),
        (lambda content: content[:-100], "damaged"),
    ],
)
def test_a_damaged_file_is_named(files, tmp_path, damage, message):
    path = tmp_path / "damaged.tflite"
    path.write_bytes(damage(files["float32"].read_bytes()))
    with pytest.raises(ValueError, match=rf"damaged\.tflite.*{message}"):
        TFLiteGenerator(path)


def test_a_text_ends_with_the_end_token(gpt, generator, monkeypatch):
    (row,) = prompts(1)
    new = gpt.generate([row], NEW, temperature=0).numpy()[0].tolist()
    end = new[NEW // 2]
    monkeypatch.setattr(generator, "_end", end)
    until_end = new[: new.index(end) + 1]
    assert [token for (token,) in generator.stream([row], NEW, temperature=0)] == until_end
    padding = [0] * (NEW - len(until_end))
    assert generator.generate([row], NEW, temperature=0)[0].tolist() == until_end + padding


def test_draws_follow_the_distribution_and_its_filters():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)
    drawn = np.bincount([choose(logits, 1.0, generator=random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    assert {choose(logits, 1.0, top_k=2, generator=random) for _ in range(100)} == {0, 1}
    assert {choose(logits, 1.0, top_p=0.81, generator=random) for _ in range(200)} == {0, 1, 2}
    assert {choose(logits, 1.0, top_p=0.79, generator=random) for _ in range(100)} == {0, 1}
    cold = [choose(logits, 0.1, generator=random) for _ in range(100)]
    assert cold.count(0) > 95
    assert choose(logits, 0.0) == 0


def test_a_seed_fixes_a_text(generator):
    first, again, other = (
        generator.generate([[5, 6]], 12, temperature=2.0, top_k=50, seed=seed).tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("rows", "new", "message"),
    [
        ([[1], [2]], 4, "2 texts, but the file takes 1"),
        ([[300]], 4, r"\[0, 300\), but a text has 300"),
        ([[1] * 40], 64, "40 tokens and max_new_tokens is 64, but together they may be 97"),
    ],
)
def test_what_a_file_cannot_read_is_refused(generator, rows, new, message):
    with pytest.raises(ValueError, match=message):
        generator.generate(rows, new)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int3"}, "weights is 'int3', but must be one of float32"),
        ({"length": 97}, "length is 97, but must be from 1 to 96"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"length": 16}, "prefill_length is 32, but must be from 1 to 16"),
    ],
)
def test_what_cannot_be_exported_is_refused(gpt, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        export_tflite(gpt, tmp_path / "no.tflite", **settings)
    assert not list(tmp_path.iterdir())


def test_a_model_in_half_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="computes in bfloat16"):
        export_tflite(tiny_model("bfloat16"), tmp_path / "no.tflite")


def test_answers_of_t5_are_those_of_the_model(tmp_path):
    model = tiny("t5")
    path = export_tflite(model, tmp_path / "t5.tflite", batch_size=2)
    generator = TFLiteGenerator(path)
    random = np.random.default_rng(0)
    for _ in range(5):
        rows = [random.integers(1, 61, random.integers(1, 24)).tolist() for _ in range(2)]
        expected = model.generate(rows, 20, temperature=0).numpy()
        np.testing.assert_array_equal(generator.generate(rows, 20, temperature=0), expected)


@pytest.mark.parametrize("kind", ["classifier", pytest.param("filler", marks=pytest.mark.slow), "embedder"])
def test_an_encoder_gives_what_the_model_gives(tmp_path, kind):
    model = tiny("bert")
    if kind == "classifier":
        model = SequenceClassificationModel(model, labels=["bad", "fair", "good"])
    elif kind == "embedder":
        model = EmbeddingModel(model)
    path = export_tflite(model, tmp_path / "encoder.tflite", length=20)
    random = np.random.default_rng(0)
    for count in (1, 7, 20):
        mask = np.arange(20)[None] < count
        inputs = {
            "token_ids": np.where(mask, random.integers(1, 61, (1, 20)), 0).astype("int32"),
            "padding_mask": mask,
            "token_type_ids": (np.arange(20)[None] > 4).astype("int32"),
        }
        expected = model(inputs, training=False).numpy()
        output = TFLiteModel(path).run("tokens", **inputs)["output"]
        counts = mask if kind == "filler" else [True]
        np.testing.assert_allclose(output[counts], expected[counts], atol=2e-5)


def test_wrong_inputs_of_a_signature_are_named(files):
    model = TFLiteModel(files["float32"])
    with pytest.raises(ValueError, match="decode takes lengths, token_ids, but was given token_ids"):
        model.run("decode", token_ids=[[1]])
    with pytest.raises(ValueError, match=r"token_ids has shape \[1, 2\], but decode takes \[1, 1\]"):
        model.run("decode", token_ids=[[1, 2]], lengths=[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights"),
    [("gpt2", "float16"), ("gpt2", "int8-full"), ("gpt2", "int4"), ("bert", "int8-full"), ("t5", "int8")],
)
def test_weights_in_few_bits_are_close(tmp_path, name, weights):
    model = tiny(name, model_dim=64, feedforward_dim=96, vocab_size=500)
    random = np.random.default_rng(0)
    shown = [random.integers(1, 500, 20).tolist() for _ in range(8)]
    path = export_tflite(
        model, tmp_path / "model.tflite", weights=weights, calibration=shown, length=24, prefill_length=8
    )
    ids = random.integers(1, 500, (1, 20)).astype("int32")
    if name == "bert":
        inputs = {"token_ids": ids, "padding_mask": ids > 0, "token_type_ids": np.zeros_like(ids)}
        expected = model(inputs).numpy()
        padded = {name: np.pad(value, ((0, 0), (0, 4))) for name, value in inputs.items()}
        output = TFLiteModel(path).run("tokens", **padded)["output"][:, :20]
    else:
        start = {"decoder_token_ids": np.array([[0]], np.int32)} if name == "t5" else {}
        expected = model({"token_ids": ids, **start} if start else ids).numpy()[:, -1]
        output = TFLiteGenerator(path).read(ids.tolist())
    least = {"float16": 0.99999, "int8": 0.99, "int8-full": 0.97, "int4": 0.7}[weights]
    assert np.corrcoef(output.ravel(), expected.ravel())[0, 1] > least
    if weights == "float16":
        np.testing.assert_allclose(output, expected, atol=0.02)


@pytest.mark.slow
def test_int4_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match="groups of 32"):
        export_tflite(tiny("bert"), tmp_path / "no.tflite", weights="int4")


def test_calibration_needs_text(gpt, tmp_path):
    with pytest.raises(ValueError, match="int8-full needs calibration"):
        export_tflite(gpt, tmp_path / "no.tflite", weights="int8-full", prefill_length=8)
