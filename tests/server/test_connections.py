"""Claims about clients that go away, and about the end of a server: nothing is lost or cut."""

import gc
import http.client
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from minllama.server.run import HttpServer
from tests.server.running import running

LONG = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}
SHORT = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}


@pytest.fixture
def slow(long_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    """A server whose steps take 10 ms, two sequences at a time, eight tokens a step."""
    with running(
        {"tiny": long_base}, max_sequences=2, token_budget=8, shutdown_timeout=20.0
    ) as server:
        engine = server.service.registry.get("tiny").engine
        forward = engine.forward

        def slowly(*args: Any, **options: Any) -> Any:
            time.sleep(0.01)
            return forward(*args, **options)

        monkeypatch.setattr(engine, "forward", slowly)
        yield server


def send(server: HttpServer, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request has been sent."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    length = f"Content-Length: {len(content)}"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n"
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(head.encode() + content)
    return connection


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.005)


def is_empty(server: HttpServer) -> bool:
    service = server.service
    all_jobs = list(service._worker._of_engine.values())
    return not (
        any(jobs.scheduler.is_busy or jobs.left or jobs.scheduler.nbytes for jobs in all_jobs)
        or service._jobs
        or service.n_in_flight
    )


def cancelled(server: HttpServer) -> int:
    metric = server.service.metrics.cancellations.labels("disconnected")
    return int(metric._value.get())


def scheduler(server: HttpServer) -> Any:
    all_jobs = list(server.service._worker._of_engine.values())
    return all_jobs[0].scheduler if all_jobs else None


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_while_tokens_come(slow: HttpServer, stream: bool) -> None:
    connection = send(slow, {**LONG, "stream": stream})
    until(lambda: scheduler(slow) and scheduler(slow).running)
    connection.close()
    until(lambda: is_empty(slow), 2)
    assert cancelled(slow) == 1


def test_a_client_that_goes_while_its_prompt_is_read(slow: HttpServer) -> None:
    connection = send(slow, {**LONG, "prompt": "word " * 500, "stream": True})
    until(lambda: scheduler(slow) and scheduler(slow)._prefill)
    assert not scheduler(slow).running
    connection.close()
    until(lambda: is_empty(slow), 2)
    assert cancelled(slow) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_while_it_waits(slow: HttpServer, stream: bool) -> None:
    others = [send(slow, {**LONG, "stream": True}) for _ in range(2)]
    until(lambda: scheduler(slow) and len(scheduler(slow).running) == 2)
    waiting = send(slow, {**LONG, "stream": stream})
    until(lambda: len(scheduler(slow).waiting) == 1)
    waiting.close()
    until(lambda: not scheduler(slow).waiting, 2)
    assert len(scheduler(slow).running) == 2
    for connection in others:
        connection.close()
    until(lambda: is_empty(slow), 2)


def test_nobody_notices_that_another_has_gone(slow: HttpServer) -> None:
    url = f"{slow.url}/v1/completions"
    expected = httpx.post(url, json={**SHORT, "max_tokens": 40}, timeout=30).json()["choices"]
    with ThreadPoolExecutor(1) as threads:
        kept = threads.submit(httpx.post, url, json={**SHORT, "max_tokens": 40}, timeout=30)
        for _ in range(6):
            connection = send(slow, {**LONG, "n": 1, "stream": True})
            time.sleep(0.03)
            connection.close()
        assert kept.result().json()["choices"] == expected
    until(lambda: is_empty(slow), 2)


def test_many_cut_connections_leave_nothing(slow: HttpServer) -> None:
    for _ in range(4):
        connections = [send(slow, {**LONG, "stream": True}) for _ in range(25)]
        time.sleep(0.05)
        for connection in connections:
            connection.close()
    until(lambda: is_empty(slow), 10)
    assert httpx.post(f"{slow.url}/v1/completions", json=SHORT, timeout=20).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_five_hundred_cut_connections_leave_no_memory(long_base: Path, stream: bool) -> None:
    with running({"tiny": long_base}, max_queue=1000, requests_per_second=0.0) as server:
        url = f"{server.url}/v1/completions"
        expected = httpx.post(url, json=SHORT, timeout=20).json()["choices"]
        held = []
        for _ in range(4):
            for cut_after in (250, 250):  # 64 of them are running, and the others wait
                connections = [send(server, {**LONG, "stream": stream}) for _ in range(cut_after)]
                until(lambda: scheduler(server).running and scheduler(server).waiting)
                for connection in connections:
                    connection.close()
                until(lambda: is_empty(server), 60)
            held.append((resident_bytes(), len(gc.get_objects())))
        assert cancelled(server) == 2000
        assert not server.service._worker._of_job
        assert not server.service._worker._held
        assert not server.service._worker._sent
        assert server.service._n_queued == 0
        # The first times fill caches; malloc takes an arena of 64 MB at a time.
        assert held[-1][0] - held[1][0] < 2**27, held
        assert held[-1][1] - held[1][1] < 5000, held  # 1,000 requests between them
        assert httpx.post(url, json=SHORT, timeout=20).json()["choices"] == expected


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_full_queue_is_told(long_base: Path) -> None:
    with running({"tiny": long_base}, max_sequences=1, max_queue=2) as server:
        block = threading.Event()
        server.service._worker.run(block.wait)
        waiting = [send(server, SHORT) for _ in range(2)]
        until(lambda: len(server.service._jobs) == 2)
        refused = httpx.post(f"{server.url}/v1/completions", json=SHORT)
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        block.set()
        for connection in waiting:
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200
            assert json.loads(answer.read())["choices"]
            answer.close()
            connection.close()


def test_a_server_that_ends_finishes_what_runs(slow: HttpServer) -> None:
    url = f"{slow.url}/v1/completions"
    body = {**LONG, "max_tokens": 60, "temperature": 0}
    with ThreadPoolExecutor(4) as threads:
        running_ = [
            threads.submit(httpx.post, url, json={**body, "stream": stream}, timeout=30)
            for stream in (True, False, True, False)  # two of them wait
        ]
        until(lambda: len(slow.service._jobs) == 4)
        slow.end()
        until(lambda: slow.service.state == "draining")
        refused = httpx.post(url, json=SHORT)
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        assert httpx.get(f"{slow.url}/ready").status_code == 503
        assert httpx.get(f"{slow.url}/health").status_code == 200
        answers = [future.result() for future in running_]
    assert all(answer.status_code == 200 for answer in answers)
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[::2])
    assert all(len(a.json()["choices"][0]["text"]) > 60 for a in answers[1::2])


def test_a_second_signal_ends_what_runs_with_an_error_event(slow: HttpServer) -> None:
    url = f"{slow.url}/v1/completions"
    with ThreadPoolExecutor(4) as threads:
        streams = [
            threads.submit(httpx.post, url, json={**LONG, "stream": True}, timeout=30)
            for _ in range(3)
        ]
        whole = threads.submit(httpx.post, url, json=LONG, timeout=30)
        until(lambda: len(slow.service._jobs) == 4 and scheduler(slow).running)
        slow.end()
        slow.end()
        started = time.monotonic()
        answers = [future.result() for future in streams]
        assert time.monotonic() - started < 3
        assert whole.result().status_code == 503
    for answer in answers:
        last = answer.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"]
        assert "[DONE]" not in answer.text


def test_the_time_to_finish_is_bounded(long_base: Path) -> None:
    with running({"tiny": long_base}, shutdown_timeout=0.3) as server:
        server.service._worker.run(lambda: time.sleep(1.5))
        with ThreadPoolExecutor(1) as threads:
            future = threads.submit(
                httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=30
            )
            until(lambda: server.service._jobs)
            server.end()
            assert future.result().status_code == 503


def test_health_is_told_while_prompts_are_read(slow: HttpServer) -> None:
    connections = [send(slow, {**LONG, "prompt": "word " * 900}) for _ in range(8)]
    until(lambda: scheduler(slow) and scheduler(slow).is_busy)
    slowest = 0.0
    with httpx.Client() as client:
        client.get(f"{slow.url}/health")
        for path in ("/health", "/ready", "/metrics") * 10:
            start = time.perf_counter()
            assert client.get(slow.url + path).status_code == 200
            slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.1
    for connection in connections:
        connection.close()
    until(lambda: is_empty(slow))


def test_a_body_that_never_comes_ends_in_bounded_time(long_base: Path) -> None:
    with running({"tiny": long_base}, request_seconds=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(1000)
