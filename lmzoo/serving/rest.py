"""TF Serving's REST API over HTTP/1.1, and a few fixed pages beside it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf import json_format

from lmzoo.serving.errors import ServingError, invalid
from lmzoo.serving.examples import check_method, read_examples, write_results
from lmzoo.serving.models import Models
from lmzoo.serving.tensors import parse_object, read_inputs, signature_name, write_outputs

_MODEL = r"/v1/models/(?P<model>[^/:]+)(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_ROUTES = {
    re.compile(rf"(?i){_MODEL}:(?P<verb>predict|classify|regress)"): "POST",
    re.compile(rf"(?i){_MODEL}/metadata"): "GET",
    re.compile(rf"(?i){_MODEL}"): "GET",
}
_MAX_VERSION = 2**63 - 1
_JSON = "application/json"
_DRAIN_SECONDS = 2.0
# Path -> content type and body.
Pages = Mapping[str, tuple[str, bytes]]


class Refusal(Exception):
    """A request that HTTP itself forbids.

    Args:
        status: of the response.
        message: one sentence.
        headers: of the response.
    """

    def __init__(self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


class RestServer(ThreadingHTTPServer):
    """A server with a thread a connection, of which there are `limits.max_connections` at most.

    Args:
        address: host and port; port 0 is any that is free.
        models: what is served.
        pages: what GET gives beside the API.
        allow_origin: whether pages of other servers may send requests (CORS).

    Raises:
        OSError: the address is taken, or not of this machine.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], models: Models, pages: Pages | None = None, allow_origin: bool = False
    ) -> None:
        self.models = models
        self.pages = dict(pages or {})
        self.allow_origin = allow_origin
        self._connections = threading.BoundedSemaphore(models.limits.max_connections)
        self._idle = threading.Condition()
        self._num_requests = 0
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise OSError(
                f"{address[0]}:{address[1]} cannot be listened on: {error.strerror}. Take another."
            ) from error

    def server_bind(self) -> None:
        """Binds without asking a name server who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a connection, or refuses it."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        body = _error_body("The server has as many connections as it takes: try again.")
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: {_JSON}\r\nContent-Length: {len(body)}\r\n"
        with contextlib.suppress(OSError):
            request.settimeout(1.0)
            request.sendall(f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n".encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    @contextlib.contextmanager
    def request_running(self) -> Iterator[None]:
        """What `drain` waits for."""
        with self._idle:
            self._num_requests += 1
        try:
            yield
        finally:
            with self._idle:
                self._num_requests -= 1
                self._idle.notify_all()

    def drain(self, seconds: float) -> None:
        """Waits until no request runs, but no longer than so many seconds."""
        with self._idle:
            self._idle.wait_for(lambda: not self._num_requests, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that hang up, and shows anything else."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "lmzoo-serve"
    sys_version = ""
    disable_nagle_algorithm = True
    server: RestServer

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.models.limits.timeout_seconds)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers in JSON what the base class finds wrong with a request, and hangs up."""
        self.close_connection = True
        self.request_version = self.protocol_version  # What could not be parsed has none.
        self._send(code, _error_body(message or HTTPStatus(code).phrase), {"Connection": "close"})

    def _answer(self) -> None:
        with self.server.request_running():
            self._answer_any()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _answer

    def _answer_any(self) -> None:
        """Answers any request; an error is a JSON object with the key "error"."""
        try:
            kind, body = self._respond()
        except Refusal as refusal:
            self._refuse(refusal)
        except ServingError as error:
            self._send(error.http_status, _error_body(str(error)))
        except TimeoutError:
            self._refuse(Refusal(HTTPStatus.REQUEST_TIMEOUT, "The rest of the request did not come."))
        except ConnectionError:
            self.close_connection = True
        except Exception as error:
            traceback.print_exc()
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, _error_body(f"{type(error).__name__}: {error}"))
        else:
            self._send(HTTPStatus.OK, body, {"Content-Type": kind})

    def _refuse(self, refusal: Refusal) -> None:
        """Answers without having read the body, and then reads a little, or the client would not see the answer."""
        self.close_connection = True
        self._send(refusal.status, _error_body(str(refusal)), {**refusal.headers, "Connection": "close"})
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_DRAIN_SECONDS)
            end = time.monotonic() + _DRAIN_SECONDS
            while time.monotonic() < end and self.rfile.read1(2**16):
                pass

    def _respond(self) -> tuple[str, bytes]:
        """Content type and body of the answer."""
        path = self.path.partition("?")[0]
        if self.command == "OPTIONS" and self.server.allow_origin:
            self._body()
            return _JSON, b"{}"
        if path in self.server.pages:
            self._expect("GET")
            return self.server.pages[path]
        for pattern, method in _ROUTES.items():
            match = pattern.fullmatch(path)
            if match:
                self._expect(method)
                return _JSON, self._api(match.groupdict())
        raise Refusal(HTTPStatus.NOT_FOUND, f"Malformed request: {self.command} {path[:200]}")

    def _expect(self, method: str) -> None:
        if self.command not in (method, *(["HEAD"] if method == "GET" else [])):
            raise Refusal(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is not for {self.path[:200]}.", {"Allow": method}
            )

    def _api(self, asked: dict[str, str | None]) -> bytes:
        body = self._body()
        version = None if asked["version"] is None else int(asked["version"][:20])
        if version is not None and version > _MAX_VERSION:
            raise invalid(f"Failed to convert version: {version} to numeric.")
        models, name, label = self.server.models, str(asked["model"]), asked["label"] or ""
        verb = (asked.get("verb") or "").lower()
        if verb == "predict":
            return predict(models, name, version, label, body)
        if verb:
            return classify_or_regress(models, name, version, label, verb, body)
        if self.path.partition("?")[0].lower().endswith("/metadata"):
            return metadata(models, name, version, label)
        return status(models, name, version)

    def _body(self) -> bytes:
        """The body of the request, all of it, of a size that is said before and allowed."""
        if self.headers.get("Transfer-Encoding"):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "The body must come with Content-Length, not in chunks.")
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must not be compressed.")
        lengths = self.headers.get_all("Content-Length", ["0"] if self.command != "POST" else [])
        if not lengths:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "The request has no Content-Length.")
        if len(set(lengths)) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
            raise Refusal(
                HTTPStatus.BAD_REQUEST, f"Content-Length is {', '.join(lengths)[:80]!r}, but must be one number."
            )
        length, limit = int(lengths[0]), self.server.models.limits.max_request_bytes
        if length > limit:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body has {length} bytes, but may have {limit}.")
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the client hung up in the middle of its request")
        return body

    def _send(self, code: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        headers = {"Content-Type": _JSON, "Content-Length": str(len(body)), **(headers or {})}
        if self.server.allow_origin:
            headers |= {
                "Access-Control-Allow-Origin": "*",
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Allow-Headers": "Content-Type",
            }
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)


def predict(models: Models, name: str, version: int | None, label: str, body: bytes) -> bytes:
    """The answer to `:predict`.

    Raises:
        ServingError: the request cannot be answered.
    """
    request = parse_object(body)
    signature = signature_name(request)
    with models[name].use(version, label) as (_, servable):
        inputs, in_rows = read_inputs(request, servable.signature(signature).inputs)
        with models.turn():
            outputs = servable.run(signature, inputs, seconds=models.limits.timeout_seconds)
    return write_outputs(outputs, in_rows)


def classify_or_regress(models: Models, name: str, version: int | None, label: str, verb: str, body: bytes) -> bytes:
    """The answer to `:classify` or `:regress`.

    Raises:
        ServingError: the request cannot be answered, as by any signature that lmzoo exports.
    """
    request = parse_object(body)
    signature = signature_name(request)
    with models[name].use(version, label) as (_, servable):
        check_method(servable.signature(signature), verb)
        inputs = read_examples(request)
        with models.turn():
            outputs = servable.run(signature, inputs, seconds=models.limits.timeout_seconds)
    return write_results(outputs, verb)


def metadata(models: Models, name: str, version: int | None, label: str) -> bytes:
    """The answer to `/metadata`: the signatures of a version.

    Raises:
        ServingError: it is not served.
    """
    with models[name].use(version, label) as (number, servable):
        signatures = {key: _as_dict(value) for key, value in servable.signatures.items()}
    spec = {"name": name, "signature_name": "", "version": str(number)}
    return _dumped({"model_spec": spec, "metadata": {"signature_def": {"signature_def": signatures}}})


def status(models: Models, name: str, version: int | None) -> bytes:
    """The answer to a request for the state of a model, or of one version of it.

    Raises:
        ServingError: there is none.
    """
    told = [
        {
            "version": str(each.version),
            "state": each.state,
            "status": {"error_code": each.code.name, "error_message": each.message},
        }
        for each in models[name].statuses(version)
    ]
    return _dumped({"model_version_status": told})


def _as_dict(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _error_body(message: str) -> bytes:
    return _dumped({"error": message})


@contextlib.contextmanager
def running(server: RestServer) -> Iterator[str]:
    """Serves in a thread; gives the address as a URL. At the end no new connections are taken."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    host, port = server.server_name, server.server_port
    try:
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
