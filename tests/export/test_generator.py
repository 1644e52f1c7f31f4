"""An exported generator gives the pipeline's texts in a process with TensorFlow only, and its graph holds core ops."""

import numpy as np
import pytest
import tensorflow as tf
from bundle import Bundle, has_strings, run_elsewhere
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipeline import CONTEXT_LENGTH, PROMPTS, shared_model, tiny_model, tiny_tokenizer

from lmzoo.pipelines import TextGenerator

NEW = 10
TOKEN_IDS = [[5, 6, 7, 8], [9, 1, 2, 3]]


def generator_of(model, **settings_):
    return TextGenerator(model, tiny_tokenizer(), NEW, **settings_)


@pytest.fixture(scope="module")
def greedy():
    return generator_of(shared_model(), temperature=0, stop_strings=["the", "\n\n"])


@pytest.fixture(scope="module")
def sampler():
    return generator_of(shared_model(), temperature=0.9, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def paths(greedy, sampler, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles")
    return {"greedy": greedy.export(directory / "greedy"), "sampler": sampler.export(directory / "sampler", version=7)}


@pytest.fixture(scope="module")
def loaded(paths):
    return {name: tf.saved_model.load(str(path)) for name, path in paths.items()}


def test_export_says_where_it_wrote(paths):
    assert paths["greedy"].name == "1"
    assert paths["sampler"].name == "7"
    assert all((path / "saved_model.pb").is_file() for path in paths.values())


def test_a_process_with_tensorflow_alone_gives_the_same(paths, greedy, sampler, tmp_path):
    def request(**changes):
        inputs = {"seed": [11], "max_new_tokens": [NEW], "temperature": [0.9], "top_k": [40], "top_p": [0.9]}
        return {"text": PROMPTS, **inputs, **changes}

    half = {dtype: generator_of(tiny_model(dtype)) for dtype in ("bfloat16", "mixed_bfloat16")}
    half_paths = {dtype: generator.export(tmp_path / dtype) for dtype, generator in half.items()}
    requests = [
        (paths["greedy"], "serving_default", {"text": PROMPTS}),
        (paths["greedy"], "generate", {"text": PROMPTS, "seed": [-1], "max_new_tokens": [3]}),
        (paths["sampler"], "serving_default", {"text": PROMPTS}),
        (paths["sampler"], "generate", request()),
        (paths["sampler"], "generate", request(temperature=[0.0], top_k=list(range(len(PROMPTS))))),
        (paths["greedy"], "tokens", {"token_ids": TOKEN_IDS}),
    ]
    for path in half_paths.values():
        inputs = request()
        inputs.pop("top_p")
        requests += [(path, "generate", inputs), (path, "tokens", {"token_ids": TOKEN_IDS})]
    results = run_elsewhere(requests)

    texts = [outputs["text"] for outputs in results[:5]]
    assert texts[0] == greedy(PROMPTS)
    assert texts[1] == greedy(PROMPTS, max_new_tokens=3)
    assert texts[2] == sampler(PROMPTS)
    assert texts[3] == sampler(PROMPTS, seed=11)
    assert texts[4] == sampler(PROMPTS, temperature=0)
    np.testing.assert_allclose(results[5]["logits"], shared_model()(np.array(TOKEN_IDS)), atol=1e-5)
    for number, (dtype, generator) in enumerate(half.items()):
        text, logits = results[6 + 2 * number : 8 + 2 * number]
        assert text["text"] == generator(PROMPTS, seed=11, temperature=0.9), dtype
        expected = tf.function(generator.model)(tf.constant(TOKEN_IDS))  # A graph rounds other than single operations.
        np.testing.assert_allclose(logits["logits"], expected, atol=1e-3)


anything = st.lists(st.one_of(st.text(max_size=20), st.text("the \n漢😀é", max_size=40)), max_size=3)


@settings(max_examples=30)
@given(anything)
def test_any_strings_give_the_texts_of_the_pipeline(greedy, loaded, texts):
    served = loaded["greedy"].signatures["serving_default"](tf.constant(texts, tf.string, [len(texts)]))["text"]
    assert [text.decode() for text in served.numpy()] == greedy(texts)


@pytest.mark.slow
@settings(max_examples=400)
@given(anything, st.integers(0, 2**63 - 1), st.floats(0, 3), st.integers(1, 400), st.floats(0.01, 1))
def test_any_request_gives_the_texts_of_the_pipeline(sampler, loaded, texts, seed, temperature, top_k, top_p):
    options = {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    inputs = {
        name: tf.constant([value], sampler._request_inputs.defaults[name].dtype) for name, value in options.items()
    }
    served = loaded["sampler"].generate(tf.constant(texts, tf.string, [len(texts)]), **inputs)["text"]
    assert [text.decode() for text in served.numpy()] == sampler(texts, **options)


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=3))
@settings(max_examples=20)
def test_any_bytes_are_answered_in_utf8(greedy, loaded, texts):
    served = loaded["greedy"].signatures["serving_default"](tf.constant(texts))["text"].numpy()
    assert [text.decode() for text in served] == greedy([text.decode(errors="replace") for text in texts])


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": [-1.0]},
        {"temperature": [float("nan")]},
        {"temperature": [1e30], "top_k": [-5]},
        {"top_k": [2**31 - 1], "top_p": [0.0]},
        {"top_p": [-3.0]},
        {"top_p": [float("inf")]},
        {"max_new_tokens": [2**31 - 1]},
        {"seed": [-(2**63)]},
    ],
)
def test_absurd_values_in_a_request_are_answered(loaded, sampler, values):
    inputs = {name: tf.constant(value, sampler._request_inputs.defaults[name].dtype) for name, value in values.items()}
    texts = loaded["sampler"].generate(tf.constant(PROMPTS), **inputs)["text"]
    assert texts.shape == [len(PROMPTS)]


def test_a_request_for_no_tokens_gets_none(loaded):
    texts = loaded["sampler"].generate(tf.constant(PROMPTS[:2]), max_new_tokens=tf.constant([0, -3]))["text"]
    assert texts.numpy().tolist() == [b"", b""]


def test_without_a_seed_a_server_draws_one(loaded):
    drawn = [loaded["sampler"].generate(tf.constant(PROMPTS), seed=tf.constant([-1], tf.int64)) for _ in range(2)]
    assert drawn[0]["text"].numpy().tolist() != drawn[1]["text"].numpy().tolist()


# ---- what is in the graph


def test_signatures_have_names_types_and_defaults_for_servers(paths):
    signatures = Bundle(paths["sampler"]).signatures
    shapes = {
        name: {
            side: {key: (tf.dtypes.as_dtype(info.dtype).name, [dim.size for dim in info.tensor_shape.dim])}
            for side, infos in (("in", signature.inputs), ("out", signature.outputs))
            for key, info in infos.items()
        }
        for name, signature in signatures.items()
        if name in ("serving_default", "tokens")
    }
    text = {"text": ("string", [-1])}
    assert shapes["serving_default"] == {"in": text, "out": text}
    assert shapes["tokens"] == {
        "in": {"token_ids": ("int32", [-1, -1])},
        "out": {"logits": ("float32", [-1, -1, shared_model().config.vocab_size])},
    }
    defaults = {name: tf.make_ndarray(value).tolist() for name, value in signatures["generate"].defaults.items()}
    assert defaults.pop("temperature") == pytest.approx([0.9])
    assert defaults.pop("top_p") == pytest.approx([0.9])
    assert defaults == {"seed": [3], "max_new_tokens": [NEW], "top_k": [40]}
    assert set(signatures["generate"].inputs) == {"text", "temperature", "top_p", "seed", "max_new_tokens", "top_k"}


def test_the_tokens_signature_needs_neither_strings_nor_tables(paths):
    bundle = Bundle(paths["sampler"])
    assert len(bundle.nodes("tokens")) > 100, "the walk must reach the model"
    assert not [node.name for node in bundle.nodes("tokens") if has_strings(node)]
    assert [node.name for node in bundle.nodes("serving_default") if has_strings(node)], (
        "the walk must find what is there"
    )


def test_the_bundle_holds_core_ops_only(paths):
    for path in paths.values():
        ops = Bundle(path).all_ops()
        python = {"PyFunc", "EagerPyFunc", "PyFuncStateless"}
        assert not {op for op in ops if op in python or op.startswith(("Xla", "Tpu", "TPU", "Collective", "Custom"))}


def test_weights_are_saved_once(paths):
    names = [name for name, _ in tf.train.list_variables(str(paths["sampler"] / "variables" / "variables"))]
    weights = [name for name in names if "OBJECT_GRAPH" not in name]
    assert len(weights) == len(shared_model().weights)
    data = sum(file.stat().st_size for file in (paths["sampler"] / "variables").glob("*.data*"))
    assert data < 4 * shared_model().count_params() * 1.2
    # No signature brings a copy of the loop, or of a weight as a constant.
    loops = [node for f in Bundle(paths["sampler"]).functions.values() for node in f.node_def if node.op == "While"]
    biggest = max(node.ByteSize() for node in Bundle(paths["sampler"]).meta_graph.graph_def.node)
    assert len(loops) == len({node.attr["body"].func.name for node in loops})
    assert biggest < 20_000


def test_a_compiled_model_is_exported_without_its_optimizer(tmp_path):
    model = tiny_model()
    model.compile()
    model.train_on_batch(np.array(TOKEN_IDS)[:, :-1], np.array(TOKEN_IDS)[:, 1:])
    assert len(model.optimizer.variables) > len(model.weights)
    generator = generator_of(model, temperature=0)
    path = generator.export(tmp_path)
    assert len(tf.train.list_variables(str(path / "variables" / "variables"))) == len(model.weights) + 1
    loaded = tf.saved_model.load(str(path))
    assert loaded.signatures["serving_default"](tf.constant(["the cat"]))["text"].numpy()[0].decode() == generator(
        "the cat"
    )


def test_prompts_and_cache_are_as_long_as_the_batch_needs(monkeypatch):
    model = tiny_model()
    lengths = []
    init_cache = model.init_cache

    def recorded(batch_size, cache_length):
        tf.py_function(lambda length: lengths.append(int(length)), [cache_length], [])
        return init_cache(batch_size, cache_length)

    monkeypatch.setattr(model, "init_cache", recorded)
    generator = generator_of(model, temperature=0)
    for text in ("", "a", ["a", "a b c"], "a" * 500):
        generator(text)
    longest = [1, 1, len(tiny_tokenizer().encode("a b c")), CONTEXT_LENGTH - NEW]
    assert lengths == [length + NEW - 1 for length in longest]
