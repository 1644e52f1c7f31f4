"""`lmzoo serve` or `lmzoo demo` as a user runs it: in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ServerProcess:
    """A server that listens; `url` is where."""

    def __init__(self, process: subprocess.Popen, lines: list[str]) -> None:
        self.process = process
        self.lines = lines
        self.url = next(found[0] for line in lines if (found := re.search(r"http://[\d.]+:\d+", line)))

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


@contextlib.contextmanager
def started(command: str, *arguments: object) -> Iterator[ServerProcess]:
    """Starts a command of lmzoo, waits until it says that it can be ended, and ends it with SIGTERM and status 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lmzoo", command, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C ends it" in line:
                break
        assert process.poll() is None, "".join(lines)
        yield ServerProcess(process, lines)
        assert process.poll() is None, "the server is gone"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
