"""Tokens of a stream are collected for an interval, and none is lost or late at the ends."""

from pathlib import Path

import openai
import pytest

from minllama.options.server import ServerOptions
from minllama.server.metrics import Metrics
from minllama.server.worker import Worker
from tests.server.running import running


@pytest.mark.parametrize(("interval", "least", "most"), [(0.0, 2, 31), (60.0, 1, 3)])
def test_an_event_has_the_tokens_of_an_interval(
    long_base: Path, interval: float, least: int, most: int
) -> None:
    options = {
        "model": "tiny",
        "prompt": "Once upon a time",
        "max_tokens": 30,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    with running({"tiny": long_base}, stream_interval=interval) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        whole = client.completions.create(**options).choices[0]
        chunks = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
        texts = [chunk.text for chunk in chunks if chunk.text]
        assert "".join(texts) == whole.text
        assert least <= len(texts) <= most
        assert chunks[-1].finish_reason == whole.finish_reason == "length"


@pytest.mark.parametrize(
    ("stated", "jobs", "expected"),
    [(0.05, 1, 0.05), (0.05, 16, 0.16), (0.05, 64, 0.2), (0.0, 64, 0.0), (1.0, 64, 1.0)],
)
def test_many_streams_have_longer_intervals(stated: float, jobs: int, expected: float) -> None:
    options = ServerOptions(stream_interval=stated)
    worker = Worker(options, lambda updates: None, Metrics())
    worker._of_job = dict.fromkeys(range(jobs))  # type: ignore[assignment,arg-type]
    assert worker._interval() == pytest.approx(expected)
