"""A client of the server under test that leaves nothing to libraries: what is sent is what a test says."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit


def send(
    url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, Any]:
    """Status, body and headers of the answer, over a connection of its own."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def call(url: str, path: str, request: Any = None) -> tuple[int, Any]:
    """Status and JSON of the answer to a GET, or to a POST of a JSON value or of bytes."""
    body = request if isinstance(request, bytes) or request is None else json.dumps(request).encode()
    status, answer, headers = send(url, "GET" if request is None else "POST", path, body)
    assert headers["Content-Type"] == "application/json"
    return status, json.loads(answer)
