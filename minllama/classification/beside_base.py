"""Vectors of a text by a model without its adapters, and with them.

Heads that were fitted to the base read what adapters have changed only if these are disabled. That
is a second forward pass, from the lowest layer with adapters on.
`minllama.classification.experts` evaluates such requests.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from minllama.engine.base import Engine
from minllama.engine.evaluation import Chunks
from minllama.engine.packing import layer_states
from minllama.engine.states import Choice, StatesRequest, batch_of, pooled_layers
from minllama.lora import adapters_disabled, lora_layers
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama


def pooled_beside_base(
    llama: Llama,
    ids: Tensor,
    mask: Tensor | None,
    base_choices: Sequence[Choice],
    choices: Sequence[Choice],
    *,
    at: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Vectors (B, D) of choices of the base, and of others of the model with its adapters.

    Args:
        llama: with adapters.
        ids, mask, at: as for `pooled_states`.
        base_choices, choices: layers and poolings.
    """
    numbers = [int(name.split(".")[1]) for name in lora_layers(llama)]
    lowest = min([*numbers, *(layer for layer, _ in choices)])
    shared: list[Tensor] = []

    def noted() -> Iterator[tuple[int, Tensor]]:
        for layer, h in enumerate(layer_states(llama, ids, attention_mask=mask)):
            if layer == lowest:
                shared.append(h)
            yield layer, h

    with adapters_disabled(llama):
        of_base = pooled_layers(llama, noted(), mask, base_choices, at)
    start = (lowest, shared[0]) if shared else None
    states = layer_states(llama, ids, attention_mask=mask, start=start)
    numbered = enumerate(states, lowest if shared else 0)
    return of_base, pooled_layers(llama, numbered, mask, choices, at)


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
        """See `EvaluationRequest.compute`."""
        inputs = batch_of(requests, engine.device)
        of_base, own = pooled_beside_base(
            *(engine.llama, *inputs[:2], self.base_choices, self.choices), at=inputs[2]
        )
        return [list(of_text) for of_text in zip(*of_base, *own, strict=True)]

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
