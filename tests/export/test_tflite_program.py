"""The loop in C++ compiles, where TFLite's headers are (CPLUS_INCLUDE_PATH may say where)."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "examples" / "tflite_generate.cc"


def compiles(*arguments):
    command = ["g++", "-std=c++17", "-fsyntax-only", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_program_compiles():
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    if compiles("-include", "tensorflow/lite/interpreter.h", "-x", "c++", "/dev/null").returncode:
        pytest.skip("g++ finds no tensorflow/lite/interpreter.h, which no package of Python or Debian brings")
    done = compiles("-Wall", "-Werror", SOURCE)
    assert done.returncode == 0, done.stderr
