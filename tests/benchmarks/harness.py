"""Runs contenders in turn, each in its own process, and reports the median of several rounds."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("tensorflow", "keras", "keras-hub", "torch", "transformers")


def main(contenders: dict[str, Callable[[], dict[str, Any]]], description: str, columns: list[str]) -> None:
    """Runs one contender if asked to as a child process, and all of them otherwise."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs")
    parser.add_argument("--only", nargs="*", choices=list(contenders), help="run these contenders only")
    parser.add_argument("--json", type=Path, default=None, help="where the figures go; default: beside the script")
    parser.add_argument("--worker", choices=list(contenders), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("RESULT " + json.dumps(contenders[arguments.worker]()))
        return
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only or contenders}
    for _ in range(arguments.rounds):
        for name, results in rounds.items():
            results.append(_run(name))
    figures = {name: _median(results) for name, results in rounds.items()}
    _print(figures, columns)
    script = Path(sys.argv[0])
    path = arguments.json or script.with_suffix(".json")
    path.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n")
    print(f"written to {path}")


def time_calls(step: Callable[[], Any], *, warmup: int = 3, calls: int = 10) -> float:
    """Median seconds of a call, after some that do not count."""
    for _ in range(warmup):
        step()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) / 1024


def resident_mb() -> float:
    """Memory that this process holds now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def machine() -> dict[str, Any]:
    """Device, versions and commit that figures belong to."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _run(name: str) -> dict[str, Any]:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *sys.argv[:1], "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")


def _median(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: statistics.median(result[key] for result in results) if isinstance(value, int | float) else value
        for key, value in results[0].items()
    }


def _print(figures: dict[str, dict[str, Any]], columns: list[str]) -> None:
    width = max(len(name) for name in figures)
    print(" " * width, *(f"{column:>16}" for column in columns))
    for name, figure in figures.items():
        cells = (figure.get(column) for column in columns)
        print(
            f"{name:{width}}",
            *(f"{cell:>16,.1f}" if isinstance(cell, int | float) else f"{cell!s:>16}" for cell in cells),
        )
