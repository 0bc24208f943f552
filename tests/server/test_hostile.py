"""Claims about clients that mean ill: what they send and do harms nobody else."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minllama.server import run
from minllama.server.run import HttpServer
from tests.server.running import running

PROMPT = {"model": "tiny", "prompt": "Once", "max_tokens": 2}


@pytest.fixture
def impatient(long_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    """A server that waits for half a second."""
    monkeypatch.setattr(run, "KEEP_ALIVE_SECONDS", 0.5)
    with running({"tiny": long_base}) as server:
        yield server


def connect(server: HttpServer, buffer: int | None = None) -> socket.socket:
    """A connection; `buffer` are bytes that the system keeps of an answer before it is read."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(20)
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect((host, int(port)))
    return connection


def read(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            return found
        if not part:
            return found
        found += part


def request(body: Any, path: str = "/v1/completions", *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content


def sent(server: HttpServer, content: bytes) -> bytes:
    with connect(server) as connection:
        connection.sendall(content)
        return read(connection)


WRONG = [
    ("/v1/completions", {"model": "tiny", "prompt": [None] * 500_000}),
    ("/v1/completions", {"model": "tiny", "prompt": [-1] * 500_000}),
    ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): "x" for i in range(200_000)}}),
    ("/v1/chat/completions", {"model": "tiny", "messages": [1] * 500_000}),
    ("/v1/responses", {"model": "tiny", "input": [1] * 500_000}),
    ("/v1/decisions", {"model": "tiny", "input": "x", "questions": [{}] * 500_000}),
    ("/classify", {"model": "tiny", "input": [None] * 500_000}),
    ("/predict", {"inputs": [[1]] * 500_000}),
    ("/api/chat", {"model": "tiny", "messages": [{}] * 500_000}),
    (
        "/v1/systemone",
        {"model": "tiny", "state": "", "questions": {str(i): {} for i in range(200_000)}},
    ),
]


@pytest.mark.parametrize(("path", "body"), WRONG)
def test_a_million_wrong_values_are_one_error(
    server: HttpServer, path: str, body: dict[str, Any]
) -> None:
    content = json.dumps(body).encode()
    start = time.perf_counter()
    answer = httpx.post(server.url + path, content=content, timeout=60)
    assert time.perf_counter() - start < 5  # each took 5 to 60 seconds of the event loop
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 500


@pytest.mark.parametrize(
    "start",
    [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"POST /v1/completions HTTP/1.1\r\nHos"],
)
def test_a_head_that_does_not_come_ends_the_connection(impatient: HttpServer, start: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(start)
        begun = time.monotonic()
        assert read(connection) == b""
        assert time.monotonic() - begun < 5


def test_a_head_that_comes_byte_by_byte_gets_no_more_time(impatient: HttpServer) -> None:
    with connect(impatient) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
        end, is_open = time.monotonic() + 10, True
        while is_open and time.monotonic() < end:
            try:
                connection.sendall(b"G")
                time.sleep(0.05)
            except OSError:
                is_open = False
        assert not is_open


def test_a_body_that_comes_byte_by_byte_is_read(impatient: HttpServer) -> None:
    content = request(PROMPT, "/v1/completions", "Connection: close")
    with connect(impatient) as connection:
        for i in range(len(content)):
            connection.sendall(content[i : i + 1])
        time.sleep(0.1)
        assert read(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_nobody_reads_are_given_up(impatient: HttpServer, stream: bool) -> None:
    body = {**PROMPT, "prompt": ["x"] * 64, "n": 16, "stream": stream, "max_tokens": 8}
    body |= {"logprobs": 20, "ignore_eos": True}
    with connect(impatient, buffer=4096) as connection:
        connection.sendall(request(body))
        end = time.monotonic() + 60
        while not impatient.service._jobs and time.monotonic() < end:
            time.sleep(0.01)
        while impatient.service.n_in_flight and time.monotonic() < end:
            time.sleep(0.05)
        assert not impatient.service.n_in_flight
        assert not impatient.service._jobs
        time.sleep(1.5)
        assert len(read(connection)) < 2**22


HOSTS = [
    *("evil.example", "127.0.0.1.evil.example", "[::1]evil.example", "[::1", "[127.0.0.1", "::1]"),
    *("localhost:1@evil.example", "localhost,evil.example", "localhost evil.example", "0.0.0.0"),
    *("localhost/evil", "\xff", ":80", "a" * 3000, "[::1]:80:80"),
]


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_that_only_begin_well_are_refused(server: HttpServer, host: str) -> None:
    head = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    answer = sent(server, head.encode("latin-1"))
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"evil" not in answer


def test_a_target_with_a_host_counts_instead_of_the_header(server: HttpServer) -> None:
    """RFC 9112, sec. 3.2.2: proxies send `GET http://host/path`."""
    line = "GET http://%s/health HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
    assert sent(server, (line % ("localhost:80", "x")).encode()).startswith(b"HTTP/1.1 200 ")
    for target in ("evil.example", "evil@evil.example", ""):
        answer = sent(server, (line % (target, "localhost")).encode())
        assert answer.startswith(b"HTTP/1.1 403 ")


def test_a_request_of_two_lengths_is_not_read(server: HttpServer) -> None:
    both = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
    both += b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/models HTTP/1.1\r\n"
    answer = sent(server, both + b"Host: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("host", [b"localhost", b"evil.example"])
def test_a_body_that_turns_out_damaged_is_no_fault(
    server: HttpServer, host: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), connect(server) as connection:
        connection.sendall(CHUNKED % host)
        time.sleep(0.1)  # one of the two has its answer by now
        connection.sendall(b"zz\r\nqq\r\n")
        answer = read(connection)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 "))
    assert not caplog.records


KEYS = ("first-key", "second-key")
FACT = "The word is swordfish. " * 20
QUESTION = {"type": "predicate", "instructions": "Is it?"}
SHARING = {
    "/v1/completions": {"model": "tiny", "prompt": FACT, "max_tokens": 1},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": FACT}],
        "max_tokens": 1,
    },
    "/v1/responses": {"model": "tiny", "input": FACT, "max_output_tokens": 16},
    "/v1/decisions": {"model": "tiny", "input": FACT, "questions": [QUESTION]},
    "/v1/systemone": {
        "model": "tiny",
        "state": FACT,
        "questions": {"a": {"type": "noul", "instructions": "Is it?"}},
    },
}


def cached_in(answer: dict[str, Any]) -> int:
    """How many tokens of a request were in a cache, as each protocol says it."""
    if "x_cached_tokens" in answer:
        return int(answer["x_cached_tokens"])
    usage = answer["usage"]
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    return int(details["cached_tokens"])


def asked(url: str, body: dict[str, Any], key: str) -> Any:
    return httpx.post(url, json=body, headers={"X-API-Key": key}, timeout=30).json()


@pytest.mark.parametrize("path", SHARING)
def test_nobody_learns_what_another_key_has_asked(long_base: Path, path: str) -> None:
    with running({"tiny": long_base}, keys=KEYS) as server:
        found = [
            cached_in(asked(server.url + path, SHARING[path], key))
            for key in (KEYS[0], KEYS[0], KEYS[1], KEYS[1])
        ]
    assert found[1] > 16
    assert found[2] == found[0] == 0
    assert found[3] == found[1]


def test_what_is_too_much_is_refused_before_any_work(server: HttpServer) -> None:
    message = {"role": "user", "content": "x"}
    body = {"model": "tiny", "messages": [message] * 2000, "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "2000 messages" in answer.json()["error"]["message"]
