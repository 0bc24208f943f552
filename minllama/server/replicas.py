"""The server's application as a deployment of Ray Serve: replicas, autoscaling, health.

Each replica is a process with the models, a scheduler and a cache of its own; Ray's proxy spreads
requests over them. So limits, and metrics, are of one replica. `minllama serve --replicas` runs a
deployment; a Serve config file names `minllama.server.replicas:application`, with arguments.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import fields
from typing import Any

from fastapi import FastAPI

from minllama.distributed.ray_cluster import check_resources, start_ray
from minllama.errors import MinllamaError, OptionError, optional_import
from minllama.options.loading import LoadOptions
from minllama.options.replicas import ReplicaOptions
from minllama.options.server import ServerOptions
from minllama.server.app import create_app
from minllama.server.auth import Keys, load_keys
from minllama.server.registry import Registry, named, parsed_aliases
from minllama.server.run import listen, url_of
from minllama.server.service import Service
from minllama.text import first_line

NAME = "minllama"


def deployment(
    names: Mapping[str, str | None],
    options: ServerOptions | None = None,
    replicas: ReplicaOptions | None = None,
    *,
    loading: LoadOptions | None = None,
    keys: Keys | None = None,
) -> Any:
    """A deployment of Ray Serve, for `serve.run(deployment(...).bind())`.

    Args:
        names: what is served: name -> source, as `minllama.server.registry.named` makes it; every
            machine of the cluster opens the same sources.
        options: of each replica.
        replicas: their number and resources.
        loading: dtype, device and weight format.
        keys: of which requests must have one.

    Raises:
        MinllamaError: Ray Serve is not installed.
    """
    serve = optional_import("ray.serve", "serve --replicas needs", extra="ray")
    options, replicas = options or ServerOptions(), replicas or ReplicaOptions()
    loading = loading or LoadOptions()
    aliases = parsed_aliases(options.alias)

    def build() -> FastAPI:
        registry = Registry(names, aliases, loading)
        registry.load()
        return started_with_app(Service(registry, options), keys)

    first = replicas.replicas or 1
    scaling: dict[str, Any] = {"num_replicas": first}
    if replicas.max_replicas is not None:
        limits = {"min_replicas": first, "max_replicas": replicas.max_replicas}
        # As many as one scheduler continues at a time.
        target = {"target_ongoing_requests": max(1, options.max_sequences // 2)}
        scaling = {"autoscaling_config": limits | target}
    return serve.deployment(
        name=NAME,
        # A replica's own queue refuses what is too much, with status 429.
        max_ongoing_requests=options.max_queue + options.max_sequences,
        graceful_shutdown_timeout_s=options.shutdown_timeout,
        ray_actor_options={
            "num_cpus": replicas.replica_cpus,
            "num_gpus": replicas.replica_gpus,
        },
        **scaling,
    )(serve.ingress(build)(_Replica))


class _Replica:
    """What Ray asks of a replica beside requests."""

    app: FastAPI

    def check_health(self) -> None:
        """Called by Ray every few seconds; a replica that raises is replaced."""
        state = self.app.state.service.state
        if state == "closed":
            raise RuntimeError(f"the service is {state}")


def started_with_app(service: Service, keys: Keys | None = None) -> FastAPI:
    """An application whose service starts with it; its models are loaded."""
    app = create_app(service, keys)
    ends = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        service.start()
        async with ends(app) as state:
            yield state

    app.router.lifespan_context = lifespan
    return app


def application(arguments: Mapping[str, Any]) -> Any:
    """The application of a Serve config file, whose `args` name models and options.

        applications:
          - import_path: minllama.server.replicas:application
            args: {models: [runs/sst], max_queue: 64}

    Args:
        arguments: `models`, a list of sources, and fields of `ServerOptions`; numbers and resources
            of replicas are the config's own.

    Raises:
        OptionError: there is no such option.
    """
    values = dict(arguments)
    models = values.pop("models", [])
    if not isinstance(models, list) or not all(isinstance(one, str) for one in models):
        raise OptionError("models must be a list of paths or ids")
    known = {field.name for field in fields(ServerOptions)}
    if unknown := sorted(values.keys() - known):
        raise OptionError(f"args have no option {unknown[0]!r}; see minllama serve --help")
    options = ServerOptions(**values)
    names = named(models or [None], parsed_aliases(options.alias))
    return deployment(names, options, keys=load_keys(options)).bind()


class RayServer:
    """A server of several replicas, until it is ended.

    Args:
        names, options, replicas, loading, keys: as for `deployment`.

    Attributes:
        url: its address.

    Raises:
        OptionError: the address is taken, or not of this machine.
        MinllamaError: Ray Serve is not installed.
    """

    def __init__(
        self,
        names: Mapping[str, str | None],
        options: ServerOptions,
        replicas: ReplicaOptions,
        *,
        loading: LoadOptions,
        keys: Keys | None = None,
    ) -> None:
        self._options, self._replicas = options, replicas
        self._deployment = deployment(names, options, replicas, loading=loading, keys=keys)
        with listen(options) as bound:  # the address is checked, and a free port found
            self.url, self._port = url_of(bound), bound.getsockname()[1]
        self._ended = threading.Event()

    def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Start Ray where it does not run, and serve until SIGTERM or SIGINT, or `end`.

        Raises:
            MinllamaError: there are not enough resources, or models cannot be opened.
        """
        ray = optional_import("ray", "serve --replicas needs", extra="ray")
        serve = optional_import("ray.serve", "serve --replicas needs", extra="ray")
        for name in ("ray", "ray.serve"):  # which report each step otherwise
            logging.getLogger(name).setLevel(logging.ERROR)
        before = self._handle_signals()
        try:
            start_ray(ray)
            self._handle_signals()  # Ray has installed its own, which end it at once
            check_resources(
                ray,
                self._replicas.replicas or 1,
                cpus=self._replicas.replica_cpus,
                gpus=self._replicas.replica_gpus,
                workers="replicas",
                worker="replica",
            )
            self._start(ray, serve)
            if on_ready is not None:
                on_ready()
            self._ended.wait()
        finally:
            if ray.is_initialized():
                with contextlib.suppress(Exception):  # Ray is ending already
                    serve.shutdown()
                ray.shutdown()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle_signals(self) -> dict[int, Any]:
        """End the server when signals ask for it; returns the handlers before."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        return {number: signal.signal(number, lambda *_: self.end()) for number in numbers}

    def end(self) -> None:
        """Do what a signal does; from any thread."""
        self._ended.set()

    def _start(self, ray: Any, serve: Any) -> None:
        http = {"host": self._options.host, "port": self._port}
        try:
            serve.start(http_options=http, logging_config={"log_level": "ERROR"})
            serve.run(self._deployment.bind(), name=NAME, route_prefix="/", blocking=False)
        except (RuntimeError, ray.exceptions.RayError) as error:  # the latter: too slow to start
            raise MinllamaError(
                f"the replicas cannot be started ({first_line(error)}); try the same models "
                "without --replicas, which shows the reason"
            ) from error
