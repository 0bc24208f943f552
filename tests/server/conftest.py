"""A server of a tiny model, for tests that leave it as it is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from minllama.server.run import HttpServer
from tests.server.running import running


@pytest.fixture(scope="package")
def server(base: Path) -> Iterator[HttpServer]:
    """The model `tiny`, without keys."""
    with running({"tiny": base}) as server:
        yield server
