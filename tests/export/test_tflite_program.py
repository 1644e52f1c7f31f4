"""The program in C++ writes what `TFLiteGenerator` writes, with the library that ai-edge-litert brings."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("ai_edge_litert", reason="needs ai-edge-litert, from the extra tflite")
pytest.importorskip("ai_edge_quantizer", reason="needs ai-edge-quantizer, from the extra tflite")

from tiny_pipeline import tiny_model

from lmzoo.export import TFLiteGenerator, export_tflite

SOURCE = Path(__file__).parents[2] / "examples" / "tflite_generate.cc"
DECLARATIONS = Path(__file__).with_name("litert_declarations")
CACHE_LENGTH, PREFILL_LENGTH, NEW = 96, 9, 64
COMPILE = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the C++ program with")
    library = Path(importlib.util.find_spec("ai_edge_litert").origin).parent
    if not (library / "libLiteRt.so").is_file():
        pytest.skip("this ai-edge-litert has no libLiteRt.so to link with")
    path = tmp_path_factory.mktemp("program") / "tflite_generate"
    link = [f"-L{library}", "-lLiteRt", f"-Wl,-rpath,{library}"]
    subprocess.run([*COMPILE, f"-I{DECLARATIONS}", SOURCE, "-o", path, *link], check=True, timeout=300)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model whose texts have no end, by its weights."""
    directory, model = tmp_path_factory.mktemp("gpt"), tiny_model(context_length=CACHE_LENGTH, eos_token_id=None)
    return {
        weights: export_tflite(model, directory / f"{weights}.tflite", weights=weights, prefill_length=PREFILL_LENGTH)
        for weights in ("float32", "int8")
    }


def run(program, *arguments):
    command = [program, *map(str, arguments)]
    environment = {**os.environ, "MALLOC_PERTURB_": "165"}  # Memory that nobody has written is no zeros.
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def new_tokens(program, path, prompt):
    done = run(program, path, *prompt)
    assert done.returncode == 0, done.stderr
    return [int(token) for token in done.stdout.split()]


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_its_texts_are_those_of_the_generator(program, files, weights):
    generator = TFLiteGenerator(files[weights])
    texts = []
    for prompt in ([5], list(range(100, 100 + 2 * PREFILL_LENGTH + 3))):
        texts.append(generator.generate([prompt], NEW, temperature=0)[0].tolist())
        assert new_tokens(program, files[weights], prompt) == texts[-1]
    assert texts[0] != texts[1], "the texts should depend on the prompts"


@pytest.mark.parametrize("room", [0, 5])
def test_it_ends_where_the_cache_is_full(program, files, room):
    # Pieces do not fill the cache, so that the last tokens of these prompts are read one by one.
    prompt = list(range(1, CACHE_LENGTH - room + 1))
    expected = TFLiteGenerator(files["float32"]).generate([prompt], room + 1, temperature=0)[0]
    assert new_tokens(program, files["float32"], prompt) == expected.tolist()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "usage: tflite_generate FILE ID"),
        ([5, 300], "300 is no token id: these are 0 to 299."),
        (["five"], "five is no token id"),
        ([7] * (CACHE_LENGTH + 1), f"has {CACHE_LENGTH + 1} tokens, but the file has room for {CACHE_LENGTH}."),
    ],
)
def test_a_prompt_that_it_cannot_continue_is_refused(program, files, prompt, message):
    done = run(program, files["float32"], *prompt)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr.splitlines()[-1]


def test_a_file_that_is_no_gpt_is_named(program, tmp_path):
    other = tmp_path / "other.tflite"
    other.write_bytes(b"no model at all")
    for path in (tmp_path / "missing.tflite", other):
        done = run(program, path, 5)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"cannot read {path}" in done.stderr.splitlines()[-1]
        assert "INFO" not in done.stderr


def test_a_file_without_a_signature_is_no_gpt(program, files, tmp_path):
    other = tmp_path / "other.tflite"
    other.write_bytes(files["float32"].read_bytes().replace(b"prefill", b"another"))
    done = run(program, other, 5)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no signature named prefill" in done.stderr.splitlines()[-1]


def test_it_compiles_with_the_headers_of_litert():
    """CPLUS_INCLUDE_PATH may say where they are."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the C++ program with")
    command = [*COMPILE, "-fsyntax-only"]
    header = ["-include", "litert/c/litert_common.h", "-x", "c++", "/dev/null"]
    if subprocess.run([*command, *header], capture_output=True, timeout=120, check=False).returncode:
        pytest.skip("g++ finds no litert/c/litert_common.h, which LiteRT's own SDK brings")
    subprocess.run([*command, SOURCE], check=True, timeout=120)
