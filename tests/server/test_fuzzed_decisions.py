"""Whatever is sent to the routes of classification and decisions gets an answer that says so."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minllama.server.run import HttpServer
from tests.server.heads import write_heads
from tests.server.running import running

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        2**63,
        10**400,
        "",
        " ",
        "x",
        "\x00",
        "\ud83d\ude42",
        "\ud83d",
        "a" * 5000,
    ),
    *([], {}, [[]], [{}], {"": ""}, [None], ["x", 1], {"type": "choice"}, "<|im_end|>", "{text}"),
    *([["a", "b"]], {"a": {"b": [1, {"c": None}]}}, "NaN", [2**31 - 1], [0], ["a"] * 300),
)
TARGETS = {
    "/classify": [
        {"model": "head", "input": ["x", "y"], "truncate_prompt_tokens": 3, "explain": False},
        {"input": "x", "labels": ["a", "b"], "prompt": "{text}:", "score": "sum"},
        {"model": "words", "input": "a b", "explain": {"target": "good", "max_words": 2}},
    ],
    "/predict": [{"inputs": [["a"], ["b", "c"]], "truncate": True, "raw_scores": False}],
    "/v1/embeddings": [{"input": [[1, 2], [3]], "x_layer": 1, "x_pooling": "mean"}],
    "/v1/decisions": [
        {
            "model": "base",
            "input": [
                {"role": "user", "content": [{"type": "input_json", "data": {"a": [1]}}]},
                {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
            ],
            "questions": [
                {"type": "predicate", "instructions": "Is it?", "name": "a"},
                {
                    "type": "choice",
                    "instructions": [{"type": "input_text", "text": "?"}],
                    "choices": [{"value": "a", "description": "b"}, {"value": True}],
                },
                {"type": "score", "instructions": "", "levels": [{"label": "a"}, {"label": "b"}]},
            ],
        }
    ],
    "/v1/systemone": [
        {
            "model": "jev-latest",
            "state": {"a": ["b"]},
            "questions": {
                "n": {"type": "noul", "instructions": "?", "criteria": {"true": "a"}},
                "c": {"type": "choice", "criteria": {"a": None, "b": ["c"]}},
                "s": {"type": "score", "criteria": ["a", {"b": "c"}]},
            },
        }
    ],
}


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    heads = write_heads(tmp_path_factory.mktemp("heads"), base)
    with running({"base": base, **heads}, requests_per_second=0) as server:
        yield server


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a body."""
    yield before
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from places(inner, (*before, key))


def changed(value: Any, place: tuple[Any, ...], draw: random.Random) -> Any:
    """A body with something odd in one place, or without it."""
    if not place:
        return draw.choice(ODD)
    copied = value.copy()
    if len(place) == 1 and draw.random() < 0.15:
        del copied[place[0]]
    elif len(place) == 1 and isinstance(copied, dict) and draw.random() < 0.1:
        copied[str(draw.choice(ODD))[:50]] = copied.pop(place[0])
    else:
        copied[place[0]] = changed(copied[place[0]], place[1:], draw)
    return copied


@pytest.mark.parametrize("path", TARGETS)
def test_nothing_that_is_sent_is_a_fault_of_the_server(served: HttpServer, path: str) -> None:
    draw = random.Random(path)
    statuses = set()
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for body in TARGETS[path]:
            assert client.post(path, json=body).status_code == 200
            for place in places(body):
                for _ in range(6):
                    odd = changed(body, place, draw)
                    answer = client.post(path, content=json.dumps(odd))
                    assert answer.status_code < 500, (odd, answer.text)
                    assert isinstance(answer.json(), dict | list)
                    statuses.add(answer.status_code)
    assert len(statuses) > 1
