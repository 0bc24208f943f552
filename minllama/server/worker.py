"""The thread that computes: it owns engines and schedulers, and nobody else touches them.

It takes commands between two steps, steps each scheduler that has something to do, in turn, and
hands what comes out to the event loop.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from minllama.engine.base import Engine
from minllama.engine.evaluation import Evaluation, EvaluationRequest
from minllama.engine.prefix_cache import PrefixCache
from minllama.engine.scheduler import Scheduler
from minllama.engine.sequence import Token
from minllama.errors import MinllamaError
from minllama.options.server import ServerOptions
from minllama.server.jobs import Job, Update, numbered
from minllama.server.metrics import Metrics

logger = logging.getLogger("minllama.server")

# Keys and values of evaluations that are computed together.
BATCH_BYTES = 2**28
LEAST_BATCH_TOKENS, MOST_BATCH_TOKENS = 1024, 16384

# With many streams their intervals are longer, by this much at most, to have so many events in all.
EVENTS_PER_SECOND, MOST_TIMES_LONGER = 100, 4

Deliver = Callable[[list[tuple[Job, Update]]], None]


class _EngineJobs:
    """One engine's scheduler, and the jobs that it works on."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self.engine, self._options = engine, options
        self.rows: dict[int, tuple[Job, int]] = {}  # sequence's index -> its job, and row in it
        self.left: dict[Job, int] = {}  # sequences and evaluations that have not ended
        self.evaluations: dict[Evaluation, tuple[Job, int]] = {}  # -> its job, and number in it
        self.reset()

    def reset(self) -> None:
        """Begin with an empty scheduler, and no job."""
        size = self._options.prefix_cache_bytes
        self.prefixes = PrefixCache(size) if size else None
        self.scheduler = Scheduler(
            self.engine,
            token_budget=max(self._options.token_budget, self._options.max_sequences + 1),
            max_sequences=self._options.max_sequences,
            prefix_cache=self.prefixes,
            batch_tokens=batch_tokens_of(self.engine),
        )
        self.rows, self.left, self.evaluations = {}, {}, {}

    def add(self, job: Job) -> None:
        """Let a job's requests join, all or none."""
        parts: list[Any] = []
        try:
            for request in job.requests:
                is_evaluation = isinstance(request, EvaluationRequest)
                join = self.scheduler.evaluate if is_evaluation else self.scheduler.add
                parts.append(join(request))
        except BaseException:
            self.scheduler.cancel(*(part for _, part in numbered(parts)))
            raise
        job.parts = parts
        n = 0
        for number, part in enumerate(parts):
            if not isinstance(part, list):
                self.evaluations[part] = job, number
        for row, part in numbered(parts):
            n += 1
            if hasattr(part, "index"):
                self.rows[part.index] = job, row
        self.left[job] = n

    def cancel(self, job: Job, row: int | None = None) -> None:
        """Take a job's sequences out at once, or one of them."""
        if job not in self.left:
            return
        dropped = [
            part
            for number, part in numbered(job.parts)
            if row in (None, number) and not part.has_ended
        ]
        self.scheduler.cancel(*dropped)
        for part in dropped:
            if isinstance(part, Evaluation):
                self.evaluations.pop(part, None)
            else:
                self.rows.pop(part.index, None)
        self.left[job] -= len(dropped)
        if row is None or not self.left[job]:
            del self.left[job]

    def step(self) -> list[tuple[Job, Update]]:
        """Take one step; the updates of each job that has some."""
        tokens: dict[Job, list[Token]] = {}
        results: dict[Job, list[tuple[int, Any]]] = {}
        for token in self.scheduler.step():
            if (found := self.rows.get(token.row)) is None:
                continue
            job, row = found
            tokens.setdefault(job, []).append(token._replace(row=row))
            if token.finish_reason is not None:
                del self.rows[token.row]
                self.left[job] -= 1
        for part in self.scheduler.evaluated:
            job, number = self.evaluations.pop(part)
            results.setdefault(job, []).append((number, part.result))
            self.left[job] -= 1
        updates = []
        for job in dict.fromkeys([*tokens, *results]):
            is_last = not self.left[job]
            updates.append((job, Update(tokens.get(job, ()), results.get(job, ()), is_last)))
            if is_last:
                del self.left[job]
        return updates


class Worker:
    """A thread that steps schedulers.

    Args:
        options: the bounds of a scheduler.
        deliver: takes the updates of jobs; called from this thread.
        metrics: counts.
    """

    def __init__(self, options: ServerOptions, deliver: Deliver, metrics: Metrics) -> None:
        self._options, self._deliver, self._metrics = options, deliver, metrics
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._of_engine: dict[Engine, _EngineJobs] = {}
        self._of_job: dict[Job, _EngineJobs] = {}
        # Tokens that wait for more, so that an event has several.
        self._held: dict[Job, Update] = {}
        self._sent: dict[Job, float] = {}  # when a job's last event went out
        self._thread = threading.Thread(target=self._loop, name="minllama-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End after the step that is being taken; without effect on a thread that has ended."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def submit(self, job: Job) -> None:
        """Let a job's requests join before the next step."""
        self._commands.put(partial(self._submit, job))

    def cancel(self, job: Job, row: int | None = None) -> None:
        """Take a job out before the next step, or one of its rows."""
        self._commands.put(partial(self._cancel, job, row))

    def run(self, function: Callable[[], Any]) -> "Future[Any]":
        """Call a function between two steps."""
        future: Future[Any] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        self._commands.put(call)
        return future

    def _submit(self, job: Job) -> None:
        if job.has_ended:  # cancelled meanwhile
            return
        jobs = self._jobs_of(job.model.engine)
        try:
            jobs.add(job)
        except Exception as error:
            if not isinstance(error, MinllamaError):
                logger.exception("a request could not be added")
            self._deliver([(job, Update(is_last=True, error=error))])
        else:
            self._of_job[job] = jobs

    def _cancel(self, job: Job, row: int | None) -> None:
        jobs = self._of_job.get(job)
        if jobs is None:
            return
        jobs.cancel(job, row)
        if job not in jobs.left:
            del self._of_job[job]
            self._sent.pop(job, None)
            held = self._held.pop(job, None)
            if row is not None and held is not None:  # the last tokens of its other rows
                self._deliver([(job, held._replace(is_last=True))])
        self._gauge()

    def _jobs_of(self, engine: Engine) -> _EngineJobs:
        if engine not in self._of_engine:
            self._of_engine[engine] = _EngineJobs(engine, self._options)
        return self._of_engine[engine]

    def _loop(self) -> None:
        while self._take_commands():
            for jobs in list(self._of_engine.values()):
                if jobs.scheduler.is_busy:
                    if self._held:  # a step over prompts may take longer than the interval
                        self._deliver(self._due([]))
                    self._step(jobs)

    def _take_commands(self) -> bool:
        """Obey what has come, and wait for it where there is nothing else to do."""
        is_idle = not any(jobs.scheduler.is_busy for jobs in self._of_engine.values())
        try:
            while True:
                command = self._commands.get(block=is_idle)
                if command is None:
                    return False
                command()
                is_idle = False
        except queue.Empty:
            return True

    def _step(self, jobs: _EngineJobs) -> None:
        try:
            updates = jobs.step()
        except Exception as error:
            # Of the step, not of a sequence: memory, or a fault. The others go on.
            logger.exception("a step failed; its requests are ended")
            updates = [(job, Update(is_last=True, error=_step_error(error))) for job in jobs.left]
            jobs.reset()
        self._count(updates)
        self._deliver(self._due(updates))
        for job, update in updates:
            if update.is_last:
                self._of_job.pop(job, None)
                self._sent.pop(job, None)

    def _due(self, updates: list[tuple[Job, Update]]) -> list[tuple[Job, Update]]:
        """What is to be delivered now: the first and the last of a job, and the rest by intervals.

        Each event takes time of the processor that computes, so a stream has no more of them than
        an eye can follow.
        """
        now, interval = time.perf_counter(), self._interval()
        for job, update in updates:
            if (held := self._held.get(job)) is not None:
                update = update._replace(
                    tokens=[*held.tokens, *update.tokens],
                    results=[*held.results, *update.results],
                )
            self._held[job] = update
        due = [
            (job, update)
            for job, update in self._held.items()
            if update.is_last or now - self._sent.get(job, 0.0) >= interval
        ]
        for job, _ in due:
            del self._held[job]
            self._sent[job] = now
        return due

    def _interval(self) -> float:
        """Seconds between two events of a job, of which there are as many as now."""
        least = self._options.stream_interval
        return max(least, min(len(self._of_job) / EVENTS_PER_SECOND, MOST_TIMES_LONGER * least))

    def _count(self, updates: list[tuple[Job, Update]]) -> None:
        metrics = self._metrics
        n_tokens = sum(len(update.tokens) for _, update in updates)
        if n_tokens:
            metrics.batch.observe(n_tokens)
            metrics.generated_tokens.inc(n_tokens)
        n_evaluated = sum(len(update.results) for _, update in updates)
        if n_evaluated:
            metrics.evaluation_batch.observe(n_evaluated)
            metrics.evaluated_texts.inc(n_evaluated)
        self._gauge()

    def _gauge(self) -> None:
        metrics, all_jobs = self._metrics, self._of_engine.values()
        metrics.running.set(sum(len(each.scheduler.running) for each in all_jobs))
        metrics.cache_bytes.set(sum(each.scheduler.nbytes for each in all_jobs))
        cached = [each.prefixes.nbytes for each in all_jobs if each.prefixes is not None]
        metrics.prefix_cache_bytes.set(sum(cached))


def batch_tokens_of(engine: Engine) -> int:
    """How many tokens of evaluations are computed together, shared prefixes counted in each row.

    Rows hold copies of the prefix that they share, and this bounds what those take; the token
    budget bounds how many new tokens a batch reads.
    """
    per_token = engine.new_cache(1, 1).nbytes
    return max(LEAST_BATCH_TOKENS, min(BATCH_BYTES // per_token, MOST_BATCH_TOKENS))


def _step_error(error: Exception) -> Exception:
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error)
    )
    return MemoryError("out of memory") if is_memory else error
