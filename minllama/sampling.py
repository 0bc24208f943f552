"""From logits to the next token.

Knows nothing of models, texts or loops: each function takes and returns tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minllama.errors import MinllamaError
from minllama.options import SamplingOptions

SMALLEST = torch.finfo(torch.float32).tiny  # what a temperature below would be rounded to is 0


def choose_tokens(
    logits: Tensor,
    options: SamplingOptions,
    uniforms: Sequence[float],
    histories: Sequence[Sequence[int]] = (),
) -> Tensor:
    """The next token of each row.

    The order is the ecosystem's: repetition penalty, temperature, top-k, top-p, min-p, each on what
    the one before has left.

    Args:
        logits: (B, V); -inf for tokens that are not allowed.
        options: how to choose.
        uniforms: B numbers in [0, 1), one draw for each row; unused at temperature 0.
        histories: each row's tokens so far, for the repetition penalty.

    Returns:
        (B,) token ids.

    Raises:
        MinllamaError: a row has NaN or infinity among its logits.
    """
    logits = logits.float()
    if options.repetition_penalty != 1.0:
        logits = apply_repetition_penalty(logits, histories, options.repetition_penalty)
    if options.temperature == 0.0:
        largest, chosen = logits.max(-1)  # NaN is larger than all numbers
        _check_numbers(largest)
        return chosen
    ids = None
    if options.top_k:
        logits, ids = logits.topk(min(options.top_k, logits.shape[-1]))
    elif options.top_p < 1:  # needs the likeliest tokens first; nothing else is worth a sort
        logits, ids = logits.sort(-1, descending=True)
    largest = logits.amax(-1, keepdim=True)
    _check_numbers(largest)
    # Shifted before it is divided, so that a tiny temperature gives infinity only downwards.
    scaled = (logits - largest) / max(options.temperature, SMALLEST)
    probabilities = apply_min_p(apply_top_p(scaled.softmax(-1), options.top_p), options.min_p)
    # Inverse transform sampling: the first token whose cumulative probability exceeds the draw.
    # In float64, since float32 sums over a vocabulary are off by more than a rare token's share.
    if probabilities.device.type == "mps":  # which has no float64
        probabilities = probabilities.cpu()
    total = probabilities.double().cumsum(-1)  # (B, V)
    draws = torch.tensor(uniforms, dtype=total.dtype, device=total.device).unsqueeze(-1)
    chosen = torch.searchsorted(total, draws * total[:, -1:], right=True)
    chosen = chosen.clamp(max=total.shape[-1] - 1).to(logits.device)
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(-1)


def _check_numbers(largest: Tensor) -> None:
    """Refuse logits whose largest is NaN or infinity."""
    if (largest.isnan() | largest.isposinf()).any():
        raise MinllamaError(
            "the model's logits are NaN or infinite: its weights are damaged, or its numbers do "
            "not fit into their dtype; try --dtype bfloat16 or float32"
        )


def apply_repetition_penalty(
    logits: Tensor, histories: Sequence[Sequence[int]], penalty: float
) -> Tensor:
    """Make tokens that a row already holds less likely (Keskar et al. 2019, sec. 4.1).

    Args:
        logits: (B, V).
        histories: each row's tokens so far; those of which there is no logit count for nothing.
        penalty: divides positive logits and multiplies negative ones; 1 changes nothing.

    Returns:
        (B, V).
    """
    logits = logits.clone()
    for row, history in enumerate(histories):
        known = sorted({token_id for token_id in history if token_id < logits.shape[-1]})
        seen = torch.tensor(known, device=logits.device, dtype=torch.long)
        old = logits[row, seen]
        logits[row, seen] = torch.where(old > 0, old / penalty, old * penalty)
    return logits


def apply_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020, sec. 3.1): the smallest set with mass `top_p`.

    Args:
        probabilities: (B, V), each row in descending order.
        top_p: in (0, 1].

    Returns:
        (B, V), zero outside the set; not normalised again.
    """
    if top_p == 1.0:
        return probabilities
    before = probabilities.cumsum(-1) - probabilities  # mass of all likelier tokens
    keep = before < top_p
    keep[:, 0] = True  # the likeliest stays, whatever the rounding
    return probabilities * keep


def apply_min_p(probabilities: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest (Nguyen et al. 2024).

    Args:
        probabilities: (B, V).
        min_p: in [0, 1].

    Returns:
        (B, V), zero elsewhere; not normalised again.
    """
    if min_p == 0.0:
        return probabilities
    return probabilities * (probabilities >= min_p * probabilities.amax(-1, keepdim=True))
