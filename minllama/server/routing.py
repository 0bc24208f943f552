"""What routes are made of: bodies, answers and streams, the same for every protocol.

A route module makes a router by `router()`, declares bodies as subclasses of `Body`, and answers
with values or with a `Stream`.
"""

import asyncio
import json
import logging
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema
from starlette.types import Receive, Scope, Send

from minllama.server.errors import RequestError, as_request_error, error_content, error_status
from minllama.server.jobs import Job
from minllama.server.json_body import SHORT_BYTES, parse_body
from minllama.server.service import Service

logger = logging.getLogger("minllama.server")

ERROR_STATUSES = {
    400: "The request is not as it must be.",
    401: "There is no valid API key.",
    403: "The request came by a name or from a page that is not allowed.",
    404: "There is no such model or path.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "Too many requests wait, or come at a time.",
    431: "The headers are too large.",
    500: "The server has failed.",
    503: "The server is loading, shutting down, or out of memory.",
    504: "The request took too long.",
}


def answered_as(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """The declaration of a route that answers otherwise than by JSON alone: its `responses`."""
    content: dict[str, Any] = {media_type: {} for media_type in media_types}
    return {200: {"description": "The answer, whole or as a stream.", "content": content}}


JSON_OR_EVENTS = answered_as("application/json", "text/event-stream")
JSON_OR_LINES = answered_as("application/json", "application/x-ndjson")


def _end_at_first_error(schema: Any) -> None:
    """Let all lists and objects of any keys within a schema be read no further than to an error."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            _end_at_first_error(part)


class Body(BaseModel):
    """A part of a request: values have their exact types; what is unknown is not looked at.

    Lists and objects are read up to their first wrong value: a million of them would each be
    described, for a minute in which nobody else is answered.
    """

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _end_at_first_error(schema)
        return schema


class _JSONRoute(APIRoute):
    """A route whose body is read by `json_body`, and declared as JSON or as nothing."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            if request.method not in ("POST", "PUT", "PATCH"):
                return await handle(request)
            _check_declared(request)
            body = await request.body()
            depth = service_of(request).options.max_json_depth
            if len(body) > SHORT_BYTES:
                content = await run_in_threadpool(parse_body, body, depth)
            else:
                content = parse_body(body, depth)
            # FastAPI takes a body without a declaration for something else.
            others = [h for h in request.scope["headers"] if h[0] != b"content-type"]
            scope = {**request.scope, "headers": [*others, (b"content-type", b"application/json")]}
            request = Request(scope, request.receive)
            request._body, request._json = body, content
            return await handle(request)

        return checked


def _check_declared(request: Request) -> None:
    """Refuse a body from a web page that a browser sends without asking first.

    Others may leave the declaration out, as `curl -d` does.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = kind == "application/json" or kind.endswith("+json")
    if not is_json and "origin" in request.headers:
        raise RequestError("the body must be declared as application/json", status=415)


def router() -> APIRouter:
    """A router whose bodies are read and whose errors are declared as they are for all."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": description, "content": {"application/json": {}}}
        for status, description in ERROR_STATUSES.items()
    }
    return APIRouter(route_class=_JSONRoute, responses=responses)


def service_of(request: Request) -> Service:
    """The service that a route's app stands on."""
    service: Service = request.app.state.service
    return service


def partition(request: Request) -> str:
    """A name for the owner of the key: the salt of requests that may share cached prefixes."""
    owner: str = request.scope.get("state", {}).get("owner", "")
    return owner


def log_texts(request: Request, **texts: Any) -> None:
    """Let the access log have texts of a request, where it is to."""
    if service_of(request).options.log_texts:
        request.scope.setdefault("state", {}).setdefault("log", {}).update(texts)


def check_count(param: str, count: int, most: int, least: int = 1) -> None:
    """Refuse a list of too many, or too few, entries.

    Raises:
        RequestError: there are.
    """
    if not least <= count <= most:
        raise RequestError(
            f"{param} must have between {least} and {most} entries, not {count}", param=param
        )


def refuse_fields(
    body: Body, remedies: Mapping[str, str], *, allowed: Collection[Any] = ()
) -> None:
    """Refuse fields that would change an answer and are not supported.

    Args:
        body: the request.
        remedies: names of fields, and what to do instead.
        allowed: values of such a field that change nothing; None, false and empty ones by default.

    Raises:
        RequestError: there is such a field.
    """
    for name, remedy in remedies.items():
        value = getattr(body, name)
        if any(value is harmless for harmless in allowed) if allowed else not value:
            continue
        raise RequestError(f"{name} is not supported: {remedy}", param=name)


def check_range(param: str, value: float | None, least: float, most: float) -> None:
    """Refuse a number beyond a limit of this server; None is none.

    Raises:
        RequestError: it is.
    """
    if value is not None and not least <= value <= most:
        raise RequestError(
            f"{param} must be between {least:.10g} and {most:.10g}, not {str(value)[:40]}",
            param=param,
        )


async def answer(request: Request, job: Job, result: Awaitable[Any]) -> Any:
    """What `result` gives, while the job is cancelled if the client goes away.

    Raises:
        MinllamaError: the job failed.
    """
    async with job.cancelled_on_disconnect(request):
        return await result


class Stream(Response):
    """An answer in pieces, of a job that ends with it.

    An error in the midst of the answer is the last event, in the protocol's form: a stream is
    never cut without one.

    Args:
        events: gives pieces, each one event as bytes.
        jobs: cancelled when the client goes away, when the stream ends, and when it never begins.
        format_error: an error's content as the bytes of an event.
        media_type: of the answer.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        jobs: Sequence[Job] = (),
        *,
        format_error: Callable[[dict[str, Any]], bytes],
        media_type: str = "text/event-stream",
    ) -> None:
        self.media_type, self.status_code, self.background = media_type, 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._jobs, self._format_error = events, jobs, format_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        watcher = asyncio.ensure_future(self._watch(receive))
        try:
            await send(start)
            try:
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except OSError:
                return  # the client has gone
            except Exception as error:
                if as_request_error(error).status == 500:
                    logger.exception("an answer was interrupted by an error")
                content = error_content(scope["path"], as_request_error(error))
                event = self._format_error(content)
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watcher.cancel()
            self.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def cancel(self) -> None:
        for job in self._jobs:
            job.cancel()


def compact(content: Any) -> str:
    """JSON in one line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def sse(content: Any) -> bytes:
    """One server-sent event."""
    return f"data: {compact(content)}\n\n".encode(errors="replace")


def ndjson(content: Any) -> bytes:
    """One line of newline-delimited JSON."""
    return f"{compact(content)}\n".encode(errors="replace")


def event_stream(events: AsyncIterator[bytes], job: Job) -> Stream:
    """A stream of server-sent events, as OpenAI has them."""
    return Stream(events, [job], format_error=sse)


def line_stream(events: AsyncIterator[bytes], job: Job) -> Stream:
    """A stream of lines of JSON, as Ollama has them."""
    return Stream(events, [job], format_error=ndjson, media_type="application/x-ndjson")


def error_response(path: str, error: RequestError) -> JSONResponse:
    """An error's response, in the form of the path's protocol."""
    return JSONResponse(error_content(path, error), error_status(path, error), error.headers)
