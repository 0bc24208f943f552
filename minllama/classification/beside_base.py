"""Vectors of a text by a model without its adapters, and with them: two forward passes.

Heads that were fitted to the base read what adapters have changed only if these are disabled.
`minllama.classification.experts` evaluates such requests.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from minllama.engine.base import Engine
from minllama.engine.evaluation import Chunks
from minllama.engine.states import Choice, StatesRequest
from minllama.lora import adapters_disabled
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama


@dataclass(frozen=True, kw_only=True, eq=False)
class BesideBaseRequest(StatesRequest):
    """Vectors of a text; the result is one (D,) for each choice, first those of the base.

    Attributes:
        choices: read with the active adapters.
        base_choices: read without.
    """

    base_choices: tuple[Choice, ...]

    @cached_property
    def of_base(self) -> StatesRequest:
        return StatesRequest(ids=self.ids, choices=self.base_choices, last=self.last)

    @cached_property
    def of_adapters(self) -> StatesRequest:
        return replace(self.of_base, choices=self.choices)

    def check(self, config: LlamaConfig) -> None:
        """See `StatesRequest.check`."""
        self.of_base.check(config)
        self.of_adapters.check(config)

    @cached_property
    def group(self) -> Hashable:
        return BesideBaseRequest, self.choices, self.base_choices

    def compute(
        self,
        engine: Engine,
        requests: "Sequence[BesideBaseRequest]",  # type: ignore[override]  # those of its group
        cache: KVCache | None,
    ) -> Sequence[list[Tensor]]:
        """See `EvaluationRequest.compute`; one forward pass after the other."""
        with adapters_disabled(engine.llama):
            of_base = self.of_base.compute(engine, [r.of_base for r in requests], cache)
        own = self.of_adapters.compute(engine, [r.of_adapters for r in requests], cache)
        return [[*one, *other] for one, other in zip(of_base, own, strict=True)]

    def in_chunks(self, engine: Engine, cache: KVCache) -> Chunks:
        """See `EvaluationRequest.in_chunks`; the cache is filled twice.

        Adapters are disabled within a chunk only: others are answered between two.
        """
        results: list[Tensor] = []
        allowed = yield 0
        passes: list[tuple[StatesRequest, Callable[[Llama], AbstractContextManager[None]]]]
        passes = [(self.of_base, adapters_disabled), (self.of_adapters, lambda _: nullcontext())]
        for request, context in passes:
            chunks = request.in_chunks(engine, cache)
            next(chunks)
            while True:
                try:
                    with context(engine.llama):
                        n_read = chunks.send(allowed)
                except StopIteration as end:
                    results += end.value
                    break
                allowed = yield n_read
            cache.lengths = [0]
        return results
