"""Exported pipelines give their results in a process with TensorFlow only, and their graphs hold core ops."""

import numpy as np
import pytest
import tensorflow as tf
from bundle import Bundle, has_strings, run_elsewhere
from tensorflow.core.framework.types_pb2 import DT_FLOAT
from tiny_encoders import TEXTS, task_model, tiny_encoder, tiny_tokenizer

from lmzoo.pipelines import MaskFiller, QuestionAnswerer, TextClassifier, TextEmbedder, TokenClassifier

pytestmark = pytest.mark.slow

MASKED = [f"{text[:20]} [MASK] and [MASK] {text[20:]}" for text in TEXTS]
LONG = [text * 3 for text in TEXTS]
CASES = {
    "single_label": (TextClassifier, {}, {"text": TEXTS}),
    "multi_label": (TextClassifier, {"threshold": 0.3}, {"text": TEXTS}),
    "regression": (TextClassifier, {}, {"text": TEXTS}),
    "tokens": (TokenClassifier, {}, {"text": TEXTS}),
    "answers": (QuestionAnswerer, {"n_best": 3}, {"question": TEXTS[::-1], "context": LONG}),
    "embeddings": (TextEmbedder, {}, {"text": TEXTS}),
    "filler": (MaskFiller, {"top_k": 3}, {"text": MASKED}),
    "filler of another kind": (
        MaskFiller,
        {"top_k": 3},
        {"text": [text.replace("[MASK]", "<mask>") for text in MASKED]},
    ),
}
TOKENS = {
    "token_ids": [[5, 6, 7, 8], [9, 1, 0, 0]],
    "padding_mask": [[True] * 4, [True, True, False, False]],
    "token_type_ids": [[0, 0, 1, 1], [0] * 4],
}


@pytest.fixture(scope="module")
def pipelines():
    made = {}
    for name, (pipeline_class, settings, _) in CASES.items():
        model = tiny_encoder() if name.startswith("filler") else task_model(name)
        kind = "bpe" if name == "filler of another kind" else "wordpiece"
        made[name] = pipeline_class(model, tiny_tokenizer(kind), **settings)
    return made


@pytest.fixture(scope="module")
def paths(pipelines, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles")
    return {name: pipeline.export(directory / name) for name, pipeline in pipelines.items()}


def check(actual, expected):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        expected_values, values = value.numpy(), np.array(actual[name])
        assert values.shape == expected_values.shape, name
        if expected_values.dtype == np.float32:
            np.testing.assert_allclose(values, expected_values, atol=1e-5, err_msg=name)
        elif value.dtype == tf.string:
            assert values.tolist() == np.char.decode(expected_values.astype(bytes), "utf-8").tolist(), name
        else:
            assert values.tolist() == expected_values.tolist(), name


def test_a_process_with_tensorflow_alone_gives_the_same(paths, pipelines):
    requests = [(paths[name], "serving_default", inputs) for name, (_, _, inputs) in CASES.items()]
    requests += [(path, "tokens", TOKENS) for path in paths.values()]
    requests.append((paths["single_label"], "pairs", {"text": TEXTS, "pair": TEXTS[::-1]}))
    *results, pairs = run_elsewhere(requests)
    for (name, (_, _, inputs)), result in zip(CASES.items(), results, strict=False):
        check(result, pipelines[name](*(tf.constant(column) for column in inputs.values())))
    batch = {name: np.array(value) for name, value in TOKENS.items()}
    for (name, pipeline), result in zip(pipelines.items(), results[len(CASES) :], strict=True):
        output = "embedding" if name == "embeddings" else "logits"
        np.testing.assert_allclose(result[output], pipeline.model(batch), atol=1e-4, err_msg=name)
    check(pairs, pipelines["single_label"](tf.constant(TEXTS), tf.constant(TEXTS[::-1])))


def test_signatures_have_names_and_types(paths):
    signatures = {name: Bundle(path).signatures for name, path in paths.items()}
    shapes = {
        name: {
            key: (tf.dtypes.as_dtype(info.dtype).name, len(info.tensor_shape.dim))
            for key, info in signature["serving_default"].outputs.items()
        }
        for name, signature in signatures.items()
    }
    scores = {"scores": ("float32", 2), "labels": ("string", 2)}
    span = {"start": ("int32", 2), "end": ("int32", 2), "score": ("float32", 2)}
    filled = {"count": ("int32", 1), "token": ("string", 3), "score": ("float32", 3), "text": ("string", 3)}
    assert shapes == {
        "single_label": {**scores, "label": ("string", 1), "score": ("float32", 1)},
        "multi_label": {**scores, "chosen": ("bool", 2)},
        "regression": scores,
        "tokens": {**span, "count": ("int32", 1), "label": ("string", 2), "text": ("string", 2)},
        "answers": {**span, "answer": ("string", 2)},
        "embeddings": {"embedding": ("float32", 2)},
        "filler": filled,
        "filler of another kind": filled,
    }
    for name, (_, _, inputs) in CASES.items():
        assert set(signatures[name]["serving_default"].inputs) == set(inputs)
        assert set(signatures[name]["tokens"].inputs) == set(TOKENS)


def test_the_tokens_signature_needs_neither_strings_nor_tables(paths):
    for path in paths.values():
        bundle = Bundle(path)
        assert len(bundle.nodes("tokens")) > 100, "the walk must reach the model"
        assert not [node.name for node in bundle.nodes("tokens") if has_strings(node)]


def test_the_bundle_holds_core_ops_only(paths):
    for path in paths.values():
        python = {"PyFunc", "EagerPyFunc", "PyFuncStateless"}
        ops = Bundle(path).all_ops()
        assert not {op for op in ops if op in python or op.startswith(("Xla", "Tpu", "TPU", "Collective", "Custom"))}


def test_weights_are_saved_once_and_only_those_of_the_task(paths, pipelines):
    for name, path in paths.items():
        saved = [
            key for key, _ in tf.train.list_variables(str(path / "variables" / "variables")) if "OBJECT" not in key
        ]
        assert len(saved) == len(pipelines[name].model.weights)
        constants = [node for node in Bundle(path).meta_graph.graph_def.node if node.op == "Const"]
        assert not [node.name for node in constants if node.attr["dtype"].type == DT_FLOAT and node.ByteSize() > 999]
    assert len(pipelines["embeddings"].model.weights) < len(tiny_encoder().weights), "no masked-LM head is served"
