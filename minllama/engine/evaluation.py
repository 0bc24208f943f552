"""Requests that forward passes over a given text answer, without a token being chosen.

What there is of them: `minllama.engine.scoring` (log-probabilities of continuations), `.states`
(hidden states of chosen layers) and `.log_probs` (of a text's own tokens). A scheduler computes
those together that may be, in the order in which they came.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch

from minllama.engine.base import Engine
from minllama.engine.sequence import check_text
from minllama.errors import MinllamaError
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache

MIN_SHARED_LEN = 16  # a shorter common beginning is not worth a cache of its own

# Receives how many tokens may be read, yields how many were, and returns the result.
Chunks = Generator[int, int, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationRequest(ABC):
    """A text, about which something is to be known.

    Attributes:
        ids: its token ids.
        shared_len: so many tokens at its beginning are those of other requests too, and are read
            once for all of them; 0 for none. It is less than all of them.
        salt: only requests of one salt share what was read.
        name: what errors call the text.
    """

    ids: tuple[int, ...]
    shared_len: int = 0
    salt: str = ""
    name: str = "the text"

    @property
    def is_exact(self) -> bool:
        """Whether nothing else that is computed may change a bit of the result.

        Then it is computed alone, unless the engine's values are batch-invariant; and what is read
        in chunks is read in the same ones whatever the budget, which is exceeded where it is less.
        """
        return False

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that are read once for all requests that begin with them."""
        return self.ids[: self.shared_len] if self.shared_len >= MIN_SHARED_LEN else ()

    @cached_property
    def length(self) -> int:
        """Tokens of its sequence in a batch."""
        return len(self.ids)

    @cached_property
    @abstractmethod
    def group(self) -> Hashable:
        """Equal for requests that one forward pass can answer together."""

    @abstractmethod
    def compute(
        self, engine: Engine, requests: Sequence[Self], cache: KVCache | None
    ) -> Sequence[Any]:
        """The results of some requests of one group, in one forward pass.

        Args:
            engine: whose model answers.
            requests: B of them.
            cache: of B rows, which hold their shared prefix; None without one.
        """

    @abstractmethod
    def in_chunks(self, engine: Engine, cache: KVCache) -> Chunks:
        """The result of one request that does not fit into one forward pass, chunk by chunk.

        Args:
            engine: whose model answers; it is causal.
            cache: of one row, which holds the shared prefix, if any, with room for all of it.
        """

    def check(self, config: LlamaConfig) -> None:
        """Refuse a text that the model cannot read.

        Raises:
            ContextError: it is longer than the context.
            MinllamaError: it is empty, or holds ids that the vocabulary does not have.
        """
        if not self.ids:
            raise MinllamaError(f"{self.name} has no tokens; give at least one")
        check_text(self.ids, self.length, config, self.name)


@dataclass(eq=False, slots=True)
class Evaluation:
    """A request that a scheduler has taken, until it is answered or cancelled.

    Attributes:
        request: what is to be known.
        result: the answer; None before.
        cached_tokens: of the text, that were read already, for others.
        has_ended: it is answered, or was cancelled.
    """

    request: EvaluationRequest
    result: Any = field(default=None, repr=False)
    cached_tokens: int = 0
    has_ended: bool = False

    def finish(self, result: Any) -> None:
        self.result, self.has_ended = result, True


def read_into(engine: Engine, ids: Sequence[int], cache: KVCache) -> Chunks:
    """Read what follows the tokens that a cache of one row holds, chunk by chunk."""
    allowed = yield 0
    while (start := cache.lengths[0]) < len(ids):
        chunk = torch.tensor([ids[start : start + allowed]], device=engine.device)
        engine.forward(chunk, cache, logits=None)
        allowed = yield chunk.shape[1]
    return cache
