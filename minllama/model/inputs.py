"""Which tokens of a forward pass are asked for: arguments checked, and tokens by their numbers.

Token t of row b has the number b * T + t. Knows nothing of weights.
"""

import torch
from torch import Tensor

from minllama.errors import MinllamaError


def check_inputs(ids: Tensor, mask: Tensor | None) -> None:
    """Refuse ids that are not whole numbers (B, T), and a mask that is not that nor (B, T, T)."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise MinllamaError(f"ids must be int64 or int32, not {ids.dtype}")
    if ids.dim() != 2 or 0 in ids.shape:
        raise MinllamaError(f"ids must be of shape (B, T), neither 0, not {tuple(ids.shape)}")
    if mask is not None and mask.shape not in (ids.shape, (*ids.shape, ids.shape[1])):
        raise MinllamaError(
            f"attention_mask is of shape {tuple(mask.shape)} and ids {tuple(ids.shape)}; they must "
            "be alike, or the mask (B, T, T) (with a cache, both cover the new tokens only)"
        )


def check_logits(logits: str | Tensor | None, mask: Tensor | None) -> None:
    """Refuse words there are not, and the last real token of a row that has none."""
    if not isinstance(logits, str):
        return
    if logits not in ("all", "last"):
        raise MinllamaError(f"logits must be 'all', 'last', a tensor or None, not {logits!r}")
    if logits == "last" and mask is not None and (mask.dim() == 3 or not mask.any(-1).all()):
        raise MinllamaError("a row of attention_mask has no real token, so no last one either")


def tokens_at(x: Tensor, at: Tensor | None) -> Tensor:
    """Those of (B, T, D) with the numbers b * T + t in (M,), as (1, M, D); all of them for None."""
    return x if at is None else x.flatten(0, 1).index_select(0, at).unsqueeze(0)


def wanted_tokens(ids: Tensor, mask: Tensor | None, which: str | Tensor | None) -> Tensor | None:
    """Numbers b * T + t of the tokens whose logits are asked for, (B,) or (B, N).

    None where the states of all are: for all logits, and for none.
    """
    if which is None or (isinstance(which, str) and which == "all"):
        return None
    if not isinstance(which, Tensor):
        return last_tokens(ids, mask)
    batch, length = ids.shape
    if which.dim() != 2 or len(which) not in (1, batch) or which.numel() == 0:
        raise MinllamaError(
            f"logits asks for columns of shape {tuple(which.shape)}; give (B, N), here ({batch}, N)"
        )
    if which.is_floating_point() or which.dtype == torch.bool:
        raise MinllamaError(f"logits asks for columns by whole numbers, not {which.dtype}")
    starts = torch.arange(batch, device=ids.device) * length
    which = which.to(starts)
    if ((which < -length) | (which >= length)).any():
        raise MinllamaError(f"logits asks for columns that {length} tokens do not have")
    return starts.unsqueeze(-1) + which % length  # some count from the end


def last_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B,), numbers b * T + t of the last real token of each row of x, (B, T) or (B, T, D)."""
    batch, length = x.shape[:2]
    starts = torch.arange(batch, device=x.device) * length
    if mask is None:
        return starts + (length - 1)
    return starts + (torch.arange(length, device=x.device) * mask.bool()).argmax(-1)


def row_lens(ids: Tensor, mask: Tensor | None) -> list[int]:
    """How many real tokens each row has."""
    if mask is None or mask.dim() == 3:
        return [ids.shape[1]] * ids.shape[0]
    lens: list[int] = mask.bool().sum(-1).tolist()
    return lens
