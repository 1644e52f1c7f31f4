"""The client of the examples: the same outputs over REST and over gRPC, and errors of the server in one line."""

import json
import subprocess
import sys

import pytest
from server_process import ROOT
from small_models import export_small

from lmzoo.serving import model_server

SCRIPT = ROOT / "examples" / "tf_serving_client.py"


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    pytest.importorskip("tensorflow_serving")
    directory = tmp_path_factory.mktemp("models") / "small"
    export_small(directory)
    with model_server([directory]) as addresses:
        yield addresses


def ask(addresses, *words, grpc=False):
    server = ["--grpc", "--server", addresses.grpc] if grpc else ["--server", addresses.rest]
    command = [sys.executable, SCRIPT, *server, "--model", "small", *words]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, env={"PYTHONUTF8": "1"})


# The client over REST needs the standard library only, and no time.
OVER = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("grpc", OVER)
def test_texts_and_other_inputs_come_to_the_model(addresses, grpc):
    done = ask(addresses, "--signature", "repeat", "é", "b", grpc=grpc)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == {"text": ["éé", "bb"]}
    done = ask(addresses, "--signature", "repeat", "--input", "times=3", "a", grpc=grpc)
    assert json.loads(done.stdout) == {"text": ["aaa"]}


@pytest.mark.parametrize("grpc", OVER)
def test_what_the_server_refuses_is_told_in_a_line(addresses, grpc):
    done = ask(addresses, "--signature", "mixed", "a", grpc=grpc)
    assert done.returncode == 1
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("INVALID_ARGUMENT: " if grpc else "400: ")
    assert "Missing named input" in last


def test_over_rest_it_needs_nothing_installed(addresses):
    words = ["--server", addresses.rest, "--model", "small", "--signature", "repeat", "a"]
    command = [sys.executable, "-I", "-S", SCRIPT, *words]  # Without site-packages.
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert json.loads(done.stdout) == {"text": ["aa"]}
