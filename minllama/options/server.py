"""Options of the HTTP server: where it listens, who may ask, and how much."""

import ipaddress
from dataclasses import dataclass
from typing import ClassVar

from minllama.options.base import CheckedOptions, Range, option

COUNT = Range(1, 2**31)
SIZE = Range(1024, 2**40)
SECONDS = Range(0, 10**6, low_open=True)


@dataclass(frozen=True, kw_only=True)
class ServerOptions(CheckedOptions):
    """Where a server listens, who may ask it, and how much; see `minllama.server`."""

    group: ClassVar[str] = "Server"

    host: str = option("127.0.0.1", "address to listen on", common=True)
    port: int = option(
        8000, "port to listen on; 0 for a free one", within=Range(0, 65535), common=True
    )
    alias: tuple[str, ...] = option(
        (),
        "serve a model under a further name, as NAME=MODEL: a path, an id, or a name that is "
        "served; repeatable",
        common=True,
    )
    shutdown_timeout: float = option(
        30.0, "seconds for running requests to finish after SIGTERM", within=Range(0, 10**6)
    )
    log_texts: bool = option(False, "write prompts and answers to the access log too")

    api_key: tuple[str, ...] = option(
        (), "a key that requests must have; repeatable", group="Access", common=True
    )
    api_key_file: str | None = option(None, "file with a key on each line", group="Access")
    allow_unauthenticated: bool = option(
        False, "listen beyond this machine without a key", group="Access"
    )
    allowed_host: tuple[str, ...] = option(
        (),
        "further name by which clients may call a server that listens on this machine only; "
        "repeatable",
        group="Access",
    )
    cors_origin: tuple[str, ...] = option(
        (),
        "origin whose pages may call this server from a browser, or *; repeatable",
        group="Access",
    )

    token_budget: int = option(
        512, "tokens that a step of the model reads at most", within=COUNT, group="Scheduling"
    )
    max_sequences: int = option(
        64, "texts that are continued at a time", within=COUNT, group="Scheduling"
    )
    prefix_cache_bytes: int = option(
        2**28,
        "memory for keys and values of prompts that may come again; 0 for none",
        within=Range(0, 2**40),
        group="Scheduling",
    )
    stream_interval: float = option(
        0.05,
        "seconds between two events of a stream, in which tokens are collected, up to four times "
        "as many beside other streams; 0 for an event a token",
        within=Range(0, 60),
        group="Scheduling",
    )
    max_queue: int = option(
        256, "requests that may wait; further ones get status 429", within=COUNT, group="Scheduling"
    )
    request_seconds: float = option(
        600.0, "time limit of a request", within=SECONDS, group="Scheduling"
    )

    requests_per_second: float = option(
        1000.0,
        "requests a second of one key, or of one address without keys; 0 for no limit",
        within=Range(0, 10**6),
        group="Limits",
    )
    max_body_bytes: int = option(2**23, "bytes of a request's body", within=SIZE, group="Limits")
    max_header_bytes: int = option(
        2**14, "bytes of a request's headers", within=SIZE, group="Limits"
    )
    max_json_depth: int = option(
        64, "lists and objects inside one another in a body", within=Range(1, 512), group="Limits"
    )
    max_prompt_tokens: int | None = option(
        None, "tokens of a prompt, if fewer than the model's context", within=COUNT, group="Limits"
    )
    max_tokens: int = option(
        16384, "new tokens that a request may ask for", within=COUNT, group="Limits"
    )
    max_inputs: int = option(2048, "texts of a request", within=COUNT, group="Limits")
    max_questions: int = option(400, "questions of a request", within=COUNT, group="Limits")
    max_choices: int = option(255, "choices of a question", within=Range(2, 2**16), group="Limits")
    max_labels: int = option(255, "labels of a request", within=Range(2, 2**16), group="Limits")
    max_n: int = option(16, "samples of a prompt", within=Range(1, 4096), group="Limits")
    max_logprobs: int = option(
        20, "alternatives beside each token", within=Range(0, 100), group="Limits"
    )
    max_stop: int = option(16, "stop strings of a request", within=COUNT, group="Limits")
    max_logit_bias: int = option(
        1024, "tokens of a request's logit_bias", within=COUNT, group="Limits"
    )
    max_tools: int = option(128, "tools of a request", within=COUNT, group="Limits")
    max_schema_bytes: int = option(
        2**16, "bytes of a JSON schema or a regular expression", within=SIZE, group="Limits"
    )
    schema_seconds: float = option(
        5.0, "time to compile a JSON schema or a regular expression", within=SECONDS, group="Limits"
    )

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can connect."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own, which no other machine reaches."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
