"""Run a server until a signal ends it: uvicorn, loading of models, and an end without losses."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from minllama.errors import OptionError
from minllama.options.server import ServerOptions
from minllama.server.app import create_app
from minllama.server.auth import Keys
from minllama.server.connection import Connection
from minllama.server.registry import Registry
from minllama.server.service import Service

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
LAST_SECONDS = 2.0  # for the last errors to reach their clients


def listen(options: ServerOptions) -> socket.socket:
    """A socket that is bound to the address of the options.

    Raises:
        OptionError: the address is not of this machine, or taken.
    """
    host = options.host.strip("[]")
    try:
        found = socket.getaddrinfo(host, options.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(BACKLOG)
        except OSError:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"cannot listen on {host}:{options.port}: {reason}; choose another --host or --port"
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a server, as clients on this machine write it."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


class HttpServer:
    """A server of models, until it is ended.

    Args:
        registry: not loaded yet.
        options: of the server.
        keys: of which requests must have one.

    Attributes:
        service: what its routes stand on.
        url: its address, from its making on.

    Raises:
        OptionError: the address is taken, or not of this machine.
    """

    def __init__(
        self, registry: Registry, options: ServerOptions, keys: Keys | None = None
    ) -> None:
        self._bound = listen(options)
        self.url = url_of(self._bound)
        self.service = Service(registry, options)
        self._keys = keys
        self._server: _Server | None = None
        self._fault: BaseException | None = None

    def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Load the models, and answer until SIGTERM or SIGINT, or `end`.

        Args:
            on_ready: called once requests are accepted.

        Raises:
            MinllamaError: something cannot be opened.
        """
        with self._bound:
            asyncio.run(self._run(on_ready))
        if self._fault is not None:
            raise self._fault

    def end(self) -> None:
        """Do what a signal does; from any thread.

        The first time new requests are refused, and running ones finish; the second time these are
        ended too, with an error event; the third time the process ends.
        """
        if self._server is not None:
            self._server.handle_exit(signal.SIGTERM, None)

    async def _run(self, on_ready: Callable[[], None] | None) -> None:
        service = self.service
        config = uvicorn.Config(
            create_app(service, self._keys),
            http=Connection,  # bounds the headers
            h11_max_incomplete_event_size=service.options.max_header_bytes,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(LAST_SECONDS),
        )
        self._server = _Server(config, service)
        loop = asyncio.get_running_loop()

        def load() -> None:
            error: BaseException | None = None
            try:
                service.registry.load()
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # a signal was faster
                loop.call_soon_threadsafe(self._loaded, error, on_ready)

        # A daemon: a signal need not wait for gigabytes.
        threading.Thread(target=load, name="minllama-load", daemon=True).start()
        await self._server.serve(sockets=[self._bound])

    def _loaded(self, error: BaseException | None, on_ready: Callable[[], None] | None) -> None:
        assert self._server is not None
        if error is not None:
            self._fault, self._server.should_exit = error, True
        elif self.service.state == "loading":
            self.service.start()
            if on_ready is not None:
                on_ready()


class _Server(uvicorn.Server):
    """Ends in steps, which signals count."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._n_signals = service, 0
        self._hurry = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ending: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._n_signals += 1
        if self._n_signals > 2:
            os._exit(128 + sig)
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._ending is None:
            self._service.begin_drain()
            self._ending = asyncio.ensure_future(self._drain())
        else:
            self._hurry.set()

    async def _drain(self) -> None:
        service = self._service
        drained = asyncio.ensure_future(service.drained(service.options.shutdown_timeout))
        hurried = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        drained.cancel()
        service.end_all()
        await service.drained(LAST_SECONDS)
        self.should_exit = True
