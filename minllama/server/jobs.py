"""A job: what one request asks of a model, on its way between the event loop and the worker.

Routes get one from `Service.submit`, iterate over it, or wait for its results.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from minllama.engine.sequence import Token
from minllama.server.errors import RequestError

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest

    from minllama.server.registry import ServedModel

DISCONNECTED = "disconnected"  # reasons of cancellations, which metrics count
STOPPED = "stopped"
TIMEOUT = "timeout"
SHUTDOWN = "shutdown"
FAILED = "failed"
CLOSED = 499  # nginx's status for a client that has gone, which nobody receives


class Update(NamedTuple):
    """What is new about a job, from the worker.

    Attributes:
        tokens: of its sequences, whose rows are numbered from 0 within the job.
        results: number of an evaluation -> what came out.
        is_last: nothing follows.
        error: what ended the job, where that was an error.
    """

    tokens: Sequence[Token] = ()
    results: Sequence[tuple[int, Any]] = ()
    is_last: bool = False
    error: BaseException | None = None


class Job:
    """Requests of one client to one model, which begin and are cancelled together.

    Of requests for tokens, iterating gives lists of tokens as they come; a token's `row` counts the
    samples of the requests in order. Of evaluations, `results` waits for what they give. Only for
    the event loop's thread, but for `parts`.

    Attributes:
        model: who is asked.
        requests: what for: `minllama.engine.sequence.Request`, or
            `minllama.engine.evaluation.EvaluationRequest`.
        parts: what the scheduler has made of each request, once it has joined: its sequences, or
            its evaluation.
        has_ended: nothing more comes.
    """

    def __init__(
        self,
        model: "ServedModel",
        requests: Sequence[Any],
        on_end: Callable[["Job", str | None], None],
        on_first: Callable[["Job"], None],
        on_finish: Callable[["Job", int], None],
    ) -> None:
        self.model, self.requests = model, list(requests)
        self.parts: list[Any] = []
        self.has_ended = False
        self.created = time.perf_counter()
        self.first_at: float | None = None  # when the first token or result came
        self.last_at = self.created
        self._on_end, self._on_first, self._on_finish = on_end, on_first, on_finish
        self._tokens: list[Token] = []
        self._results: dict[int, Any] = {}
        self._error: BaseException | None = None
        self._updated = asyncio.Event()
        counts = [getattr(request, "n", 1) for request in self.requests]
        self._first_rows = list(accumulate(counts, initial=0))
        self._open_rows = set(range(sum(counts)))

    # For routes

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        """Lists of tokens, as they come.

        Raises:
            MinllamaError: the job was ended by an error, its time limit, or a shutdown.
        """
        try:
            while True:
                while not self._tokens and not self.has_ended:
                    self._updated.clear()
                    await self._updated.wait()
                if self._tokens:
                    tokens, self._tokens = self._tokens, []
                    yield tokens
                elif self._error is not None:
                    raise self._error
                else:
                    return
        finally:
            self.cancel()

    async def results(self) -> list[Any]:
        """What its requests have given, in order, once all have.

        Raises:
            MinllamaError: one has failed, or the job was cancelled, or ended by its time limit or a
                shutdown.
        """
        try:
            while not self.has_ended:
                self._updated.clear()
                await self._updated.wait()
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error
        if len(self._results) < len(self.requests):
            raise RequestError("the request was cancelled", status=CLOSED)
        return [self._results[number] for number in range(len(self.requests))]

    def cached_tokens(self, request: int = 0) -> int:
        """How many tokens of a request's prompt were not read, as a cache had them."""
        if request >= len(self.parts):
            return 0
        part = self.parts[request]
        first = part[0] if isinstance(part, list) and part else part
        return int(getattr(first, "cached_tokens", 0))

    def error_of(self, row: int) -> BaseException:
        """What has ended a sequence whose last token says `error`."""
        error: BaseException | None
        error = next(part.error for number, part in numbered(self.parts) if number == row)
        assert error is not None
        return error

    def finish(self, row: int) -> None:
        """A sequence has all that it needs; the job's others go on."""
        if self.has_ended or row not in self._open_rows:
            return
        self._open_rows.discard(row)
        if self._open_rows:
            self._on_finish(self, row)
        else:
            self.end(None)

    def cancel(self, reason: str = DISCONNECTED) -> None:
        """Give up what has not ended yet; without effect on a job that has."""
        if not self.has_ended:
            self.end(reason)

    @contextlib.asynccontextmanager
    async def cancelled_on_disconnect(self, request: "HttpRequest") -> AsyncIterator["Job"]:
        """Cancels the job when the client goes away, and when the block is left in any way."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.cancel()

        watcher = asyncio.ensure_future(watch())
        try:
            yield self
        finally:
            watcher.cancel()
            self.cancel()

    # For the service

    def end(self, reason: str | None, error: BaseException | None = None) -> None:
        """Nothing more comes: it is complete (no reason), or was cancelled for a reason."""
        if self.has_ended:
            return
        self.has_ended, self._error = True, error
        self._updated.set()
        self._on_end(self, reason)

    def receive(self, update: Update) -> None:
        """Take an update from the worker."""
        if self.has_ended:
            return
        if self.first_at is None and (update.tokens or update.results):
            self.first_at = time.perf_counter()
            self._on_first(self)
        for token in update.tokens:
            if token.row in self._open_rows:
                self._tokens.append(token)
                if token.finish_reason is not None:
                    self._open_rows.discard(token.row)
        for number, result in update.results:
            self._results[number] = result
            self._open_rows.discard(self._first_rows[number])
        if update.is_last or not self._open_rows:
            self.end(None if update.error is None else FAILED, update.error)
        self._updated.set()


def numbered(parts: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The sequences of a job's parts, numbered as its rows are; other parts have a row each."""
    row = 0
    for part in parts:
        for each in part if isinstance(part, list) else (part,):
            yield row, each
            row += 1
