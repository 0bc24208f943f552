"""`minllama serve`: models and classifiers over HTTP."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minllama.cli.grouped import GroupedCommand, option
from minllama.cli.open import (
    WEIGHT_FORMATS,
    activations_option,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    flags_of,
    given_options,
    pick,
    warn_of_slow_dtype,
)
from minllama.errors import OptionError, optional_import
from minllama.options.loading import DTYPES, LoadOptions
from minllama.options.replicas import ReplicaOptions
from minllama.options.server import ServerOptions
from minllama.text import first_few, one_line

if TYPE_CHECKING:
    from minllama.server.auth import Keys
    from minllama.server.registry import Registry, ServedModel

NEEDED = ("fastapi", "prometheus_client", "uvicorn")


@click.command("serve", cls=GroupedCommand)
@click.argument("models", nargs=-1, metavar="[MODEL | CLASSIFIER ...]")
@dataclass_options(ServerOptions)
@dataclass_options(ReplicaOptions)
@option(
    "--base",
    metavar="PATH|ID",
    group="Model",
    help="Base model of the only adapter or classifier, if it has moved.",
)
@option(
    "--tokenizer",
    metavar="PATH",
    group="Model",
    help="Tokenizer file (also GGUF) or folder of the only model, if there is none beside it.",
)
@option("--dtype", type=click.Choice(DTYPES), group="Model", help="Data type of the weights.")
@option(
    "--device",
    metavar="DEVICE",
    group="Model",
    help="cpu, cuda or mps; by default a GPU if there is one.",
)
@option(
    "--quantize",
    type=click.Choice(WEIGHT_FORMATS),
    group="Model",
    help="Weight format, as for generate; by default that of the classifiers that stand on a "
    "model, so that it is read once, else auto.",
)
@activations_option
@debug_option
def command(models: tuple[str, ...], **values: Any) -> None:
    """Serve models, adapters and classifiers over HTTP (default: the embedded model).

    A key for requests is also read from the environment variable MINLLAMA_API_KEY.
    """
    loading, replicas = pick(LoadOptions, values), pick(ReplicaOptions, values)
    options = ServerOptions(**values)
    if len(models) > 1 and (loading.base or loading.tokenizer):
        raise OptionError("--base and --tokenizer are for one model; serve it alone, or omit them")
    for name in NEEDED:
        optional_import(name, "serve needs", extra="serve")
    with ended_by_interrupts():
        from minllama.server.auth import load_keys
        from minllama.server.registry import Registry as Served
        from minllama.server.registry import named, parsed_aliases
        from minllama.server.run import HttpServer

    keys = load_keys(options)
    aliases = parsed_aliases(options.alias)
    names = named(_sources(models, aliases), aliases)
    warn_of_slow_dtype(loading.dtype, loading.device)
    if replicas.uses_ray:
        _serve_replicas(names, options, replicas, loading, keys)
        return
    given = given_options(("replica_cpus", "replica_gpus"))
    if given:
        raise OptionError(f"{flags_of(sorted(given))}: only with --replicas; omit it")
    registry = Served(names, aliases, loading)
    _log_access()
    server = HttpServer(registry, options, keys)

    def tell() -> None:
        for line in _banner(server.url, registry, needs_key=bool(keys)):
            click.echo(one_line(line))
        sys.stdout.flush()

    server.run(tell)


def _serve_replicas(
    names: Mapping[str, str | None],
    options: ServerOptions,
    replicas: ReplicaOptions,
    loading: LoadOptions,
    keys: "Keys",
) -> None:
    """Serve by Ray, until a signal."""
    optional_import("ray.serve", "serve --replicas needs", extra="ray")
    with ended_by_interrupts():
        from minllama.server.replicas import RayServer

    # Replicas may be in other folders.
    names = {name: None if one is None else _findable(one) for name, one in names.items()}
    server = RayServer(names, options, replicas, loading=loading, keys=keys)

    def tell() -> None:
        click.echo(one_line(f"serving on {server.url}, replicas: {replicas.numbers}"))
        click.echo(one_line(f"models: {first_few(names, between='; ')}"))
        sys.stdout.flush()

    server.run(tell)


def _findable(source: str) -> str:
    """A model's name for processes in other folders: a path becomes absolute."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _sources(models: tuple[str, ...], aliases: Mapping[str, str]) -> list[str | None]:
    """What to open; the default model where nothing is named."""
    if models:
        return list(models)
    is_other = aliases and "default" not in aliases.values()
    return [] if is_other else [None]


def _log_access() -> None:
    """Print the access log to stderr, a JSON object on each line."""
    log = logging.getLogger("minllama.access")
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        log.addHandler(logging.StreamHandler())


def _banner(url: str, registry: "Registry", *, needs_key: bool) -> list[str]:
    """The address, what is served, and a command that works."""
    models = list(registry.models.values())
    listed = first_few((f"{model.id} ({model.description})" for model in models), between="; ")
    return [f"serving on {url}", f"models: {listed}", "try:", _curl(url, models[0], needs_key)]


def _curl(url: str, model: "ServedModel", needs_key: bool) -> str:
    path, body = _example(model)
    key = "-H 'Authorization: Bearer KEY' " if needs_key else ""
    content = json.dumps(body).replace("'", "'\\''")
    return f"  curl {url}{path} {key}-H 'Content-Type: application/json' -d '{content}'"


def _example(model: "ServedModel") -> tuple[str, dict[str, Any]]:
    """A path and a body for a model."""
    if model.kind == "classifier":
        return "/classify", {"model": model.id, "input": "I liked it."}
    if model.tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = {"model": model.id, "messages": messages, "max_tokens": 32, "temperature": 0}
        return "/v1/chat/completions", body
    return "/v1/completions", {"model": model.id, "prompt": "Once upon a time", "max_tokens": 32}
