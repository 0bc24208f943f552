"""The service: what routes ask for computation; between the event loop and the worker's thread.

Admission is decided here: whether the server accepts requests, how many wait, for how long. All of
it runs on the event loop, but for what `submit`, `run` and `in_thread` send elsewhere.
"""

import asyncio
import concurrent.futures
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from minllama.engine.evaluation import EvaluationRequest
from minllama.options.server import ServerOptions
from minllama.server.errors import RequestError, as_request_error
from minllama.server.jobs import FAILED, SHUTDOWN, TIMEOUT, Job, Update
from minllama.server.metrics import Metrics
from minllama.server.registry import Registry, ServedModel
from minllama.server.worker import Worker

logger = logging.getLogger("minllama.server")

State = Literal["loading", "ready", "draining", "closed"]
T = TypeVar("T")
THREADS = 4  # for tokenizing, templates and schemas
RETRY_SECONDS = 1.0
LOADING_SECONDS = 5.0
JOIN_SECONDS = 30.0  # for the worker to end its step


class Service:
    """Models, the thread that runs them, and the bounds of what may be asked at a time.

    Args:
        registry: what is served.
        options: the bounds.

    Attributes:
        registry, options: as given.
        metrics: of this server.
        state: `loading` until `start`, `draining` after `begin_drain`.
        n_in_flight: requests over HTTP without a complete answer.
        started: when it was made, by the clock.
    """

    def __init__(self, registry: Registry, options: ServerOptions) -> None:
        self.registry, self.options = registry, options
        self.metrics = Metrics()
        self.state: State = "loading"
        self.started = time.time()
        self.n_in_flight = 0
        self._jobs: dict[Job, asyncio.TimerHandle] = {}
        self._n_queued = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker = Worker(options, self._deliver, self.metrics)
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "minllama-prepare")

    # The server's life

    def start(self) -> None:
        """Accept requests: the models are there."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()
        self.state = "ready"

    def begin_drain(self) -> None:
        """Refuse new requests; those that run go on."""
        if self.state != "closed":
            self.state = "draining"

    async def drained(self, timeout: float) -> bool:
        """Wait until every request has its answer; false where that takes longer."""
        end = time.monotonic() + timeout
        while self.n_in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self.n_in_flight

    def end_all(self) -> None:
        """End what still runs, with an error that says so."""
        error = RequestError("the server is shutting down", status=503, retry_after=RETRY_SECONDS)
        for job in list(self._jobs):
            job.end(SHUTDOWN, error)

    def close(self) -> None:
        """End the worker and give back its threads."""
        self.state = "closed"
        self._worker.stop(JOIN_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # For routes

    def check_accepting(self) -> None:
        """Refuse a request that would have to be refused in any case, before any work for it.

        Raises:
            RequestError: the server is loading or shutting down (503), or the queue is full (429).
        """
        if self.state == "loading":
            message = "the models are being loaded; try again soon"
            raise RequestError(message, status=503, retry_after=LOADING_SECONDS)
        if self.state != "ready":
            self.metrics.rejections.labels("shutdown").inc()
            message = "the server is shutting down"
            raise RequestError(message, status=503, retry_after=RETRY_SECONDS)
        if self._n_queued >= self.options.max_queue:
            self.metrics.rejections.labels("queue").inc()
            raise RequestError(
                f"{self._n_queued} requests wait already; try again later",
                status=429,
                code="queue_full",
                retry_after=RETRY_SECONDS,
            )

    def submit(self, model: ServedModel, requests: Sequence[Any]) -> Job:
        """Let requests join, together or not at all.

        Args:
            model: whom to ask.
            requests: for tokens, or evaluations; their salt is to be the caller's partition
                (`routing.partition`).

        Raises:
            RequestError: as `check_accepting` does.
        """
        self.check_accepting()
        assert self._loop is not None, "start() comes first"
        job = Job(model, requests, self._on_end, self._on_first, self._worker.cancel)
        self._jobs[job] = self._loop.call_later(self.options.request_seconds, self._expire, job)
        self._set_queued(1)
        self._worker.submit(job)
        return job

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function on the worker's thread, between two steps; nothing else runs meanwhile.

        For short work on what belongs to that thread. Errors of the function are raised.
        """
        self.check_accepting()
        result: T = await asyncio.wrap_future(self._worker.run(function))
        return result

    async def in_thread(
        self, function: Callable[..., T], *args: Any, timeout: float | None = None, **options: Any
    ) -> T:
        """Call a function on a thread: tokenizing, templates, schemas, which take their time.

        Args:
            function: does not touch what belongs to the worker.
            timeout: seconds; None for the time limit of a request.

        Raises:
            RequestError: it takes longer.
        """
        assert self._loop is not None, "start() comes first"
        call = functools.partial(function, *args, **options)
        seconds = self.options.request_seconds if timeout is None else timeout
        try:
            return await asyncio.wait_for(self._loop.run_in_executor(self._threads, call), seconds)
        except TimeoutError as error:
            raise RequestError(f"this takes more than {seconds:g} s; make it smaller") from error

    # Jobs

    def _deliver(self, updates: list[tuple[Job, Update]]) -> None:
        """Hand updates to the event loop; called by the worker."""
        if not updates or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._receive, updates)
        except RuntimeError:
            logger.debug("the event loop has ended")

    def _receive(self, updates: list[tuple[Job, Update]]) -> None:
        now = time.perf_counter()
        for job, update in updates:
            if update.tokens and job.first_at is not None:
                seconds = (now - job.last_at) / len(update.tokens)
                self.metrics.between_tokens_seconds.observe(seconds)
            job.last_at = now
            if isinstance(update.error, MemoryError):
                message = "out of memory; ask for less at a time"
                update = update._replace(error=RequestError(message, status=503, retry_after=5))
            elif update.error is not None:
                update = update._replace(error=as_request_error(update.error))
            job.receive(update)

    def _on_first(self, job: Job) -> None:
        metrics = self.metrics
        self._set_queued(-1)
        metrics.first_token_seconds.observe(time.perf_counter() - job.created)
        metrics.prompt_tokens.inc(sum(len(request.ids) for request in job.requests))
        if not isinstance(job.requests[0], EvaluationRequest):
            self._count_cached(job)

    def _count_cached(self, job: Job) -> None:
        for cached in filter(None, map(job.cached_tokens, range(len(job.requests)))):
            self.metrics.cached_tokens.inc(cached)
            self.metrics.cache_hits.inc()

    def _on_end(self, job: Job, reason: str | None) -> None:
        self._jobs.pop(job).cancel()
        if job.first_at is None:
            self._set_queued(-1)
        elif isinstance(job.requests[0], EvaluationRequest):
            self._count_cached(job)  # only now is known of each
        if reason is not None:
            self.metrics.cancellations.labels(reason).inc()
        if reason != FAILED:
            self._worker.cancel(job)

    def _expire(self, job: Job) -> None:
        seconds = self.options.request_seconds
        message = f"the request took more than {seconds:g} s; ask for less, or try again later"
        headers = {"X-Should-Retry": "false"}  # for OpenAI's clients, which would try twice more
        job.end(TIMEOUT, RequestError(message, status=504, headers=headers))

    def _set_queued(self, change: int) -> None:
        self._n_queued += change
        self.metrics.queue.set(self._n_queued)
