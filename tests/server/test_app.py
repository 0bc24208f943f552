"""Claims about what guards every route: keys, hosts, sizes, rates, and the form of errors."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from minllama.options.server import ServerOptions
from minllama.server.app import create_app
from minllama.server.auth import OPEN_PATHS, Keys
from minllama.server.registry import Registry
from minllama.server.run import HttpServer
from minllama.server.service import Service
from tests.server.running import running

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded(base: Path) -> Iterator[HttpServer]:
    options = {
        "cors_origin": ("https://page.example",),
        "max_body_bytes": 4096,
        "max_header_bytes": 8192,
        "max_json_depth": 8,
    }
    with running({"tiny": base}, keys=KEYS, **options) as server:
        yield server


def paths() -> list[tuple[str, str]]:
    """Method and path of every route that the application has."""
    app = create_app(Service(Registry({}), ServerOptions()))
    assert all(isinstance(route, Route) for route in app.routes), "a route hides others"
    return [
        (method, route.path.replace("{model:path}", "tiny"))
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    ]


def test_the_list_of_routes_is_not_empty() -> None:
    assert ("GET", "/v1/models") in paths()
    assert ("GET", "/v1/models/tiny") in paths()


@pytest.mark.parametrize(("method", "path"), paths())
def test_every_route_needs_a_key(guarded: HttpServer, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"}):
        status = httpx.request(method, guarded.url + path, headers=headers).status_code
        assert (status == 401) == (path not in OPEN_PATHS)
    for headers in ({"Authorization": f"Bearer {KEYS[1]}"}, {"X-API-Key": KEYS[0]}):
        assert httpx.request(method, guarded.url + path, headers=headers).status_code != 401


def test_a_path_that_is_none_needs_a_key_too(guarded: HttpServer) -> None:
    answer = httpx.get(f"{guarded.url}/no/such/path")
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_keys_are_compared_whole() -> None:
    keys = Keys.of(KEYS)
    assert keys.partition(b"first-key") != keys.partition(b"second-key")
    assert keys.partition(b"first-ke") is None
    assert keys.partition(b"") is None
    assert keys.partition(None) is None
    assert Keys().partition(None) == ""
    assert b"first-key" not in repr(keys).encode()


def test_models_are_listed_for_two_protocols(server: HttpServer) -> None:
    for path in ("/v1/models", "//v1//models", "/v1/models/"):
        answer = httpx.get(server.url + path)
        assert answer.status_code == 200
        content = answer.json()
        assert content["object"] == "list"
        (entry,) = content["data"]
        assert (entry["id"], entry["object"], entry["owned_by"]) == ("tiny", "model", "minllama")
        assert isinstance(entry["created"], int)
        (other,) = content["models"]
        assert other["name"] == "tiny"
        assert set(other) == {"name", "description", "release_date"}


def test_one_model_is_described(server: HttpServer) -> None:
    assert httpx.get(f"{server.url}/v1/models/tiny").json()["id"] == "tiny"
    answer = httpx.get(f"{server.url}/v1/models/other")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_a_server_of_this_machine_checks_the_host(server: HttpServer) -> None:
    port = server.url.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[::2]"):
        answer = httpx.get(f"{server.url}/health", headers={"Host": host})
        assert answer.status_code == 403
        assert "evil" not in answer.text


def test_preflight_requests_need_no_key(guarded: HttpServer) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    answer = httpx.options(
        f"{guarded.url}/v1/models", headers={"Origin": "https://page.example", **asks}
    )
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "https://page.example"
    other = httpx.options(
        f"{guarded.url}/v1/models", headers={"Origin": "https://other.example", **asks}
    )
    assert "Access-Control-Allow-Origin" not in other.headers


def test_cors_is_off_unless_origins_are_named(server: HttpServer) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://page.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_errors_before_the_routes_have_cors_headers(guarded: HttpServer) -> None:
    answer = httpx.get(f"{guarded.url}/v1/models", headers={"Origin": "https://page.example"})
    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == "https://page.example"


def test_large_bodies_are_refused_by_their_length_and_while_they_arrive(
    guarded: HttpServer,
) -> None:
    key = {"X-API-Key": KEYS[0]}
    url = f"{guarded.url}/v1/completions"
    assert httpx.post(url, content=b"x" * 5000, headers=key).status_code == 413
    parts = iter([b"x" * 1000] * 5)
    assert httpx.post(url, content=parts, headers=key).status_code == 413
    for length in ("99999999999999999999999", "-1"):
        with httpx.Client() as client:
            try:
                answer = client.post(url, content=b"{}", headers={**key, "Content-Length": length})
            except httpx.HTTPError:
                continue
            assert answer.status_code in (400, 413)


def test_large_headers_are_refused(guarded: HttpServer) -> None:
    for size in (8192, 70_000):
        answer = httpx.get(f"{guarded.url}/health", headers={"X-Much": "x" * size})
        assert answer.status_code in (400, 431)


def test_requests_a_second_are_bounded_for_each_key(base: Path) -> None:
    with running({"tiny": base}, keys=KEYS, requests_per_second=3.0) as server:
        url = f"{server.url}/v1/models"
        answers = [httpx.get(url, headers={"X-API-Key": KEYS[0]}) for _ in range(8)]
        statuses = [answer.status_code for answer in answers]
        assert statuses[:3] == [200] * 3
        assert 429 in statuses
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(url, headers={"X-API-Key": KEYS[1]}).status_code == 200
        watched = [httpx.get(f"{server.url}/health").status_code for _ in range(9)]
        assert watched == [200] * 9


def test_errors_have_the_form_of_the_path(server: HttpServer) -> None:
    openai = httpx.get(f"{server.url}/v1/nothing")
    assert openai.status_code == 404
    assert set(openai.json()["error"]) == {"message", "type", "param", "code"}
    ollama = httpx.get(f"{server.url}/api/nothing")
    assert ollama.status_code == 404
    assert isinstance(ollama.json()["error"], str)
    wrong = httpx.post(f"{server.url}/v1/models", json={})
    assert wrong.status_code == 405
    assert json.loads(wrong.text)["error"]["message"]


METRICS = {
    "minllama_requests_total",
    "minllama_request_seconds",
    "minllama_time_to_first_token_seconds",
    "minllama_time_between_tokens_seconds",
    "minllama_requests_in_flight",
    "minllama_queue_length",
    "minllama_sequences_running",
    "minllama_batch_size",
    "minllama_prompt_tokens_total",
    "minllama_cached_tokens_total",
    "minllama_prefix_cache_hits_total",
    "minllama_generated_tokens_total",
    "minllama_evaluated_texts_total",
    "minllama_evaluation_batch_size",
    "minllama_cache_bytes",
    "minllama_prefix_cache_bytes",
    "minllama_cancellations_total",
    "minllama_rejections_total",
}


def test_names_of_metrics_stay(server: HttpServer) -> None:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    types = [line.split() for line in lines if line.startswith("# TYPE")]
    names = {name for _, _, name, _ in types if not name.endswith("_created")}
    assert names == METRICS


def test_health_and_readiness_are_told(server: HttpServer) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    answer = httpx.get(f"{server.url}/ready")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
