"""Engines: who computes the forward passes of a model that generates or is asked for scores.

`engine_for` opens the fastest one that computes exactly this model; `Engine` is what all of them
answer to, and itself the one that runs the modules.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache


class Engine:
    """A model made ready to run: here by its modules, which is what every other engine equals.

    Args:
        llama: a `minllama.Llama`, or whatever answers as one does.

    Attributes:
        backend: who computes: `eager`, `cpu` or `cuda_graph`.
        config: the model's.
        device: where it is.
        cache_dtype: what `new_cache` keeps keys and values in.
    """

    backend = "eager"

    def __init__(self, llama: Any) -> None:
        self.llama = llama
        self.config: LlamaConfig = llama.config
        self.device: torch.device = llama.device
        self.cache_dtype: torch.dtype = llama.cache_dtype

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache of `rows` sequences of up to `capacity` tokens."""
        return KVCache(self.config, rows, capacity, dtype=self.cache_dtype, device=self.device)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache,
        *,
        attention_mask: Tensor | None = None,
        logits: Literal["all", "last"] | None = "last",
    ) -> Any:
        """Read tokens that continue what a cache holds, which is advanced.

        Args:
            ids: (B, T) token ids.
            cache: of B rows, with room for T more tokens in each.
            attention_mask: (B, T), true at real tokens, padding on the right; None: all are real.
            logits: of the "last" real token of each row, of "all", or of none.

        Returns:
            A `LlamaOutput`: hidden states, and logits (B, V) or (B, T, V).

        Raises:
            MinllamaError: the tokens do not fit into the context or the cache.
        """
        return self.llama(ids, attention_mask=attention_mask, cache=cache, logits=logits)


def engine_for(llama: Any) -> Engine:
    """The fastest engine that computes exactly this model."""
    return Engine(llama)
