"""A server on a free port, in a thread of the test's process."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minllama.options.loading import LoadOptions
from minllama.options.server import ServerOptions
from minllama.server.auth import Keys
from minllama.server.registry import Registry
from minllama.server.run import HttpServer

LOADING = LoadOptions(dtype="float32", device="cpu")


@contextmanager
def running(
    models: Mapping[str, Path | str | None],
    *,
    keys: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
    loading: LoadOptions = LOADING,
    **options: Any,
) -> Iterator[HttpServer]:
    """A server that has loaded its models; ended with the block."""
    sources = {name: None if path is None else str(path) for name, path in models.items()}
    registry = Registry(sources, aliases, loading)
    server = HttpServer(registry, ServerOptions(port=0, **options), Keys.of(keys))
    ready, faults = threading.Event(), []

    def run() -> None:
        try:
            server.run(ready.set)
        except BaseException as error:
            faults.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60), "the server does not start"
    if faults:
        raise faults[0]
    try:
        yield server
    finally:
        if server.service.state == "ready":  # a third signal would end the tests
            server.end()
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"
