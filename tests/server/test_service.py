"""Claims about the service: results, admission, cancellation, time limits and the end."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from minllama.errors import OptionError
from minllama.generation.api import generate as library_generate
from minllama.options import GenerationOptions
from minllama.options.server import ServerOptions
from minllama.server.errors import RequestError
from minllama.server.jobs import Job
from minllama.server.registry import Registry, ServedModel
from minllama.server.service import Service
from minllama.server.texts import Texts, generate
from tests.server.running import LOADING

LONG = GenerationOptions(max_new_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module")
def registry(base: Path) -> Registry:
    registry = Registry({"tiny": str(base)}, None, LOADING)
    registry.load()
    return registry


@asynccontextmanager
async def started(registry: Registry, **options: Any) -> AsyncIterator[tuple[Service, ServedModel]]:
    service = Service(registry, ServerOptions(**options))
    service.start()
    try:
        yield service, registry.get("tiny")
    finally:
        service.close()


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it does not come about")


def memory_of(service: Service) -> int:
    """Bytes of keys and values of all that has not ended."""
    return sum(lane.scheduler.nbytes for lane in service._worker._lanes.values())


def is_empty(service: Service) -> bool:
    lanes = service._worker._lanes.values()
    return not any(
        lane.scheduler.is_busy or lane.rows or lane.left or lane.passes for lane in lanes
    ) and not (service._worker._of_job or service._jobs)


def slow_down(monkeypatch: pytest.MonkeyPatch, model: ServedModel, seconds: float = 0.02) -> None:
    """Let each forward pass take its time."""
    forward = model.engine.forward

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return forward(*args, **options)

    monkeypatch.setattr(model.engine, "forward", slow)


def prompts(model: ServedModel, n: int) -> list[list[int]]:
    texts = [f"number {i} of several, " * (i % 5 + 1) for i in range(n)]
    return [model.tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_the_library(registry: Registry, temperature: float) -> None:
    options = GenerationOptions(
        max_new_tokens=12, temperature=temperature, seed=3, n=2, logprobs=2, stop=("er",)
    )

    async def run() -> list[Texts]:
        async with started(registry, token_budget=16, max_sequences=8) as (service, model):
            texts = [
                await generate(service, model, [ids], options, salt="") for ids in prompts(model, 9)
            ]
            await asyncio.gather(*(each.whole() for each in texts))
            await until(lambda: is_empty(service))
            assert memory_of(service) == 0
            return texts

    found = asyncio.run(run())
    model = registry.get("tiny")
    for texts in found:
        expected = library_generate(model.llama, model.tokenizer, texts.prompts, options)
        for ours, theirs in zip(texts.results, expected, strict=True):
            assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
            assert ours.finish_reason == theirs.finish_reason
            assert ours.logprobs is not None
            assert theirs.logprobs is not None
            assert [t.logprob for t in ours.logprobs] == pytest.approx(
                [t.logprob for t in theirs.logprobs], abs=1e-4
            )


def test_a_cancelled_job_leaves_within_a_step_and_no_other_notices(registry: Registry) -> None:
    async def run() -> None:
        async with started(registry, token_budget=32, max_sequences=2) as (service, model):
            ids = prompts(model, 1)[0]
            alone = await generate(service, model, [ids], LONG, salt="a")
            text = (await alone.whole())[0].text
            kept = await generate(service, model, [ids], LONG, salt="b")
            task = asyncio.ensure_future(kept.whole())
            # One that decodes, one that waits for a slot, one that waits and has several rows.
            several = GenerationOptions(max_new_tokens=90, n=2, ignore_eos=True)
            running = await generate(service, model, [ids], LONG, salt="c")
            pieces = running.pieces()
            await anext(pieces)
            queued = await generate(service, model, [ids], LONG, salt="d")
            many = await generate(service, model, [ids], several, salt="e")
            for each in (queued, running, many):
                each.job.cancel()
            await pieces.aclose()
            (result,) = await task
            assert result.text == text
            await until(lambda: is_empty(service))
            assert memory_of(service) == 0
            metric = service.metrics.cancellations.labels("disconnected")
            assert metric._value.get() == 3
            assert service.metrics.queue._value.get() == 0

    asyncio.run(run())


def test_a_prompt_that_is_being_read_can_be_cancelled(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with started(registry, token_budget=8, max_sequences=4) as (service, model):
            slow_down(monkeypatch, model)
            ids = prompts(model, 5)[4] * 2
            texts = await generate(service, model, [ids], LONG, salt="")
            await until(lambda: any(s.scheduler._prefill for s in service._worker._lanes.values()))
            texts.job.cancel()
            await until(lambda: is_empty(service))
            assert memory_of(service) == 0

    asyncio.run(run())


def test_the_queue_is_bounded(registry: Registry) -> None:
    async def run() -> None:
        limits = {"max_sequences": 1, "max_queue": 3}
        async with started(registry, **limits) as (service, model):
            ids = prompts(model, 1)[0]
            first = await generate(service, model, [ids], LONG, salt="")
            pieces = first.pieces()
            await anext(pieces)
            waiting = [await generate(service, model, [ids], LONG, salt="") for _ in range(3)]
            with pytest.raises(RequestError) as caught:
                await generate(service, model, [ids], LONG, salt="")
            assert caught.value.status == 429
            assert int(caught.value.headers["Retry-After"]) >= 1
            assert service.metrics.rejections.labels("queue")._value.get() == 1
            waiting[0].job.cancel()
            waiting.append(await generate(service, model, [ids], LONG, salt=""))
            await pieces.aclose()
            for texts in waiting[1:]:
                assert len((await texts.whole())[0].token_ids) == 100

    asyncio.run(run())


def test_more_samples_than_may_run_are_refused_before_they_wait(registry: Registry) -> None:
    async def run() -> None:
        async with started(registry, max_sequences=2) as (service, model):
            options = GenerationOptions(n=3, max_new_tokens=2)
            texts = await generate(service, model, prompts(model, 2), options, salt="")
            with pytest.raises(RequestError, match="n = 3"):
                await texts.whole()
            await until(lambda: is_empty(service))

    asyncio.run(run())


def test_a_request_has_a_time_limit(registry: Registry) -> None:
    async def run() -> None:
        async with started(registry, request_seconds=0.05) as (service, model):
            block = threading.Event()
            service._worker.run(block.wait)
            texts = await generate(service, model, prompts(model, 1), LONG, salt="")
            with pytest.raises(RequestError) as caught:
                await texts.whole()
            assert caught.value.status == 504
            block.set()
            await until(lambda: is_empty(service))

    asyncio.run(run())


def test_a_step_that_fails_ends_its_requests_and_the_server_goes_on(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with started(registry) as (service, model):
            ids = prompts(model, 1)
            texts = await generate(service, model, ids, LONG, salt="")
            pieces = texts.pieces()
            await anext(pieces)

            def fail(*args: Any, **options: Any) -> None:
                raise RuntimeError("secret of the inside")

            monkeypatch.setattr(model.engine, "forward", fail)
            with pytest.raises(RequestError) as caught:
                async for _ in pieces:
                    pass
            assert caught.value.status == 500
            assert "secret" not in caught.value.message
            monkeypatch.undo()
            again = await generate(service, model, ids, LONG, salt="")
            assert len((await again.whole())[0].token_ids) == 100

    asyncio.run(run())
    assert "secret of the inside" in caplog.text


def test_requests_are_refused_before_and_after(registry: Registry) -> None:
    async def run() -> None:
        service = Service(registry, ServerOptions())
        model = registry.get("tiny")
        with pytest.raises(RequestError) as loading:
            service.submit(model, [])
        service.start()
        texts = await generate(service, model, prompts(model, 1), LONG, salt="")
        service.begin_drain()
        with pytest.raises(RequestError) as draining:
            service.submit(model, [])
        assert (loading.value.status, draining.value.status) == (503, 503)
        assert len((await texts.whole())[0].token_ids) == 100
        service.close()

    asyncio.run(run())


def test_what_still_runs_at_the_end_gets_an_error(registry: Registry) -> None:
    async def run() -> None:
        async with started(registry) as (service, model):
            texts = await generate(service, model, prompts(model, 1), LONG, salt="")
            pieces = texts.pieces()
            await anext(pieces)
            service.end_all()
            with pytest.raises(RequestError, match="shutting down"):
                async for _ in pieces:
                    pass

    asyncio.run(run())


def test_work_between_two_steps_and_on_threads(registry: Registry) -> None:
    async def run() -> None:
        async with started(registry) as (service, _):
            name = await service.run(lambda: threading.current_thread().name)
            assert name == "minllama-worker"
            with pytest.raises(OptionError):
                await service.run(lambda: GenerationOptions(n=0))
            assert await service.in_thread(max, 1, 2) == 2
            wait = threading.Event()
            with pytest.raises(RequestError, match=r"0\.01 s"):
                await service.in_thread(wait.wait, timeout=0.01)
            wait.set()

    asyncio.run(run())


class Pass:
    """A request that needs only forward passes, as a scheduler would end it in a step."""

    def __init__(self, result: Any) -> None:
        self.has_ended, self.error, self.result = False, None, result


def test_requests_for_passes_alone_give_their_results(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minllama.engine.scheduler import Scheduler

    passes: list[Pass] = []
    add, step, cancel = Scheduler.add, Scheduler.step, Scheduler.cancel

    def add_pass(self: Scheduler, request: Any, **options: Any) -> Any:
        if isinstance(request, Pass):
            passes.append(request)
            return request
        return add(self, request, **options)

    def step_pass(self: Scheduler) -> Any:
        tokens = step(self) if add_is_busy(self) else []
        for each in passes[:1]:
            each.has_ended = True
            passes.remove(each)
        return tokens

    def cancel_pass(self: Scheduler, part: Any) -> None:
        if isinstance(part, Pass):
            part.has_ended = True
            passes.remove(part)
        else:
            cancel(self, part)

    is_busy = Scheduler.is_busy.fget
    assert is_busy is not None

    def add_is_busy(self: Scheduler) -> bool:
        return bool(is_busy(self))

    monkeypatch.setattr(Scheduler, "add", add_pass)
    monkeypatch.setattr(Scheduler, "step", step_pass)
    monkeypatch.setattr(Scheduler, "cancel", cancel_pass)
    monkeypatch.setattr(Scheduler, "is_busy", property(lambda s: add_is_busy(s) or bool(passes)))

    async def run() -> None:
        async with started(registry) as (service, model):
            job: Job = service.submit(model, [Pass("one"), Pass("two")])
            texts = await generate(service, model, prompts(model, 1), LONG, salt="")
            assert await job.results() == ["one", "two"]
            assert len((await texts.whole())[0].token_ids) == 100
            gone = service.submit(model, [Pass("three"), Pass("four"), Pass("five")])
            gone.cancel()
            await until(lambda: is_empty(service))
            assert not passes

    asyncio.run(run())
