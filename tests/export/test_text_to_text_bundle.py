"""An exported pipeline that answers texts gives the same in a process with TensorFlow only."""

import functools

import numpy as np
import pytest
from bundle import Bundle, has_strings, run_elsewhere
from tiny_text_to_text import SOURCES, tiny_t5, tiny_tokenizer

from lmzoo.pipelines import TextToText

pytestmark = pytest.mark.slow

SETTINGS = {
    "greedy": {},
    "sampler": {"temperature": 1.2, "top_k": 20, "seed": 3, "stop_strings": "th"},
    "searcher": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.6},
}
IDS = {"token_ids": [[5, 6, 1], [9, 1, 0]], "padding_mask": [[True] * 3, [True, True, False]]}


@functools.cache
def pipeline(name):
    return TextToText(tiny_t5(), tiny_tokenizer(), 10, "the ", **SETTINGS[name])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles")
    return functools.cache(lambda name: pipeline(name).export(directory / name))


def test_a_process_with_tensorflow_alone_gives_the_same(path):
    options = {"seed": [5], "max_new_tokens": [4], "temperature": [0.7], "top_k": [9]}
    requests = [
        ("serving_default", {"text": SOURCES}),
        ("generate", {"text": SOURCES, **options}),
        ("score", {"text": SOURCES, "continuation": SOURCES[::-1]}),
        ("tokens", {**IDS, "decoder_token_ids": [[0, 3], [0, 4]]}),
        ("encode", IDS),
    ]
    served, drawn, scores, tokens, encoded = run_elsewhere([(path("sampler"), *request) for request in requests])
    sampler = pipeline("sampler")
    assert served["text"] == sampler(SOURCES)
    assert drawn["text"] == sampler(SOURCES, temperature=0.7, top_k=9, seed=5, max_new_tokens=4)
    expected = sampler.score(SOURCES, SOURCES[::-1])
    np.testing.assert_allclose(scores["log_likelihood"], [each["log_likelihood"] for each in expected], atol=1e-5)
    batch = {name: np.array(value) for name, value in IDS.items()}
    expected = tiny_t5()({**batch, "decoder_token_ids": np.array([[0, 3], [0, 4]])})
    np.testing.assert_allclose(tokens["logits"], expected, atol=1e-5)
    np.testing.assert_allclose(encoded["hidden"], tiny_t5().encode(batch), atol=1e-5)


def test_greedy_answers_and_those_of_beams_are_the_same_too(path):
    names = ("greedy", "searcher")
    requests = [(path(name), "serving_default", {"text": SOURCES}) for name in names]
    requests.append((path("searcher"), "n_best", {"text": SOURCES, "seed": [-1], "max_new_tokens": [10]}))
    *served, best = run_elsewhere(requests)
    assert [outputs["text"] for outputs in served] == [pipeline(name)(SOURCES) for name in names]
    expected = pipeline("searcher").n_best(SOURCES)
    assert best["text"] == [[each["text"] for each in row] for row in expected]
    np.testing.assert_allclose(best["score"], [[each["score"] for each in row] for row in expected], atol=1e-5)


@pytest.mark.parametrize("name", ["sampler", "searcher"])
def test_signatures_on_ids_need_neither_strings_nor_tables(path, name):
    ids = {"tokens", "encode", "prefill", "decode"}
    bundle = Bundle(path(name))
    strings = {"serving_default", "generate", "score"} | ({"n_best"} if name == "searcher" else set())
    assert {each for each in bundle.signatures if not each.startswith("__")} == ids | strings
    for signature in ids:
        assert len(bundle.nodes(signature)) > 50, "the walk must reach the model"
        assert not [node.name for node in bundle.nodes(signature) if has_strings(node)]
    for signature in strings:
        assert any(map(has_strings, bundle.nodes(signature)))
