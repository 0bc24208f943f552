"""Choose, accept and report the next tokens of sequences whose options differ."""

from typing import NamedTuple

import torch
from torch import Tensor

from minllama.engine.sequence import FinishReason, Sampler, Sequence, Token
from minllama.errors import MinllamaError
from minllama.model.attention_layout import NOT_FINITE


class SamplerGroup(NamedTuple):
    """Sequences of a batch that share a sampler.

    Attributes:
        sampler: the one.
        n_tokens: it chooses from those below; None for all.
        slots: of its sequences in the batch.
        slot_indices: the slots, (N,), on the device; None where the group is the whole batch.
    """

    sampler: Sampler
    n_tokens: int | None
    slots: list[int]
    slot_indices: Tensor | None


class Choice(NamedTuple):
    """How the next tokens of a batch are chosen; unchanged until a sequence joins or leaves.

    Attributes:
        groups: of sequences whose samplers are equal.
        constrained: slots of sequences that have a constraint.
        logprobs: slots of sequences that report log-probabilities.
        can_run_ahead: the next tokens can be read before they have reached the host.
    """

    groups: list[SamplerGroup]
    constrained: list[int]
    logprobs: list[int]
    can_run_ahead: bool


def choice_of(sequences: list[Sequence], device: torch.device) -> Choice:
    """The `Choice` for these sequences, whose logits are on the given device."""
    groups: list[tuple[Sampler, int | None, list[int]]] = []
    for slot, sequence in enumerate(sequences):
        sampler, n_tokens = sequence.request.sampler, sequence.request.n_tokens
        for other, n_group_tokens, slots in groups:
            if n_group_tokens == n_tokens and (other is sampler or other == sampler):
                slots.append(slot)
                break
        else:
            groups.append((sampler, n_tokens, [slot]))
    is_single = len(groups) == 1
    return Choice(
        groups=[
            SamplerGroup(*group, None if is_single else torch.tensor(group[2], device=device))
            for group in groups
        ],
        constrained=[slot for slot, s in enumerate(sequences) if s.constraint is not None],
        logprobs=[slot for slot, s in enumerate(sequences) if s.request.logprobs is not None],
        can_run_ahead=not any(
            s.constraint is not None or s.drafter is not None or s.request.logprobs is not None
            for s in sequences
        ),
    )


def choose(sequences: list[Sequence], logits: Tensor, choice: Choice) -> list[Token]:
    """The next token of each of B sequences by (B, V) logits."""
    if not (choice.constrained or choice.logprobs):
        chosen = sampled(sequences, logits, choice).tolist()
        return [accepted(s, token_id) for s, token_id in zip(sequences, chosen, strict=True)]
    logprobs = _logprobs(sequences, logits, choice)
    if choice.constrained:
        logits = logits.clone()
    failed: dict[int, MinllamaError] = {}
    for slot in choice.constrained:
        constraint, n_tokens = sequences[slot].constraint, sequences[slot].request.n_tokens
        assert constraint is not None
        try:
            constraint.forbid(logits[slot, :n_tokens])
        except MinllamaError as error:
            failed[slot] = error
    chosen = sampled(sequences, logits, choice).tolist()
    return [
        end_without_token(sequence, "error", failed[slot])
        if slot in failed
        else accepted(sequence, token_id, logprobs.get(slot))
        for slot, (sequence, token_id) in enumerate(zip(sequences, chosen, strict=True))
    ]


def sampled(sequences: list[Sequence], logits: Tensor, choice: Choice) -> Tensor:
    """(B,) tokens by (B, V) logits, on the device."""
    if len(choice.groups) == 1:
        sampler, n_tokens, _, _ = choice.groups[0]
        return sampler(logits if n_tokens is None else logits[:, :n_tokens], sequences)
    chosen = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
    for sampler, n_tokens, slots, slot_indices in choice.groups:
        some = [sequences[slot] for slot in slots]
        chosen[slot_indices] = sampler(logits[slot_indices, :n_tokens], some).long()
    return chosen


def _logprobs(sequences: list[Sequence], logits: Tensor, choice: Choice) -> dict[int, Tensor]:
    """Log-probabilities (V,) of the slots that report them."""
    found: dict[int, Tensor] = {}
    for n_tokens in {sequences[slot].request.n_tokens for slot in choice.logprobs}:
        slots = [s for s in choice.logprobs if sequences[s].request.n_tokens == n_tokens]
        rows = logits if len(slots) == len(sequences) else logits[slots]
        found.update(zip(slots, rows[:, :n_tokens].float().log_softmax(-1), strict=True))
    return found


def accepted(sequence: Sequence, token_id: int, logprobs: Tensor | None = None) -> Token:
    """Add a chosen token, and end the sequence if this token ends it."""
    if token_id < 0:
        return end_without_token(sequence, "error", MinllamaError(NOT_FINITE))
    reason: FinishReason | None = None
    if sequence.constraint is not None:
        try:
            sequence.constraint.accept(token_id)
            # A satisfied constraint ends a sequence even if end tokens are ignored.
            reason = "stop" if sequence.constraint.is_complete() else None
        except MinllamaError as error:
            return end_without_token(sequence, "error", error)
    request = sequence.request
    sequence.ids.append(token_id)
    sequence.remaining -= 1
    if token_id in request.stop_ids:
        reason = "stop"
    elif sequence.remaining == 0:
        reason = reason or "length"
    if reason is not None:
        sequence.finish(reason)
    if logprobs is None:
        return Token(sequence.index, token_id, None, (), reason)
    values, ids = logprobs.topk(min(request.logprobs or 0, len(logprobs)))
    alternatives = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(sequence.index, token_id, logprobs[token_id].item(), alternatives, reason)


def end_without_token(
    sequence: Sequence, reason: FinishReason, error: MinllamaError | None = None
) -> Token:
    sequence.finish(reason, error)
    return Token(sequence.index, None, finish_reason=reason)


class Arriving:
    """Token ids that are being copied from the device; only reading them waits for it."""

    def __init__(self, ids: Tensor) -> None:
        self._event = None
        self._ids = ids
        if ids.is_cuda:
            self._ids = torch.empty_like(ids, device="cpu", pin_memory=True)
            self._ids.copy_(ids, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(ids.device))

    def ids(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._ids.tolist()
        return found
