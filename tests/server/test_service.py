"""Claims about the service: results, admission, cancellation, time limits and the end."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from minllama.engine.log_probs import LogProbsRequest
from minllama.errors import OptionError
from minllama.generation.api import generate as library_generate
from minllama.options import GenerationOptions
from minllama.options.server import ServerOptions
from minllama.server.errors import RequestError
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
    return sum(jobs.scheduler.nbytes for jobs in service._worker._of_engine.values())


def is_empty(service: Service) -> bool:
    all_jobs = service._worker._of_engine.values()
    return not any(
        jobs.scheduler.is_busy or jobs.rows or jobs.left or jobs.evaluations for jobs in all_jobs
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
            await until(
                lambda: any(s.scheduler._prefill for s in service._worker._of_engine.values())
            )
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


def test_evaluations_run_beside_texts(registry: Registry) -> None:
    async def run() -> None:
        async with started(registry, token_budget=16, max_sequences=4) as (service, model):
            ids = prompts(model, 5)
            requests = [LogProbsRequest(ids=tuple(each), n_tokens=49152) for each in ids]
            job = service.submit(model, requests)
            texts = await generate(service, model, ids[:1], LONG, salt="")
            whole = asyncio.ensure_future(texts.whole())
            found = await job.results()
            for each, result in zip(ids, found, strict=True):
                logits = model.llama(torch.tensor([each])).logits[0, :-1].log_softmax(-1)
                expected = logits.gather(1, torch.tensor(each[1:]).unsqueeze(1)).flatten().tolist()
                assert [token.logprob for token in result] == pytest.approx(expected, abs=1e-4)
            gone = service.submit(model, requests * 20)
            gone.cancel()
            assert len((await whole)[0].token_ids) == 100
            await until(lambda: is_empty(service))
            assert memory_of(service) == 0

    asyncio.run(run())


def test_evaluations_of_several_requests_are_computed_together(registry: Registry) -> None:
    """Those of one group, up to the token budget; what they share is read once."""

    async def run() -> None:
        async with started(registry, token_budget=256) as (service, model):
            seen: list[int] = []
            compute = LogProbsRequest.compute

            def counted(self: Any, engine: Any, requests: Any, cache: Any) -> Any:
                seen.append(len(requests))
                return compute(self, engine, requests, cache)

            shared = tuple(model.tokenizer.encode("a long beginning that all have, " * 6))
            lasts = [tuple(ids[:8]) for ids in prompts(model, 5)]
            requests = [
                LogProbsRequest(
                    ids=shared + last, shared_len=len(shared), start=len(shared) + 1, salt="a"
                )
                for last in lasts
            ]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(LogProbsRequest, "compute", counted)
                jobs = [service.submit(model, [request]) for request in requests]
                found = await asyncio.gather(*(job.results() for job in jobs))
            assert max(seen) >= 4  # the first may have begun alone
            assert sum(seen) == len(requests)
            for request, (result,) in zip(requests, found, strict=True):
                logits = model.llama(torch.tensor([request.ids])).logits[0].detach().log_softmax(-1)
                expected = [
                    float(logits[i - 1, request.ids[i]])
                    for i in range(request.start, len(request.ids))
                ]
                assert [token.logprob for token in result] == pytest.approx(expected, abs=1e-4)
            n_cached = [job.cached_tokens() for job in jobs]  # the first one has read it
            assert n_cached == [0, *[len(shared)] * (len(jobs) - 1)]
            metrics = service.metrics
            assert metrics.evaluated_texts._value.get() == len(requests)
            assert metrics.cached_tokens._value.get() == sum(n_cached)
            await until(lambda: is_empty(service))

    asyncio.run(run())


@pytest.mark.parametrize("ends_first", ["by itself", "by its text"])
def test_samples_that_end_in_different_ways(registry: Registry, ends_first: str) -> None:
    """One ends by length and one by its text, whichever is first: nothing is left."""

    async def run() -> None:
        async with started(registry) as (service, model):
            options = GenerationOptions(max_new_tokens=20, n=2, seed=4, temperature=1.0)
            texts = await generate(service, model, prompts(model, 1), options, salt="")
            seen: set[int] = set()
            first = ends_first == "by its text"
            async for tokens in texts.job:
                seen |= {token.row for token in tokens}
                last = any(token.finish_reason for token in tokens)
                if 1 in seen and (first or last):
                    texts.job.finish(1)
            assert texts.job.has_ended
            await until(lambda: is_empty(service))

    asyncio.run(asyncio.wait_for(run(), 20))
