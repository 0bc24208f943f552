"""Requests for generated tokens, and the sequences that a scheduler makes from them.

How tokens are chosen is the caller's: `Sampler`, `Constraint` and `Drafter` are what a scheduler
asks of it, and `minllama.generation` has them.
"""

import random
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from minllama.errors import ContextError, MinllamaError, OptionError
from minllama.model.config import LlamaConfig

FinishReason = Literal["stop", "length", "error"]


class Token(NamedTuple):
    """One token of one sequence.

    Attributes:
        row: index of the sequence: prompt * n + sample.
        id: the token; None where the sequence ended with none: its prompt fills the context, or
            there was an error.
        logprob: its log-probability under the model (natural logarithm, before bias, penalties,
            temperature and filters); None unless requested.
        alternatives: the most likely tokens and their log-probabilities, as many as requested.
        finish_reason: why the sequence ends with it: `stop` (id is a stop id, or the constraint is
            met), `length`, or `error` (`Sequence.error`, of a scheduler only: generation raises
            it).
    """

    row: int
    id: int | None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


class Constraint(Protocol):
    """Restricts one sequence's continuation; `minllama.generation.constraints` makes them."""

    def forbid(self, logits: Tensor) -> None:
        """Set the logits (V,) of tokens that may not come next to -inf, in place."""

    def accept(self, token_id: int) -> None:
        """Record the chosen token."""

    def is_complete(self) -> bool:
        """Whether no token can follow."""


class Drafter(Protocol):
    """Guesses how one sequence continues; `minllama.generation.speculative` has one."""

    def draft(self, ids: AnySequence[int], most: int) -> list[int]:
        """Up to the given number of tokens that may come next."""


class Sampler(Protocol):
    """Chooses next tokens; any callable. Sequences with equal samplers are passed together."""

    def __call__(self, logits: Tensor, sequences: "list[Sequence]", /) -> Tensor:
        """(B, V) logits of B sequences to (B,) ids on the same device, without waiting for it.

        -1 where no token can be chosen, since logits are NaN or infinite.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to be continued.

    Attributes:
        ids: token ids of the prompt, which must not change.
        sampler: how tokens are chosen.
        max_new_tokens: at most so many, and never more than the context has room for.
        n: independent samples, which share the prompt's prefill.
        seed: sample i draws by `random.Random(f"{seed}/{i}")`.
        stop_ids: tokens that end a sequence.
        n_tokens: only ids below this are chosen, where the model's vocabulary is padded beyond the
            tokenizer's; None for all.
        logprobs: report log-probabilities, and so many alternatives; None for neither.
        make_constraint: gives each sample a constraint of its own.
        make_drafter: gives each sample a drafter of its own. Drafts are for samplers that choose
            the most likely token; they are checked while the sequence runs alone.
        salt: only requests of one salt share cached prefixes: by the time to its first token a
            caller could learn what others have sent.
        name: what errors call the prompt.
    """

    ids: list[int]
    sampler: Sampler
    max_new_tokens: int
    n: int = 1
    seed: str = ""
    stop_ids: frozenset[int] = frozenset()
    n_tokens: int | None = None
    logprobs: int | None = None
    make_constraint: Callable[[], Constraint] | None = None
    make_drafter: Callable[[], Drafter] | None = None
    salt: str = ""
    name: str = "the prompt"

    def check(self, config: LlamaConfig) -> None:
        """Refuse a prompt that a model cannot continue.

        Raises:
            ContextError: it is longer than the context.
            MinllamaError: it is empty, or contains ids outside the vocabulary.
            OptionError: `n` is less than 1.
        """
        ids = self.ids
        if self.n < 1:
            raise OptionError(f"n must be 1 or more, not {self.n}")
        if not ids:
            raise MinllamaError(f"{self.name} is empty; give at least one token to continue")
        check_text(ids, len(ids), config, self.name)


def check_text(ids: AnySequence[int], n_tokens: int, config: LlamaConfig, name: str) -> None:
    """Refuse a text that a model cannot read.

    Args:
        ids: its token ids.
        n_tokens: of its sequence, which may have more than the text.
        config: the model's.
        name: what errors call the text.

    Raises:
        ContextError: it is longer than the context.
        MinllamaError: it contains ids outside the vocabulary.
    """
    if n_tokens > config.context_len:
        raise ContextError(
            f"{name} has {n_tokens} tokens and the model's context is {config.context_len}; "
            "shorten it"
        )
    bad = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if bad is not None:
        raise MinllamaError(
            f"{name} holds the token id {bad}, and the model knows 0 to "
            f"{config.vocab_size - 1}; its tokenizer is of another model"
        )


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request, which grows until it ends or is cancelled.

    Attributes:
        index: a running number that its tokens refer to.
        request: what it is a sample of.
        ids: the prompt's tokens and those that were chosen.
        remaining: new tokens that it may still get.
        draws: its own random numbers.
        constraint: its own, or None.
        drafter: its own, or None.
        cached_tokens: of the prompt, that a prefix cache had.
        has_ended: it gets no more tokens: it is finished, or was cancelled.
        finish_reason: why it ended; None before, and if it was cancelled.
        error: what ended it, where that was an error.
    """

    index: int
    request: Request
    ids: list[int]
    remaining: int
    draws: random.Random
    constraint: Constraint | None = None
    drafter: Drafter | None = None
    cached_tokens: int = 0
    has_ended: bool = False
    finish_reason: FinishReason | None = None
    error: MinllamaError | None = field(default=None, repr=False)

    def finish(self, reason: FinishReason, error: MinllamaError | None = None) -> None:
        self.has_ended, self.finish_reason, self.error = True, reason, error


def samples_of(request: Request, first_index: int, context_len: int) -> list[Sequence]:
    """The n sequences of a request, numbered from `first_index`."""
    return [
        Sequence(
            index=first_index + sample,
            request=request,
            ids=list(request.ids),
            remaining=min(request.max_new_tokens, context_len - len(request.ids)),
            draws=random.Random(f"{request.seed}/{sample}"),
            constraint=request.make_constraint() if request.make_constraint else None,
            drafter=request.make_drafter() if request.make_drafter else None,
        )
        for sample in range(request.n)
    ]
