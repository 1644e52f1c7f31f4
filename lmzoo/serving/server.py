"""A development server that answers as TF Serving does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from lmzoo.export import saved_versions
from lmzoo.serving import rest
from lmzoo.serving.models import Limits, Models, ServedModel
from lmzoo.serving.protos import has_serving_api

_HOST = "127.0.0.1"
_DRAIN_SECONDS = 10.0
_SIGNAL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where a server listens: the URL of its REST API, and host and port of gRPC, None without it."""

    rest: str
    grpc: str | None


@contextlib.contextmanager
def model_server(
    bundles: Sequence[Path],
    *,
    host: str = _HOST,
    rest_port: int = 0,
    grpc_port: int | None = 0,
    poll_seconds: float = 1.0,
    limits: Limits | None = None,
    pages: rest.Pages | None = None,
    allow_origin: bool = False,
) -> Iterator[Addresses]:
    """Serves the newest version of each bundle while the context lasts, and newer ones as they come.

    Args:
        bundles: directories of numbered SavedModels. A model is named as its directory.
        host: address to listen on.
        rest_port: 0 is any that is free, as for the next one.
        grpc_port: None is no gRPC, for which the extra `serving` is needed.
        poll_seconds: time between two looks for a newer version.
        limits: of requests.
        pages: what GET gives beside the API.
        allow_origin: whether pages of other servers may send requests (CORS).

    Raises:
        FileNotFoundError, ValueError: a bundle is missing, has no version, or one that cannot be loaded.
        OSError: a port is taken.
    """
    limits = limits or Limits()
    models = Models({name: ServedModel(name, path, limits) for name, path in _named(bundles).items()}, limits)
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.callback(model.close)
            model.poll()
            (newest, *_) = model.statuses()
            if newest.state != "AVAILABLE":
                raise ValueError(f"{model.directory / str(newest.version)} cannot be loaded: {newest.message}")
            model.watch(poll_seconds)
        address = None
        if grpc_port is not None:
            from lmzoo.serving import rpc

            address = f"{host}:{stack.enter_context(rpc.running(models, host, grpc_port))}"
        server = rest.RestServer((host, rest_port), models, pages, allow_origin)
        stack.callback(server.drain, _DRAIN_SECONDS)
        yield Addresses(stack.enter_context(rest.running(server)), address)


def _named(bundles: Sequence[Path]) -> dict[str, Path]:
    """Directories by the names of their models."""
    if not bundles:
        raise ValueError("there is no bundle to serve: give the directory of one or more, such as saved_models/gpt.")
    named: dict[str, Path] = {}
    for bundle in map(Path.resolve, map(Path, bundles)):
        if not bundle.is_dir():
            raise FileNotFoundError(f"{bundle} is no directory: give one that `lmzoo export` wrote to.")
        if (bundle / "saved_model.pb").is_file():
            raise ValueError(f"{bundle} is one version: give {bundle.parent}, which holds the versions.")
        if not saved_versions(bundle):
            raise ValueError(f"{bundle} has no numbered version: export one with `lmzoo export CHECKPOINT {bundle}`.")
        if bundle.name in named:
            raise ValueError(f"{named[bundle.name]} and {bundle} have one name, so requests could not tell them apart.")
        named[bundle.name] = bundle
    return named


def serve(
    bundles: Sequence[Path],
    *,
    host: str = _HOST,
    rest_port: int = 8501,
    grpc_port: int | None = 8500,
    poll_seconds: float = 1.0,
    limits: Limits | None = None,
    allow_origin: bool = False,
) -> None:
    """Serves until SIGINT or SIGTERM, and prints where. The arguments are those of `model_server`.

    Without the extra `serving` there is no gRPC.

    Raises:
        FileNotFoundError, ValueError, OSError: as `model_server`.
    """
    if grpc_port is not None and not has_serving_api():
        print("no gRPC: pip install 'lmzoo[serving]' brings it")
        grpc_port = None
    with (
        _until_signalled() as wait,
        model_server(
            bundles,
            host=host,
            rest_port=rest_port,
            grpc_port=grpc_port,
            poll_seconds=poll_seconds,
            limits=limits,
            allow_origin=allow_origin,
        ) as addresses,
    ):
        print("This server is for development. In production run TF Serving, which answers the same requests:")
        for name, path in _named(bundles).items():
            print(
                f'  tensorflow_model_server --rest_api_port={rest_port} --model_name={name} --model_base_path="{path}"'
            )
        for name in _named(bundles):
            print(f"{addresses.rest}/v1/models/{name}")
        if addresses.grpc:
            print(f"gRPC on {addresses.grpc}")
        print("Ctrl-C ends it.", flush=True)
        wait()


def demo(
    bundles: Sequence[Path] = (),
    *,
    server: str | None = None,
    models: Sequence[str] = (),
    host: str = _HOST,
    port: int = 8080,
    limits: Limits | None = None,
) -> None:
    """Shows a page to try models on, until SIGINT or SIGTERM.

    Args:
        bundles: as for `model_server`; their server also gives the page. None of them with `server`.
        server: URL of a server that runs elsewhere, which the page talks to by itself, so that it must allow requests
            from other origins (`--rest_api_enable_cors_support` of TF Serving).
        models: names of the models of that server.
        host: address of the page.
        port: of the page.
        limits: of requests.

    Raises:
        ValueError: there are both bundles and a server, or neither, or no names of models.
        FileNotFoundError, OSError: as `model_server`.
    """
    if bool(bundles) == bool(server):
        raise ValueError("a page shows bundles or a server: give directories of bundles, or --server and --models.")
    if server and not models:
        raise ValueError(f"{server} does not tell which models it has: name them with --models.")
    with _until_signalled() as wait, contextlib.ExitStack() as stack:
        if server:
            none = Models({}, limits or Limits())
            page_server = rest.RestServer((host, port), none, demo_pages(models, server))
            url = stack.enter_context(rest.running(page_server))
        else:
            pages = demo_pages(_named(bundles))
            addresses = stack.enter_context(
                model_server(bundles, host=host, rest_port=port, grpc_port=None, limits=limits, pages=pages)
            )
            url = addresses.rest
        print(f"Open {url}/ in a browser. Ctrl-C ends it.", flush=True)
        wait()


def demo_pages(models: Sequence[str] | dict[str, Path], server: str = "") -> rest.Pages:
    """The page, and the file in which it finds its models and their server; "" is the one that it came from."""
    page = files("lmzoo.serving").joinpath("page.html").read_bytes()
    config = {"server": server.rstrip("/"), "models": list(models)}
    return {"/": ("text/html; charset=utf-8", page), "/config.json": ("application/json", json.dumps(config).encode())}


@contextlib.contextmanager
def _until_signalled() -> Iterator[Callable[[], None]]:
    """A function that returns after SIGINT or SIGTERM.

    The handler sets a flag and nothing else: whatever takes a lock could wait for the thread that it interrupts.
    """
    received: list[int] = []

    def wait() -> None:
        while not received:
            time.sleep(_SIGNAL_SECONDS)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda received_, _: received.append(received_)) for number in numbers}
    try:
        yield wait
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
