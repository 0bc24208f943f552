"""Sequences of token ids as one padded tensor, and the mask of what is real."""

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(
    sequences: Sequence[Sequence[int]], device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sequences of ids, padded on the right.

    Returns:
        (B, T) ids, and the (B, T) mask, true at real tokens; None where all are of one length.
    """
    lengths = [len(ids) for ids in sequences]
    length = max(lengths)
    # Which id pads does not matter: the mask says what is real.
    rows = [[*ids, *[0] * (length - len(ids))] for ids in sequences]
    ids = torch.tensor(rows, device=device)
    if min(lengths) == length:
        return ids, None
    real = torch.tensor(lengths, device=device).unsqueeze(-1)
    return ids, torch.arange(length, device=device) < real
