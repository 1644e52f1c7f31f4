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
_LIMITS = Limits()


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
    limits: Limits = _LIMITS,
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
    bundle: tuple[Path, ...],
    /,
    *,
    host: str = _HOST,
    rest_port: int = 8501,
    grpc_port: int | None = 8500,
    poll_seconds: float = 1.0,
    allow_origin: bool = False,
    limits: Limits = _LIMITS,
) -> None:
    """Serve SavedModels on this machine as TF Serving would, to develop against; production is TF Serving itself.

    It ends at SIGINT or SIGTERM. gRPC needs the extra `serving`.

    Args:
        bundle: Directories that `lmzoo export` wrote to, such as saved_models/gpt. The newest version is served, and a
            newer one as soon as it is there.
        host: Address to listen on; by default no other machine reaches it.
        rest_port: Of the REST API; 0 is any that is free, as for the next one.
        grpc_port: Of gRPC, or None.
        poll_seconds: Time between two looks for a newer version.
        allow_origin: Whether pages of other servers may send requests (CORS).
        limits: What a request may take.

    Raises:
        FileNotFoundError, ValueError, OSError: As `model_server`.
    """
    if grpc_port is not None and not has_serving_api():
        print("no gRPC: pip install 'lmzoo[serving]' brings it")
        grpc_port = None
    with (
        _until_signalled() as wait,
        model_server(
            bundle,
            host=host,
            rest_port=rest_port,
            grpc_port=grpc_port,
            poll_seconds=poll_seconds,
            limits=limits,
            allow_origin=allow_origin,
        ) as addresses,
    ):
        print("This server is for development. In production run TF Serving, which answers the same requests:")
        for name, path in _named(bundle).items():
            print(
                f'  tensorflow_model_server --rest_api_port={rest_port} --model_name={name} --model_base_path="{path}"'
            )
        for name in _named(bundle):
            print(f"{addresses.rest}/v1/models/{name}")
        if addresses.grpc:
            print(f"gRPC on {addresses.grpc}")
        print("Ctrl-C ends it.", flush=True)
        wait()


def demo(
    bundle: tuple[Path, ...] = (),
    /,
    *,
    server: str | None = None,
    models: tuple[str, ...] = (),
    host: str = _HOST,
    port: int = 8080,
    limits: Limits = _LIMITS,
) -> None:
    """Show a page to try SavedModels on in a browser. It ends at SIGINT or SIGTERM.

    Args:
        bundle: Directories that `lmzoo export` wrote to; they are served beside the page.
        server: URL of a TF Serving that runs already, in their place. The page talks to it by itself, so it must be
            started with --rest_api_enable_cors_support.
        models: Names of the models of that server.
        host: Address of the page; by default no other machine reaches it.
        port: Of the page; 0 is any that is free.
        limits: What a request may take.

    Raises:
        ValueError: There are both bundles and a server, or neither, or no names of models.
        FileNotFoundError, OSError: As `model_server`.
    """
    if bool(bundle) == bool(server):
        raise ValueError("a page shows bundles or a server: give directories of bundles, or --server and --models.")
    if server and not models:
        raise ValueError(f"{server} does not tell which models it has: name them with --models.")
    with _until_signalled() as wait, contextlib.ExitStack() as stack:
        if server:
            none = Models({}, limits)
            page_server = rest.RestServer((host, port), none, demo_pages(models, server))
            url = stack.enter_context(rest.running(page_server))
        else:
            pages = demo_pages(list(_named(bundle)))
            addresses = stack.enter_context(
                model_server(bundle, host=host, rest_port=port, grpc_port=None, limits=limits, pages=pages)
            )
            url = addresses.rest
        print(f"Open {url}/ in a browser. Ctrl-C ends it.", flush=True)
        wait()


def demo_pages(models: Sequence[str], server: str = "") -> rest.Pages:
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
