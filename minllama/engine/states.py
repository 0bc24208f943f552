"""Hidden states of chosen layers, pooled to one vector for each text.

A scheduler answers `StatesRequest`s; training calls `pooled_states`, with gradients.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minllama.engine.base import Engine
from minllama.engine.evaluation import Chunks, EvaluationRequest
from minllama.engine.packing import hidden_states, layer_states
from minllama.errors import MinllamaError
from minllama.model.attention_layout import last_tokens
from minllama.model.config import LlamaConfig
from minllama.model.inputs import padded
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama
from minllama.options import POOLINGS

Pooling = Literal["last", "mean", "weighted-mean"]
Choice = tuple[int, Pooling]


@dataclass(frozen=True, kw_only=True, eq=False)
class StatesRequest(EvaluationRequest):
    """Vectors of a text; the result is one (D,) of float32 for each choice.

    Attributes:
        choices: pairs of a number of layers, 0 to n_layers, and a pooling.
        last: index of the token that the pooling `last` takes; None for the last one.
    """

    choices: tuple[Choice, ...]
    last: int | None = None

    def check(self, config: LlamaConfig) -> None:
        """See `EvaluationRequest.check`.

        Raises:
            MinllamaError: also if there is no such layer, pooling or token.
        """
        super().check(config)
        if not self.choices:
            raise MinllamaError("choices must name a layer and a pooling")
        for layer, pooling in self.choices:
            if not 0 <= layer <= config.n_layers or pooling not in POOLINGS:
                raise MinllamaError(
                    f"a choice is a number of layers, 0 to {config.n_layers}, and one of "
                    f"{', '.join(POOLINGS)}, not {layer!r} and {pooling!r}"
                )
        if self.last is not None and not 0 <= self.last < len(self.ids):
            raise MinllamaError(
                f"last must be 0 to {len(self.ids) - 1}, a token of {self.name}, not {self.last}"
            )

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """None: texts that share a prefix are packed, which computes it once without a cache."""
        return ()

    @cached_property
    def group(self) -> Hashable:
        return StatesRequest, self.choices

    def compute(
        self, engine: Engine, requests: "Sequence[StatesRequest]", cache: KVCache | None
    ) -> Sequence[list[Tensor]]:
        """See `EvaluationRequest.compute`."""
        vectors = states_of(engine.llama, requests)
        return [list(of_text) for of_text in zip(*vectors, strict=True)]

    def in_chunks(self, engine: Engine, cache: KVCache) -> Chunks:
        """See `EvaluationRequest.in_chunks`."""
        llama, last = engine.llama, len(self.ids) - 1 if self.last is None else self.last
        sums = [torch.zeros(engine.config.dim, device=engine.device) for _ in self.choices]
        weights = [0.0] * len(self.choices)
        deepest = max(layer for layer, _ in self.choices)
        allowed = yield 0
        while (start := cache.lengths[0]) < len(self.ids):
            engine.snapshot.check()
            ids = torch.tensor([self.ids[start : start + allowed]], device=engine.device)
            end = start + ids.shape[1]
            places = torch.arange(start, end, device=engine.device, dtype=torch.float32)
            for layer, state in enumerate(layer_states(llama, ids, cache=cache)):
                for number, (wanted, pooling) in enumerate(self.choices):
                    if wanted == layer:
                        of_token = {
                            "last": (places == last).float(),
                            "mean": torch.ones_like(places),
                            "weighted-mean": places + 1,
                        }[pooling]
                        h = normalized(llama, state[0], layer)
                        sums[number] = sums[number] + of_token @ h
                        weights[number] += float(of_token.sum())
                if layer == deepest:
                    break
            cache.advance([end - start])
            allowed = yield end - start
        return [total / weight for total, weight in zip(sums, weights, strict=True)]


def states_of(llama: Llama, requests: Sequence[StatesRequest]) -> list[Tensor]:
    """Vectors of B requests with the same choices, by one forward pass: (B, D) of each choice."""
    choices, (ids, mask, at) = requests[0].choices, batch_of(requests, llama.device)
    if len(choices) == 1:
        ((layer, pooling),) = choices
        return [pooled_states(llama, ids, mask, layer, pooling, at=at)]
    states = enumerate(layer_states(llama, ids, attention_mask=mask))
    return pooled_layers(llama, states, mask, choices, at)


def pooled_states(
    llama: Llama,
    ids: Tensor,
    mask: Tensor | None,
    layer: int,
    pooling: Pooling,
    *,
    at: Tensor | None = None,
    start: tuple[int, Tensor] | None = None,
) -> Tensor:
    """One vector of each text after so many layers; those above never run.

    Args:
        llama: receives gradients.
        ids: (B, T).
        mask: bool (B, T), true at real tokens, padding on either side; None where all are.
        layer: number of layers to run.
        pooling: see `pool`.
        at: (B,), flat indices of the tokens that the pooling `last` takes; None for the last real
            one of each text.
        start: fewer layers, and the state after them, from which to go on.

    Returns:
        (B, D), float32, normalized before pooling.
    """
    if pooling != "last":
        at = None
    elif at is None:
        at = last_tokens(ids, mask)
    # Where one token is pooled, no other has to go through all of the last layer.
    h = hidden_states(llama, layer, ids, mask, selected=at, start=start)
    h = normalized(llama, h, layer)
    return h if at is not None else pool(h, mask, pooling)


def batch_of(
    requests: Sequence[StatesRequest], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ids (B, T) and mask of requests, and the flat indices (B,) of their last tokens."""
    ids, mask = padded([request.ids for request in requests], device)
    lasts = [len(r.ids) - 1 if r.last is None else r.last for r in requests]
    starts = range(0, ids.numel(), ids.shape[1])
    at = [start + last for start, last in zip(starts, lasts, strict=True)]
    return ids, mask, torch.tensor(at, device=device)


def pooled_layers(
    llama: Llama,
    states: Iterable[tuple[int, Tensor]],
    mask: Tensor | None,
    choices: Sequence[Choice],
    at: Tensor | None = None,
) -> list[Tensor]:
    """The vectors (B, D) of each choice, in one forward pass.

    Args:
        llama: the model.
        states: numbers of layers and the states after them, as `layer_states` gives them; those
            above the deepest choice do not run.
        mask, at: as for `pooled_states`.
        choices: layers and poolings.
    """
    found: dict[Choice, Tensor] = {}
    deepest = max(layer for layer, _ in choices)
    for layer, h in states:
        poolings = [pooling for wanted, pooling in choices if wanted == layer]
        if poolings:
            h = normalized(llama, h, layer)
        for pooling in poolings:
            takes_one = pooling == "last" and at is not None
            found[layer, pooling] = h.flatten(0, 1)[at] if takes_one else pool(h, mask, pooling)
        if layer == deepest:
            break
    return [found[choice] for choice in choices]


def normalized(llama: Llama, h: Tensor, layer: int) -> Tensor:
    """Hidden states after `layer` layers, (..., D), normalized: float32, root mean square 1.

    After the last layer the model's own norm is used, which also has weights.
    """
    if layer == llama.config.n_layers:
        norm: Tensor = llama.norm(h)
        return norm.float()
    return F.rms_norm(h.float(), (h.shape[-1],), eps=llama.config.norm_eps)


def pool(h: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool to one vector per sequence: (B, T, D) -> (B, D), over real tokens only.

    The `last` token, the `mean` of all, or the `weighted-mean`, in which a token at position t
    weighs t (Muennighoff 2022, eq. 2).
    """
    if pooling == "last":
        return h.flatten(0, 1)[last_tokens(h, mask)]
    if mask is None:
        mask = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    weights = mask.to(h.dtype)
    if pooling == "weighted-mean":
        weights = weights * weights.cumsum(-1)  # 1, 2, 3 at the real tokens
    return torch.einsum("bt,btd->bd", weights / weights.sum(-1, keepdim=True), h)
