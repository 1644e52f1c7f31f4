"""Thousands of random requests, most of them bad: each is answered with the right status, and memory stays as it is.

LMZOO_TEST_FUZZ sets how many.
"""

import json
import os
import random
import socket
import string
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from client import send
from server_process import started
from tiny_bundles import export_all

NUM_REQUESTS = int(os.environ.get("LMZOO_TEST_FUZZ", "300"))
MAX_BYTES = 20_000
MAX_ROWS = 16
MAX_SECONDS = 60
NUM_PARTS = 10
MAX_GROWTH = 8 * 2**20
LEAVES = [
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    -(2**63),
    2**70,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "\x00",
    {},
    [],
    "é" * 50,
]
# What each input of `generate` may be asked for, however absurd; all have their type and are answered.
ABSURD = {
    "seed": [-(2**63), -1, 0, 2**63 - 1],
    "max_new_tokens": [-(2**31), 0, 1, 2**31 - 1],
    "temperature": [-1.0, 0.0, 1e38, float("nan"), float("inf"), 1e-40],
    "top_k": [-(2**31), 0, 2**31 - 1],
    "top_p": [-1.0, 0.0, 2.0, float("nan"), float("-inf")],
}


class Fuzzer:
    """Random requests, each a function of its number: method, path, body, headers and the statuses that may come."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)

    def request(self):
        kinds = [self.valid, self.absurd, self.mutated, self.noise, self.inputs, self.value, self.rows, self.names]
        kinds += [self.paths, self.methods, self.large, self.deep, self.lengths, self.ids]
        return self.random.choice(kinds)()

    def predict(self, body, statuses, model="generator", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return "POST", f"/v1/models/{model}:predict", body, headers, statuses

    def text(self):
        kind = self.random.randrange(4)
        if kind == 0:
            return "".join(self.random.choices(string.printable, k=self.random.randrange(60)))
        if kind == 1:
            return "".join(chr(self.random.randrange(0xD800)) for _ in range(self.random.randrange(30)))
        if kind == 2:
            return {"b64": "".join(self.random.choices(string.ascii_letters, k=4 * self.random.randrange(9)))}
        return "the [MASK] " * self.random.randrange(60)

    def texts(self):
        return [self.text() for _ in range(self.random.randint(1, 4))]

    def generate(self):
        rows = self.random.randint(1, 3)
        values = {name: self.random.choice(choices) for name, choices in ABSURD.items()}
        return {"text": [self.text() for _ in range(rows)], **{name: [value] for name, value in values.items()}}

    def valid(self):
        model = self.random.choice(["generator", "filler", "classifier"])
        return self.predict({self.random.choice(["instances", "inputs"]): self.texts()}, {200}, model)

    def absurd(self):
        return self.predict({"signature_name": "generate", "inputs": self.generate()}, {200})

    def ids(self):
        ids = [[self.random.choice([0, 5, 299, 300, -1, 2**31 - 1]) for _ in range(self.random.randint(1, 60))]]
        return self.predict({"signature_name": "tokens", "inputs": ids}, {200, 400})

    def mutated(self):
        body = bytearray(json.dumps({"signature_name": "generate", "inputs": self.generate()}).encode())
        for _ in range(self.random.randint(1, 5)):
            place = self.random.randrange(len(body))
            if self.random.random() < 0.5:
                body[place] = self.random.randrange(256)
            else:
                del body[place : place + self.random.randrange(20)]
            body = body or bytearray(b"{")
        return self.predict(bytes(body), {200, 400})

    def noise(self):
        return self.predict(b"\xff" + self.random.randbytes(self.random.randrange(500)), {400})

    def inputs(self):
        inputs = self.generate()
        if self.random.random() < 0.5:
            del inputs[self.random.choice(list(inputs))]
        else:
            inputs[self.random.choice(["extra", "", "\x00", "text\n"])] = self.random.choice(LEAVES[:4])
        return self.predict({"signature_name": "generate", "inputs": inputs}, {400})

    def value(self):
        inputs = self.generate()
        name = self.random.choice(list(inputs))
        wrong = {"text": [1, None, [["a"]], [[]], {"b64": "!"}], "seed": [1.5, 2**63, "1"], "top_k": [0.5, 2**31, None]}
        inputs[name] = [self.random.choice(wrong.get(name, [None, "a", {}, [1]]))]
        return self.predict({"signature_name": "generate", "inputs": inputs}, {400})

    def rows(self):
        if self.random.random() < 0.5:
            return self.predict({"instances": ["a"] * self.random.randint(MAX_ROWS + 1, 900)}, {400})
        columns = {"token_ids": [[1, 2]] * 2, "padding_mask": [[True]], "token_type_ids": [[0, 0]]}
        return self.predict({"signature_name": "tokens", "inputs": columns}, {200, 400}, "filler")

    def names(self):
        request = {self.random.choice(["instances", "inputs", "input", ""]): self.random.choice(LEAVES)}
        if request.get("inputs") == []:
            request["inputs"] = [[[]]]  # No rows are no error.
        request["signature_name"] = self.random.choice(["generate", "tokens", "none", "", None, 1, []])
        return self.predict(request, {400})

    def paths(self):
        path = "/" + "".join(self.random.choices("v1/models:predict%.?#&é\x7f", k=self.random.randrange(200)))
        safe = path.encode("utf-8").decode("latin-1").replace("\x7f", "~")
        return "GET", safe.encode("ascii", "replace").decode(), None, {}, {404}

    def methods(self):
        method = self.random.choice(["PUT", "DELETE", "PATCH", "GET", "OPTIONS", "TRACE", "BREW"])
        return method, "/v1/models/generator:predict", None, {}, {501 if method == "BREW" else 405}

    def large(self):
        return self.predict({"instances": ["x" * self.random.randint(MAX_BYTES, 10 * MAX_BYTES)]}, {413})

    def deep(self):
        depth = self.random.randint(20, 9000)
        return self.predict(b'{"inputs": ' + b"[" * depth + b"]" * depth + b"}", {400})

    def lengths(self):
        length = self.random.choice(["-1", "1e3", "", "0x10", "99999999999999999999", "1, 2"])
        return self.predict(b"{}", {400}, **{"Content-Length": length})


def answer(url, number):
    """What is wrong with the answer to a request, or None."""
    method, path, body, headers, statuses = Fuzzer(number).request()
    start = time.monotonic()
    status, content, _ = send(url, method, path, body, headers)
    try:
        value = json.loads(content)
    except ValueError:
        return f"{number}: {status} {content[:200]!r} is no JSON"
    if status not in statuses:
        return f"{number}: {status} instead of {statuses}: {method} {path} {body and body[:300]!r}: {content[:300]!r}"
    if (status != 200) != ("error" in value) or (status != 200 and not value["error"]):
        return f"{number}: {status} {content[:200]!r}"
    seconds = time.monotonic() - start
    return f"{number}: took {seconds:.0f} s" if seconds > MAX_SECONDS else None


def hang_up(url, number):
    """Sends part of a request, or bytes that are none, and goes away."""
    address = urlsplit(url)
    head = b"POST /v1/models/generator:predict HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"
    noise = random.Random(number).randbytes(200)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall((head, noise, head[:20])[number % 3])


@pytest.mark.slow
def test_random_requests_are_answered_and_memory_stays(tmp_path):
    bundles = export_all(tmp_path, ("generator", "filler", "classifier")).values()
    limits = ("--max-request-bytes", MAX_BYTES, "--max-rows", MAX_ROWS)
    with started("serve", *bundles, "--rest-port", 0, "--grpc-port", None, *limits) as server:

        def ask(number):
            if number % 20 == 0:
                hang_up(server.url, number)
            return answer(server.url, number)

        faults, memory = [], []
        with ThreadPoolExecutor(4) as pool:
            for part in range(NUM_PARTS):
                numbers = range(part * NUM_REQUESTS // NUM_PARTS, (part + 1) * NUM_REQUESTS // NUM_PARTS)
                faults += filter(None, pool.map(ask, numbers))
                memory.append(server.memory())
        print(f"{NUM_REQUESTS} requests; MiB after each part: {[size // 2**20 for size in memory]}")
        assert not faults, "\n".join(faults[:20])
        assert memory[-1] - memory[NUM_PARTS // 2] < MAX_GROWTH
        assert send(server.url, "GET", "/v1/models/generator")[0] == 200
