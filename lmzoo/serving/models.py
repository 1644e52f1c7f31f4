"""The models of a server: each has the newest version of its directory loaded, and changes it while it is used."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from lmzoo.export import saved_versions
from lmzoo.serving.errors import Code, ServingError, invalid
from lmzoo.serving.protos import replay_warmup
from lmzoo.serving.servable import Servable

# As TF Serving: a version that cannot be loaded is tried again so often.
_MAX_TRIES = 5
# Versions that are no longer served and of which the state is still told.
_MAX_PAST = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a development server lets a request take.

    Args:
        max_request_bytes: Of a request's body, or of a message of gRPC.
        max_rows: Rows of an input.
        max_concurrency: Requests that run at a time.
        max_connections: Connections over HTTP, or calls of gRPC; further ones are refused at once.
        queue_seconds: How long a request waits for its turn.
        timeout_seconds: How long a request runs, and how long a client may be silent.
    """

    max_request_bytes: int = 16 * 2**20
    max_rows: int = 256
    max_concurrency: int = 4
    max_connections: int = 64
    queue_seconds: float = 30.0
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name} is {value!r}, but must be above 0.")


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    """What TF Serving tells of a version: its state, and the error that it ended with."""

    version: int
    state: str
    code: Code = Code.OK
    message: str = ""


class _Loaded:
    """A version that is served, and how many requests use it."""

    def __init__(self, version: int, servable: Servable) -> None:
        self.version = version
        self.servable = servable
        self.num_users = 0
        self.is_retired = False


class ServedModel:
    """The newest version in a directory. `poll` loads a newer one, which takes over when it is ready.

    Requests that run go on with the version that they began with, which is unloaded after the last of them.

    Args:
        name: in the paths of requests.
        directory: of the versions.
        limits: of requests, those that warm a version up too.
    """

    def __init__(self, name: str, directory: Path, limits: Limits | None = None) -> None:
        self.name = name
        self.directory = directory
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._current: _Loaded | None = None
        self._statuses: dict[int, VersionStatus] = {}
        self._num_tries: dict[int, int] = {}
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    def poll(self) -> None:
        """Loads the newest version if it is not loaded. One that cannot be loaded is told of in the statuses."""
        versions = saved_versions(self.directory)
        if not versions or (self._current is not None and self._current.version == versions[-1]):
            return
        newest = versions[-1]
        if self._num_tries.get(newest, 0) >= _MAX_TRIES:
            return
        self._num_tries[newest] = self._num_tries.get(newest, 0) + 1
        self._tell(VersionStatus(newest, "LOADING"))
        servable = None
        try:
            servable = Servable(self.directory / str(newest), self._limits.max_rows)
            replay_warmup(servable, self._limits.timeout_seconds)
        except Exception as error:  # Whatever a broken version does, the one before is served on.
            if servable is not None:
                servable.close()
            code = error.code if isinstance(error, ServingError) else Code.INTERNAL
            self._tell(VersionStatus(newest, "END", code, str(error) or type(error).__name__))
        else:
            self._replace(_Loaded(newest, servable))

    def watch(self, seconds: float) -> None:
        """Polls every so many seconds, in a thread, until `close`."""

        def look() -> None:
            while not self._stop.wait(seconds):
                with contextlib.suppress(OSError):  # The directory is away for the moment.
                    self.poll()

        self._watcher = threading.Thread(target=look, name=f"watch {self.name}", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Stops watching, and unloads the version when no request uses it any more."""
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join()
        self._replace(None)

    @contextlib.contextmanager
    def use(self, version: int | None = None, label: str = "") -> Iterator[tuple[int, Servable]]:
        """The number of the version that a request wants, by default the newest, and what runs it.

        Raises:
            ServingError: it is not served.
        """
        if label:
            raise invalid(f"Unrecognized servable version label: {label}")
        with self._lock:
            loaded = self._current
            if loaded is None or version not in (None, loaded.version):
                asked = f"Latest({self.name})" if version is None else f"Specific({self.name}, {version})"
                raise ServingError(Code.NOT_FOUND, f"Servable not found for request: {asked}")
            loaded.num_users += 1
        try:
            yield loaded.version, loaded.servable
        finally:
            with self._lock:
                loaded.num_users -= 1
            self._unload_unused(loaded)

    def statuses(self, version: int | None = None) -> list[VersionStatus]:
        """What became of the versions that were seen, newest first.

        Raises:
            ServingError: there is none, or not this one.
        """
        with self._lock:
            found = [status for status in self._statuses.values() if version in (None, status.version)]
        if not found:
            which = "any versions" if version is None else f"version {version}"
            raise ServingError(Code.NOT_FOUND, f"Could not find {which} of model {self.name}")
        return sorted(found, key=lambda status: status.version, reverse=True)

    def _replace(self, loaded: _Loaded | None) -> None:
        with self._lock:
            before, self._current = self._current, loaded
            if before is not None:
                before.is_retired = True
        if loaded is not None:
            self._tell(VersionStatus(loaded.version, "AVAILABLE"))
        if before is not None:
            self._tell(VersionStatus(before.version, "UNLOADING"))
            self._unload_unused(before)

    def _unload_unused(self, loaded: _Loaded) -> None:
        with self._lock:
            is_last = loaded.is_retired and not loaded.num_users
            loaded.is_retired = loaded.is_retired and not is_last  # So that it is closed once.
        if is_last:
            loaded.servable.close()
            self._tell(VersionStatus(loaded.version, "END"))

    def _tell(self, status: VersionStatus) -> None:
        with self._lock:
            self._statuses[status.version] = status
            past = sorted(number for number, each in self._statuses.items() if each.state == "END")
            for number in past[:-_MAX_PAST]:
                del self._statuses[number]


class Models:
    """All models of a server, and whose turn it is to run.

    Args:
        models: by name.
        limits: of their requests.
    """

    def __init__(self, models: Mapping[str, ServedModel], limits: Limits) -> None:
        self._models = dict(models)
        self.limits = limits
        self._turns = threading.BoundedSemaphore(limits.max_concurrency)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def __getitem__(self, name: str) -> ServedModel:
        if name not in self._models:
            raise ServingError(Code.NOT_FOUND, f"Could not find any versions of model {name}")
        return self._models[name]

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Waits until less than `max_concurrency` requests run.

        Raises:
            ServingError: it took too long.
        """
        if not self._turns.acquire(timeout=self.limits.queue_seconds):
            raise ServingError(
                Code.UNAVAILABLE, f"The server is busy: no turn came in {self.limits.queue_seconds:g} s. Try again."
            )
        try:
            yield
        finally:
            self._turns.release()
