"""Claims about requests of any content: all are answered, as their protocols have it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minllama.server.errors import INTERNAL
from minllama.server.routes import ollama, ollama_embed, ollama_models, responses, tokenize
from minllama.server.run import HttpServer
from tests.server.running import running

TALK = [{"role": "user", "content": "Say"}]
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
CHAT_TOOL = {"type": "function", "function": TOOL}
CALL = {"id": "c", "function": {"name": "f", "arguments": {"a": 1}}}
BODIES: dict[str, dict[str, Any]] = {
    "/api/generate": {
        "model": "tiny",
        "prompt": "Say",
        "system": "s",
        "raw": False,
        "context": [5, 6],
        "suffix": "",
        "template": "",
        "images": [],
        "format": {"type": "object"},
        "stream": False,
        "keep_alive": "5m",
        "think": False,
        "logprobs": True,
        "top_logprobs": 1,
        "options": {
            "num_predict": 2,
            "temperature": 1.0,
            "top_k": 3,
            "top_p": 0.5,
            "min_p": 0.1,
            "seed": 1,
            "stop": ["x"],
            "repeat_penalty": 1.1,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.1,
        },
    },
    "/api/chat": {
        "model": "tiny",
        "messages": [
            *TALK,
            {"role": "assistant", "content": "", "thinking": "t", "tool_calls": [CALL]},
            {"role": "tool", "content": "r", "tool_name": "f"},
        ],
        "tools": [CHAT_TOOL],
        "format": "",
        "stream": True,
        "options": {"num_predict": 2},
    },
    "/api/embed": {"model": "tiny", "input": ["Say", "x"], "truncate": True, "dimensions": 32},
    "/api/embeddings": {"model": "tiny", "prompt": "Say", "options": {}, "keep_alive": 1.5},
    "/api/show": {"model": "tiny", "verbose": True},
    "/tokenize": {
        "model": "tiny",
        "prompt": "Say",
        "add_special_tokens": True,
        "parse_special": True,
        "return_token_strs": True,
    },
    "/tokenize#": {"messages": TALK, "add_generation_prompt": True, "tools": [CHAT_TOOL]},
    "/detokenize": {"model": "tiny", "tokens": [1, 2]},
    "/v1/responses": {
        "model": "tiny",
        "input": [
            *TALK,
            {"role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ],
        "instructions": "s",
        "tools": [{"type": "function", **TOOL}],
        "tool_choice": "auto",
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "metadata": {"a": "b"},
        "max_output_tokens": 2,
        "temperature": 1.0,
        "top_p": 0.5,
        "truncation": "disabled",
        "parallel_tool_calls": True,
        "stream": False,
    },
    "/v1/completions": {
        "model": "tiny",
        "prompt": ["Say", "x"],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "n": 1,
        "stream": False,
    },
}
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**350, 0.5, -0.0, 1e308),
    *("", " ", "x", "json", "\0", "\U0001f600", "é" * 5000, "<|im_end|>", "{{ 1 }}"),
    *([], [[]], [None], [1], [True], ["x"], [{}], [-1], [2**40], list(range(300))),
    *({}, {"": ""}, {"type": "x"}, {"type": "function"}, {"type": "object", "properties": 1}),
    *({"$ref": "#"}, {"type": ["string", 1]}, {"role": "user"}, {"role": "tool", "content": "x"}),
]
PATHS = [
    route.path
    for each in (ollama, ollama_embed, ollama_models, responses, tokenize)
    for route in each.router.routes
    if isinstance(route, APIRoute) and "POST" in route.methods
]


@pytest.fixture(scope="module")
def small(long_base: Path) -> Iterator[httpx.Client]:
    """A client of a server whose replies are short, whatever is asked."""
    options = {"max_tokens": 3, "schema_seconds": 2.0, "requests_per_second": 0.0}
    with (
        running({"tiny": long_base}, **options) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a body."""
    found = [at] if at else []
    if isinstance(value, dict):
        return found + [p for key, each in value.items() for p in places(each, (*at, key))]
    if isinstance(value, list):
        return found + [p for i, each in enumerate(value) for p in places(each, (*at, i))]
    return found


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy of a body with something else in a place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    return copy


def check(client: httpx.Client, path: str, body: Any) -> None:
    path = path.rstrip("#")
    answer = client.post(path, content=json.dumps(body).encode())
    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code == 200:
        assert INTERNAL not in answer.text  # in the midst of a stream
        return
    assert answer.status_code in (400, 404, 413), (body, answer.text)
    error = answer.json()["error"]
    if path.startswith("/api/"):
        assert list(answer.json()) == ["error"]
    else:
        assert set(error) == {"message", "type", "param", "code"}
        error = error["message"]
    assert isinstance(error, str)
    assert error
    assert "\n" not in error
    for word in ("Traceback", ".py", "0x", "site-packages"):
        assert word not in error


def test_every_route_is_tried() -> None:
    assert set(PATHS) <= {path.rstrip("#") for path in BODIES}


@pytest.mark.parametrize("path", BODIES)
def test_the_bodies_are_right(small: httpx.Client, path: str) -> None:
    answer = small.post(path.rstrip("#"), json=BODIES[path])
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", BODIES)
def test_any_value_in_any_place_is_answered(small: httpx.Client, path: str) -> None:
    for at in places(BODIES[path]):
        for value in VALUES:
            check(small, path, changed(BODIES[path], at, value))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "name"]) | st.text(), inner)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("path", BODIES)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_bodies_of_any_kind_are_answered(small: httpx.Client, path: str, data: Any) -> None:
    if data.draw(st.booleans()):
        check(small, path, data.draw(JSON))
        return
    body = BODIES[path]
    for _ in range(data.draw(st.integers(1, 3))):
        body = changed(body, data.draw(st.sampled_from(places(body))), data.draw(JSON))
        if not places(body):
            break
    check(small, path, body)


RAW = [b"", b"{", b"[]", b"null", b'"x"', b'{"model": NaN}', b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("body", RAW)
@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_bodies_that_are_no_request(server: HttpServer, path: str, body: bytes) -> None:
    answer = httpx.post(server.url + path, content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert isinstance(error, str if path.startswith("/api/") else dict)
