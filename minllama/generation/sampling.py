"""Choose the next token from logits.

Each function takes logits or probabilities and returns tensors; the scheduler calls them.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from minllama.errors import MinllamaError
from minllama.kernels.dispatch import accelerated
from minllama.model.attention_layout import NOT_FINITE
from minllama.options import SamplingOptions

BLOCK = 512  # weights per block: block sums are searched first


def choose_tokens(
    logits: Tensor,
    options: SamplingOptions,
    uniforms: Sequence[float],
    histories: Sequence[Sequence[int]] = (),
    generated: Sequence[Sequence[int]] = (),
) -> Tensor:
    """The next token of each row.

    The order is the ecosystem's: logit bias, repetition penalty, frequency and presence penalty,
    temperature, top-k, top-p, min-p, each on what the one before has left. Those up to the
    temperature change greedy choices too.

    Args:
        logits: (B, V); -inf for tokens that are not allowed.
        options: how to choose.
        uniforms: B numbers in [0, 1), one draw for each row; unused at temperature 0.
        histories: each row's tokens so far, for the repetition penalty.
        generated: those of them that are not the prompt's, for the frequency and presence penalty.

    Returns:
        (B,) token ids; -1 where a row has NaN or infinity among its logits, which `check_chosen`
        refuses: to look at a number is to wait for a GPU.
    """
    logits = logits.float()
    if options.logit_bias:
        logits = apply_logit_bias(logits, options.logit_bias)
    if options.repetition_penalty != 1.0:
        logits = apply_repetition_penalty(logits, histories, options.repetition_penalty)
    if options.frequency_penalty or options.presence_penalty:
        logits = apply_count_penalties(
            logits, generated, options.frequency_penalty, options.presence_penalty
        )
    on_cpu = logits.device.type == "cpu"
    if options.temperature == 0.0 and not on_cpu:
        largest, chosen = logits.max(-1)  # NaN is larger than all numbers
        return _checked_choice(chosen, largest)
    ids = None
    if options.top_k and options.temperature:
        logits, ids = logits.topk(min(options.top_k, logits.shape[-1]))
    elif on_cpu:
        return draw_tokens(logits, options, uniforms)
    elif options.top_p < 1:  # needs tokens in descending order; only this is worth a sort
        logits, ids = logits.sort(-1, descending=True)
    largest = logits.amax(-1, keepdim=True)
    # Shifted before division, so that a tiny temperature overflows only to -infinity.
    scaled = (logits - largest) / options.divisor
    if options.top_p == 1 and options.min_p == 0:
        # A softmax would only divide by a constant, which does not affect draws.
        weights = scaled.exp()
    else:
        weights = apply_min_p(apply_top_p(scaled.softmax(-1), options.top_p), options.min_p)
    chosen = draw(weights, uniforms)
    chosen = chosen if ids is None else ids.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return _checked_choice(chosen, largest.squeeze(-1))


def _likeliest(logits: Tensor) -> Tensor:
    """(B,) argmax of (B, V), the first of equal ones; -1 for NaN and infinity.

    By numpy, which compares numbers in vectors: torch takes 134 microseconds for a row of 49,152,
    and this 34.
    """
    values = logits.detach().numpy()
    chosen = values.argmax(-1)  # NaN is larger than all numbers
    chosen[~(values.max(-1) < math.inf)] = -1
    return torch.from_numpy(chosen)


@accelerated
def draw_tokens(logits: Tensor, options: SamplingOptions, uniforms: Sequence[float]) -> Tensor:
    """`choose_tokens` by temperature, top-p and min-p, for (B, V) on the CPU.

    By numpy: torch divides each operation among threads, which wait for one another, and for a busy
    neighbor of the processor with every one of them.
    """
    if options.temperature == 0.0:
        return _likeliest(logits)
    values = logits.detach().numpy()
    largest = values.max(-1, keepdims=True)
    # Infinity less infinity is refused below; a tiny temperature overflows only to -infinity.
    with np.errstate(invalid="ignore", over="ignore"):
        weights = values - largest
        weights /= options.divisor
    np.exp(weights, out=weights)
    if options.top_p == 1 and options.min_p == 0:
        chosen = draw(torch.from_numpy(weights), uniforms)
    else:
        rows = [_likely(row, options) for row in weights]
        width = max(len(ids) for ids, _ in rows)
        kept = np.zeros((len(rows), width), dtype=np.float32)
        for i, (ids, probabilities) in enumerate(rows):
            kept[i, : len(ids)] = probabilities
        places = draw(torch.from_numpy(kept), uniforms).tolist()
        # Of NaN the place is arbitrary.
        chosen = torch.tensor(
            [ids[min(i, len(ids) - 1)] for (ids, _), i in zip(rows, places, strict=True)]
        )
    return _checked_choice(chosen, torch.from_numpy(largest.squeeze(-1)))


def _likely(
    weights: NDArray[np.float32], options: SamplingOptions
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What top-p and min-p leave of one row: token ids and probabilities, in descending order.

    Tokens below (1 - top_p) / V have less than 1 - top_p together, so the nucleus is among the
    others, which are a few hundred or thousand. To sort all 49,152 takes 3.3 milliseconds on a Zen
    5, more than the decode step before it.

    Args:
        weights: (V,), in proportion to probabilities.
        options: with a top_p below 1, or a min_p.
    """
    total = weights.sum()
    least = (1 - options.top_p) / (2 * len(weights))  # half of it, since sums are rounded
    ids = np.flatnonzero(weights >= max(least * total, options.min_p * weights.max()))
    ids = ids[np.argsort(-weights[ids])] if len(ids) else np.zeros(1, dtype=np.int64)  # of NaN
    probabilities = weights[ids] / total
    if options.top_p < 1:
        # The mass of all likelier tokens.
        before = probabilities.cumsum(dtype=np.float64) - probabilities
        n = max(1, int((before < options.top_p).sum()))  # the most likely stays
        ids, probabilities = ids[:n], probabilities[:n]
    return ids, probabilities


def draw(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Inverse transform sampling: the first of each row at which the sum of weights exceeds a draw.

    In float64, since float32 sums over a vocabulary are off by more than a rare token's share; and
    among blocks before it is within one, for a sum along one long row is slow on a GPU.

    Args:
        weights: (B, V), none negative, some positive.
        uniforms: B numbers in [0, 1), shares of each row's whole sum.

    Returns:
        (B,) indices of positive weights.
    """
    device = weights.device
    if device.type == "mps":  # which has no float64
        weights = weights.cpu()
    draws = _on_device(uniforms, torch.float64, weights).unsqueeze(-1)
    blocks = weights
    if missing := -blocks.shape[-1] % BLOCK:
        blocks = F.pad(blocks, (0, missing))
    blocks = blocks.unflatten(-1, (-1, BLOCK))
    ends = _sums(blocks).cumsum(-1)  # (B, V / BLOCK)
    aims = draws * ends[:, -1:]
    block = _first_above(ends, aims)
    within = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double()
    starts = F.pad(ends, (1, 0)).gather(-1, block)
    place = _first_above(within.cumsum(-1), aims - starts)
    chosen = (block * BLOCK + place).clamp(max=weights.shape[-1] - 1)  # arbitrary for NaN
    return chosen.squeeze(-1).to(device)


def _sums(blocks: Tensor) -> Tensor:
    """Sums over the last dimension, in float64; on a CPU by numpy, which needs no threads."""
    if blocks.device.type == "cpu":
        return torch.from_numpy(blocks.numpy().sum(-1, dtype=np.float64))
    return blocks.sum(-1, dtype=torch.float64)


def _first_above(sums: Tensor, aims: Tensor) -> Tensor:
    """(B, 1), the first of each row's growing sums above an aim; by rounding, the last step."""
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    found = torch.minimum(torch.searchsorted(sums, aims, right=True), last)
    return found.clamp(max=sums.shape[-1] - 1)  # with NaN no step is found


def _checked_choice(chosen: Tensor, largest: Tensor) -> Tensor:
    """The chosen ids, with -1 where the largest logit is NaN or infinity."""
    return torch.where(largest < math.inf, chosen, -1)


def check_chosen(ids: Sequence[int]) -> None:
    """Refuse the -1 of `choose_tokens`.

    Raises:
        MinllamaError: there is one.
    """
    if any(token_id < 0 for token_id in ids):
        raise MinllamaError(NOT_FINITE)


def apply_repetition_penalty(
    logits: Tensor, histories: Sequence[Sequence[int]], penalty: float
) -> Tensor:
    """Make tokens that a row already contains less likely (Keskar et al. 2019, sec. 4.1).

    Args:
        logits: (B, V).
        histories: each row's tokens so far; those without a logit are ignored.
        penalty: divides positive logits and multiplies negative ones; 1 changes nothing.

    Returns:
        (B, V).
    """
    size = logits.shape[-1]
    flat_indices = [
        row * size + token_id
        for row, history in enumerate(histories)
        for token_id in set(history)
        if token_id < size
    ]
    logits, indices = _copied(logits), _on_device(flat_indices, torch.long, logits)
    old = logits.view(-1)[indices]
    logits.view(-1)[indices] = torch.where(old > 0, old / penalty, old * penalty)
    return logits


def apply_count_penalties(
    logits: Tensor, generated: Sequence[Sequence[int]], frequency: float, presence: float
) -> Tensor:
    """Make tokens less likely by how often they were generated, as OpenAI's API and vLLM do.

    logit - count * frequency - (presence if count > 0 else 0). Tokens of a prompt do not count.

    Args:
        logits: (B, V).
        generated: each row's tokens after the prompt; those of which there is no logit count for
            nothing.
        frequency: in [-2, 2]; 0 changes nothing, negative numbers make repetitions likelier.
        presence: likewise.

    Returns:
        (B, V).
    """
    size = logits.shape[-1]
    flat_indices: list[int] = []
    penalties: list[float] = []
    for row, ids in enumerate(generated):
        for token_id, count in Counter(ids).items():
            if token_id < size:
                flat_indices.append(row * size + token_id)
                penalties.append(count * frequency + presence)
    if not flat_indices:  # as before the first token
        return logits
    logits, indices = _copied(logits), _on_device(flat_indices, torch.long, logits)
    logits.view(-1)[indices] -= _on_device(penalties, logits.dtype, logits)
    return logits


def apply_logit_bias(logits: Tensor, bias: Sequence[tuple[int | str, float]]) -> Tensor:
    """Add to the logits of single tokens, in all rows; a forbidden token remains forbidden.

    Args:
        logits: (B, V).
        bias: token ids, each once, and what to add; those without a logit are ignored.

    Returns:
        (B, V).
    """
    known = {i: value for i, value in bias if isinstance(i, int) and i < logits.shape[-1]}
    columns = _on_device(list(known), torch.long, logits)
    logits = logits.clone()
    logits[:, columns] += _on_device(list(known.values()), logits.dtype, logits)
    return logits


def _copied(logits: Tensor) -> Tensor:
    """A contiguous copy, whose flat indices are row * V + token."""
    return logits.clone(memory_format=torch.contiguous_format)


def _on_device(values: Sequence[float], dtype: torch.dtype, other: Tensor) -> Tensor:
    """(N,) numbers on `other`'s device, copied without waiting for a GPU."""
    listed = torch.tensor(values, dtype=dtype, pin_memory=other.is_cuda)
    return listed.to(other.device, non_blocking=True)


def apply_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020, sec. 3.1): the smallest set with mass `top_p`.

    Args:
        probabilities: (B, V), each row in descending order.
        top_p: in (0, 1].

    Returns:
        (B, V), zero outside the set; not normalized again.
    """
    if top_p == 1.0:
        return probabilities
    before = probabilities.cumsum(-1) - probabilities  # mass of all likelier tokens
    keep = before < top_p
    keep[:, 0] = True  # the most likely stays, whatever the rounding
    return probabilities * keep


def apply_min_p(probabilities: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the most likely (Nguyen et al. 2024).

    Args:
        probabilities: (B, V).
        min_p: in [0, 1].

    Returns:
        (B, V), zero elsewhere; not normalized again.
    """
    if min_p == 0.0:
        return probabilities
    return probabilities * (probabilities >= min_p * probabilities.amax(-1, keepdim=True))
