"""Engines compute the forward passes of a model for generation and scoring.

`Engine` is what all of them answer to, and itself the one that runs the modules.
`minllama.engine.choose.engine_for` opens the fastest one that computes exactly a model.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minllama.engine import packing
from minllama.engine.support import Snapshot
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama, LlamaOutput


class TokenTree(NamedTuple):
    """Where new tokens are written in a cache's rows, and what each attends to.

    A token attends to the first slots of its row, and to ancestors beyond them.

    Attributes:
        slots: (B, T) or (1, T), of each token; no two of a row are equal.
        seen: (B, T), how many slots from the first on a token attends to.
        ancestors: (B, T, A), int64, further slots that it attends to, its own among them, then -1;
            A from 1 to 128.
    """

    slots: Tensor
    seen: Tensor
    ancestors: Tensor


class Engine:
    """A model made ready to run: here by its modules, whose results every other engine matches.

    The model does not change while its engine is open; code that changes it opens another engine. A
    pass over a prompt checks for changes (`Snapshot` lists which), a decode step does not.

    Args:
        llama: a model.

    Attributes:
        backend: who computes: `eager`, `cpu` or `cuda_graph`.
        llama: the model.
        config: the model's.
        device: where it is.
        cache_dtype: what `new_cache` keeps keys and values in.
        is_batch_invariant: a sequence's values are the same bits whatever it is computed with, and
            there are `tree_logits`.
        snapshot: the model as it was when it was opened.
    """

    backend = "eager"

    def __init__(self, llama: Llama) -> None:
        self.llama = llama
        self.config = llama.config
        self.device = llama.device
        self.cache_dtype = llama.dtype
        self.is_batch_invariant = False
        self.snapshot = Snapshot(llama)

    @staticmethod
    def runs(llama: Llama) -> bool:
        """Whether this kind of engine computes exactly what a model's modules do, on its device."""
        return True

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
    ) -> LlamaOutput:
        """Read tokens that continue what a cache holds, which is advanced; no gradients.

        Args:
            ids: (B, T) token ids.
            cache: of B rows, with room for T more tokens in each.
            attention_mask: (B, T), true at real tokens, padding on the right; None: all are real.
            logits: of the "last" real token of each row, of "all", or of none.

        Returns:
            Hidden states after the last norm, and logits, (B, V) or (B, T, V).

        Raises:
            MinllamaError: the tokens do not fit into the context or the cache, or the model has
                changed since the engine was opened.
        """
        self._check_model(ids, cache, logits)
        with torch.no_grad():
            return packing.forward(
                self.llama, ids, attention_mask=attention_mask, cache=cache, logits=logits
            )

    def tree_logits(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        tree: TokenTree,
        cache: KVCache,
        logits_of: Tensor,
    ) -> Tensor:
        """Read trees of tokens after what a cache holds, which is written to but not advanced.

        Only engines whose values are batch-invariant have it.

        Args:
            ids: (B, T) token ids.
            positions: (B, T), in their texts.
            mask: (B, T), true at real tokens.
            tree: what they attend to.
            cache: of B rows of equal length, with room for T more tokens in each.
            logits_of: (M,), flat indices b * T + t of real tokens, in ascending order.

        Returns:
            (M, V), float32.
        """
        raise NotImplementedError

    def _check_model(
        self, ids: Tensor, cache: KVCache, logits: Literal["all", "last"] | None
    ) -> None:
        """Refuse a model that has changed, in a pass over a prompt.

        A decode step does not look for changes, with draft tokens (whose logits are all read) or
        without: it would take a tenth of it.
        """
        is_decode_step = cache.max_len > 0 and (ids.shape[1] == 1 or logits == "all")
        if not is_decode_step:
            self.snapshot.check()
