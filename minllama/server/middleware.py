"""What stands before every route: keys, hosts, sizes, rates, the log and the count of requests.

Plain ASGI, so that it costs little and streams pass through it as they are.
"""

import asyncio
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minllama.options.server import is_loopback
from minllama.server.auth import OPEN_PATHS, Keys, key_in
from minllama.server.errors import INTERNAL, RequestError, error_content, error_status
from minllama.server.service import Service
from minllama.text import one_line

access_log = logging.getLogger("minllama.access")
logger = logging.getLogger("minllama.server")

# Answered in any state, and never limited by rate: whoever watches the server asks for them.
WATCHED = frozenset({"/health", "/ready", "/metrics"})
MOST_CALLERS = 4096  # whose rates are known at a time
_ABSOLUTE = re.compile("https?://([^/]*)", re.IGNORECASE)  # RFC 9112, sec. 3.2.2: replaces Host
_SLASHES = re.compile("/{2,}")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^][:@/\s,]+))(?::[0-9]*)?")  # RFC 3986, sec. 3.2.2


async def send_error(scope: Scope, send: Send, error: RequestError) -> None:
    """Answer with an error, in the form of the path's protocol."""
    body = json.dumps(error_content(scope["path"], error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= {name.lower(): value for name, value in error.headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    status = error_status(scope["path"], error)
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class AccessMiddleware:
    """The outermost layer: paths in their plain form, the log, metrics, and errors of any kind."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if (absolute := _ABSOLUTE.match(path)) is not None:
            path = path[absolute.end() :]
            scope["headers"] = [
                (name, value) for name, value in scope["headers"] if name != b"host"
            ]
            scope["headers"].append((b"host", absolute[1].encode(errors="replace")))
        path = _SLASHES.sub("/", path)
        scope["path"] = path.rstrip("/") or "/"
        scope["raw_path"] = scope["path"].encode(errors="replace")
        is_watched = scope["path"] in WATCHED
        service, start = self._service, time.perf_counter()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if not is_watched:
            service.n_in_flight += 1
            service.metrics.in_flight.inc()
        try:
            await self._app(scope, receive, counted)
        except ClientDisconnect:
            pass  # before its body was there
        except Exception:
            logger.exception("a request failed")
            if not status:
                await send_error(scope, counted, RequestError(INTERNAL, status=500))
        finally:
            if not is_watched:
                service.n_in_flight -= 1
                service.metrics.in_flight.dec()
            self._note(scope, status, time.perf_counter() - start)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        metrics = self._service.metrics
        metrics.requests.labels(route, str(status or 499)).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        if not access_log.isEnabledFor(logging.INFO):
            return
        client = scope.get("client") or ("-",)
        fields: dict[str, Any] = {
            "client": client[0],
            "method": scope["method"],
            "path": one_line(scope["path"], 200),
            "status": status or 499,  # nginx's, for a client that has gone
            "seconds": round(seconds, 4),
            **scope.get("state", {}).get("log", {}),
        }
        access_log.info("%s", json.dumps(fields, ensure_ascii=True), extra={"request": fields})


class GuardMiddleware:
    """Refuses what need not be read: wrong hosts and keys, too much of anything, too often."""

    def __init__(self, app: ASGIApp, service: Service, keys: Keys) -> None:
        self._app, self._service, self._keys = app, service, keys
        self._options = service.options
        self._rates = Rates(service.options.requests_per_second)
        own = {service.options.host.lower().strip("[]"), "localhost", "127.0.0.1", "::1"}
        self._hosts = own | {host.lower() for host in service.options.allowed_host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                async with asyncio.timeout(self._options.request_seconds):
                    receive = await _read(scope, receive, self._options.max_body_bytes)
        except TimeoutError:
            await send_error(scope, send, RequestError("the body did not arrive", status=408))
            return
        except RequestError as error:
            await send_error(scope, send, error)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, path = scope["headers"], scope["path"]
        n_bytes = sum(len(name) + len(value) + 4 for name, value in headers)
        n_bytes += len(path) + len(scope.get("query_string", b""))
        if n_bytes > self._options.max_header_bytes:
            most = self._options.max_header_bytes
            raise RequestError(f"the headers have {n_bytes} bytes, at most {most}", status=431)
        if self._options.is_local:
            self._check_host(headers)
        names = {name for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            # Where it ends, others on its way may see otherwise (RFC 9112, sec. 6.3).
            raise RequestError(
                "the request has both Content-Length and Transfer-Encoding; send one of them",
                headers={"Connection": "close"},
            )
        if _is_preflight(scope):
            return
        owner = self._keys.partition(key_in(headers))
        if owner is None and path not in OPEN_PATHS:
            raise RequestError(
                "this server needs a valid API key, as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope.setdefault("state", {})["owner"] = owner or ""
        if path in WATCHED or path in OPEN_PATHS:
            return
        caller = owner or str((scope.get("client") or ("",))[0])
        if (seconds := self._rates.take(caller)) is not None:
            self._service.metrics.rejections.labels("rate").inc()
            raise RequestError(
                f"more than {self._options.requests_per_second:g} requests a second",
                status=429,
                code="rate_limit_exceeded",
                retry_after=seconds,
            )
        if self._service.state != "ready":
            self._service.check_accepting()

    def _check_host(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Refuse a name that a page elsewhere has made mean this machine (DNS rebinding)."""
        for name, value in headers:
            if name == b"host":
                host = _without_port(value.decode("latin-1"))
                if host is None or not (host in self._hosts or is_loopback(host)):
                    raise RequestError(
                        "the Host header names another machine; this server is called by "
                        "127.0.0.1 or localhost",
                        status=403,
                        code="wrong_host",
                    )


def _without_port(host: str) -> str | None:
    """The name or address in a Host header, in small letters; None where it is not of that form."""
    found = _HOST.fullmatch(host.strip().lower())
    return found and (found[1] or found[2])


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what it may send, which it does without a key."""
    return scope["method"] == "OPTIONS" and any(
        name == b"access-control-request-method" for name, _ in scope["headers"]
    )


async def _read(scope: Scope, receive: Receive, most: int) -> Receive:
    """The body, counted while it arrives; a `receive` that gives it at once.

    Raises:
        RequestError: it is larger than may be, or says so, or is compressed.
    """
    error = RequestError(f"the body has more than {most} bytes", status=413)
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() != b"identity":
            raise RequestError("the body must not be compressed", status=415)
        if name == b"content-length" and (not value.isdigit() or int(value[:20]) > most):
            raise error
    parts: list[bytes] = []
    n_bytes, is_whole = 0, False
    while not is_whole:
        message = await receive()
        if message["type"] == "http.disconnect":
            parts.clear()
            break
        parts.append(message.get("body", b""))
        n_bytes += len(parts[-1])
        if n_bytes > most:
            raise error
        is_whole = not message.get("more_body", False)
    waiting = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay if is_whole else receive


class Rates:
    """Requests a second of each caller: a bucket that holds a second's worth.

    Args:
        per_second: how many; 0 for no limit.
        clock: seconds.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = per_second, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> float | None:
        """Count a request; seconds until the next one may come where there were too many."""
        if not self._rate:
            return None
        now, most = self._clock(), max(self._rate, 1.0)
        left, since = self._left.pop(caller, (most, now))
        left = min(most, left + (now - since) * self._rate)
        is_free = left >= 1
        self._left[caller] = (left - is_free, now)
        if len(self._left) > MOST_CALLERS:
            self._left.popitem(last=False)
        return None if is_free else (1 - left) / self._rate
