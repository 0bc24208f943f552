"""A server of a tiny model, for tests that leave it as it is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from minllama.server.run import HttpServer
from tests.server.running import running


@pytest.fixture(scope="package")
def long_base(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Path:
    """The tiny model with room for tools and schemas in its context."""
    from tests.tiny import write_base

    return write_base(tmp_path_factory.mktemp("long"), default_model, 1024)


@pytest.fixture(scope="package")
def server(long_base: Path) -> Iterator[HttpServer]:
    """The model `tiny`, without keys."""
    with running({"tiny": long_base}) as server:
        yield server
