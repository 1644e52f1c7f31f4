"""Worker processes on this machine, as one command: started, told of one another, watched, and ended together."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

_LONGEST_LINE = 1 << 20
_POLL_SECONDS = 0.1
# Below the ports that Linux gives to outgoing connections, any of which could take one before its worker does.
_PORTS = range(20_000, 32_000)

# Run by a process of its own, which outlives a launcher that is killed: it reads the process groups that there are,
# and kills them when the launcher's end of the pipe closes.
_KEEPER = """
import os, signal, sys
groups = ""
for groups in sys.stdin:
    pass
for group in groups.split():
    try:
        os.killpg(int(group), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def launch(
    command: Sequence[str],
    /,
    *,
    workers: int,
    restarts: int = 0,
    grace_seconds: float = 30.0,
    cores_each: int | None = None,
) -> int:
    """Run a command as several workers on this machine: lmzoo launch --workers 2 -- lmzoo pretrain ...

    Each worker finds its cluster in TF_CONFIG. Its output comes line by line, behind its number. When one fails, the
    others are ended. SIGTERM and SIGINT go on to the workers, so that they can save and exit.

    Args:
        command: Program and arguments, after `--`.
        workers: Processes to run, 1 or more.
        restarts: How many times all are started again, on new ports, after one has failed. Workers that write
            checkpoints go on from the last one.
        grace_seconds: From SIGTERM or SIGINT to SIGKILL.
        cores_each: Hold each worker to so many cores of its own (Linux). By default all share all cores.

    Returns:
        0 if every worker ended with 0; otherwise the exit status of the first that failed, 128 + N for signal N.

    Raises:
        ValueError: no command or none of that name, or a number out of range.
    """
    cores = _check(command, workers, restarts, grace_seconds, cores_each)
    with _signals() as received, _keeper() as keep:
        for restart in range(restarts + 1):
            cluster = [f"127.0.0.1:{port}" for port in _free_ports(workers)]
            words = " ".join(shlex.join(command).split())
            _say(f"starting {workers} workers on {', '.join(cluster)}: {words}")
            group = _Group(command, cluster, cores, keep)
            status = group.watch(received, grace_seconds)
            if status == 0 or group.stopped or restart == restarts:
                return status
            _say(f"starting all workers again, restart {restart + 1} of {restarts}")
    raise AssertionError("the last restart returns")


class _Group:
    """The workers of one attempt."""

    def __init__(
        self,
        command: Sequence[str],
        cluster: Sequence[str],
        cores: Sequence[set[int]] | None,
        keep: Callable[[Sequence[int]], None],
    ) -> None:
        self.stopped = False
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._output = _Output()
        try:
            for index in range(len(cluster)):
                config = {"cluster": {"worker": list(cluster)}, "task": {"type": "worker", "index": index}}
                process = _start(command, {"TF_CONFIG": json.dumps(config)})
                self._running[index] = process
                keep([each.pid for each in self._running.values()])
                if cores is not None:
                    # Threads take the cores of the one that starts them, and there is only one yet.
                    os.sched_setaffinity(process.pid, cores[index])
                self._output.add(index, process)
        except BaseException:
            self._kill()
            raise

    def watch(self, received: list[int], grace_seconds: float) -> int:
        """Streams output until all workers have ended, and returns the first exit status that is not 0, or 0.

        Args:
            received: signals to pass on, which are taken out.
            grace_seconds: how long a worker may take to end once it was asked to.
        """
        status, deadline = 0, float("inf")
        try:
            while self._running:
                self._output.pump(_POLL_SECONDS)
                while received:
                    self.stopped = True
                    number = received.pop(0)
                    _say(f"passing {signal.Signals(number).name} on to the workers")
                    self._send(number)
                    deadline = min(deadline, time.monotonic() + grace_seconds)
                for index, code in self._ended():
                    if code and not status:
                        status = code if code > 0 else 128 - code
                        _say(f"worker {index} {_describe(code)}" + ("; ending the others" if self._running else ""))
                        self._send(signal.SIGTERM)
                        deadline = min(deadline, time.monotonic() + grace_seconds)
                if self._running and time.monotonic() > deadline:
                    late = ", ".join(map(str, self._running))
                    _say(f"still running {grace_seconds:g} seconds after being asked to end, so killed: worker {late}")
                    self._kill()
                    deadline = float("inf")
        finally:
            self._kill()
        return status

    def _ended(self) -> Iterator[tuple[int, int]]:
        for index, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[index]
                _kill_group(process.pid)  # What the worker started ends with it.
                self._output.finish(index)
                yield index, code

    def _send(self, number: int) -> None:
        for process in self._running.values():
            process.send_signal(number)

    def _kill(self) -> None:
        for process in self._running.values():
            _kill_group(process.pid)


class _Output:
    """What the workers print, passed on line by line."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._ends = {"stdout": _Sink(sys.stdout.buffer), "stderr": _Sink(sys.stderr.buffer)}

    def add(self, index: int, process: subprocess.Popen[bytes]) -> None:
        """Follows a worker's stdout and stderr."""
        for name, sink in self._ends.items():
            pipe = getattr(process, name)
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, _Stream(index, pipe, sink))

    def pump(self, seconds: float) -> None:
        """Passes on what has come, or waits so long for something."""
        for key, _ in self._selector.select(seconds):
            if key.data.read() == 0:
                self._close(key.data)

    def finish(self, index: int) -> None:
        """Passes on what is left of a worker that has ended. A process that got away may still hold its pipes."""
        for key in list(self._selector.get_map().values()):
            if key.data.index == index:
                while key.data.read():
                    pass
                self._close(key.data)

    def _close(self, stream: _Stream) -> None:
        self._selector.unregister(stream.pipe)
        stream.close()


class _Stream:
    """One pipe of one worker."""

    def __init__(self, index: int, pipe: IO[bytes], sink: _Sink) -> None:
        self.index, self.pipe, self._sink = index, pipe, sink
        self._rest = b""

    def read(self) -> int | None:
        """Passes on the whole lines among what has come; returns its size: 0 at the end, None if there is nothing."""
        try:
            data = os.read(self.pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        # A line also ends where a progress bar goes back to its start.
        lines = (self._rest + data).splitlines(keepends=True)
        self._rest = b"" if not lines or lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        if len(self._rest) > _LONGEST_LINE:
            lines.append(self._rest + b"\n")
            self._rest = b""
        # A bar begins with the return that ends the line before it, which may have been empty.
        self._sink.write(self.index, [line for line in lines if line != b"\r"])
        return len(data)

    def close(self) -> None:
        """Passes on the last line, even if it has no end."""
        if self._rest:
            self._sink.write(self.index, [self._rest + b"\n"])
        self.pipe.close()


class _Sink:
    """Where lines go: stdout or stderr of the launcher."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._bar_of: int | None = None

    def write(self, index: int, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        # The bar of another worker stays; a worker's own is written over.
        text = b"\n" if self._bar_of not in (None, index) else b""
        text += b"".join(b"[%d] %b" % (index, line) for line in lines)
        self._bar_of = index if text.endswith(b"\r") else None
        self._file.write(text)
        self._file.flush()


def _check(
    command: Sequence[str], workers: int, restarts: int, grace_seconds: float, cores_each: int | None
) -> list[set[int]] | None:
    """Raises ValueError for arguments that cannot work; returns the cores of each worker, None for all of them."""
    if not command:
        raise ValueError("there is no command to run. Give it after --, as in: lmzoo launch --workers 2 -- python x.py")
    if shutil.which(command[0]) is None:
        raise ValueError(f"the command {command[0]!r} is not found, or may not be executed.")
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, but is {workers}.")
    if restarts < 0:
        raise ValueError(f"restarts must be 0 or more, but is {restarts}.")
    if not grace_seconds >= 0:
        raise ValueError(f"grace_seconds must be 0 or more, but is {grace_seconds}.")
    if cores_each is None:
        return None
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("cores_each needs Linux; leave it out here.")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= cores_each <= len(cores) // workers:
        raise ValueError(f"cores_each is {cores_each}, but {workers} workers share {len(cores)} cores.")
    return [set(cores[index * cores_each : (index + 1) * cores_each]) for index in range(workers)]


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a worker as a process group of its own: signals of the terminal reach the launcher only."""
    return subprocess.Popen(
        list(command),
        # Python would keep lines back from a pipe, and lose them if it is killed.
        env={"PYTHONUNBUFFERED": "1", **os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in a list while inside."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: received.append(got)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _keeper() -> Iterator[Callable[[Sequence[int]], None]]:
    """Starts what kills the workers should the launcher be killed; gives a function to tell it their groups."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _KEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield functools.partial(_tell, process)
        _tell(process, [])
    finally:
        process.communicate()


def _tell(keeper: subprocess.Popen[Any], groups: Sequence[int]) -> None:
    assert keeper.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        keeper.stdin.write(f"{' '.join(map(str, groups))}\n".encode())
        keeper.stdin.flush()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now; one may still be taken before its worker does."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(
        f"{count} free ports are needed between {_PORTS.start} and {_PORTS.stop}, but there are {len(found)}."
    )


def _describe(code: int) -> str:
    return f"ended with exit status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"


def _say(text: str) -> None:
    print(f"lmzoo launch: {text}", file=sys.stderr, flush=True)
