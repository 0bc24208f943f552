"""What stands between large products on a GPU, and products of weights in blocks; no gradients.

One pass over memory each. A weight in blocks is a `minllama.quantization.QuantizedWeight`, whose
panels the kernels read as they are.
"""

from typing import Any

import torch
from torch import Tensor

from minllama.gpu import block_kernels, kernels

_BLOCK = 1024
FEW_ROWS = 4  # up to which a weight in blocks is read once for each row, not taken apart
_BLOCKS_AT_ONCE = 64  # of a panel's 16 rows, that a program of a product reads


def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """SiLU(u) * v, in u's dtype: (..., F) -> (..., F)."""
    u, v = u.contiguous(), v.contiguous()
    gated = torch.empty_like(u)
    n = u.numel()
    kernels.swiglu[(-(-n // _BLOCK),)](u, v, gated, n, BLOCK=_BLOCK, EARLY=False)
    return gated


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs of channels turned: (B, T, H, C), complex64 ([B or 1,] T, 1, C / 2) -> (B, T, H, C)."""
    x = x.contiguous()
    turned = torch.empty_like(x)
    heads, head_dim = x.shape[2:]
    turns = torch.view_as_real(rotation).contiguous()
    kernels.turn[(x.shape[0] * x.shape[1],)](
        x,
        turned,
        turns,
        turns.numel() // head_dim,
        H=heads,
        C=head_dim,
        HEADS=_power(heads),
        BLOCK=_power(head_dim),
    )
    return turned


def product(weight: Any, x: Tensor) -> Tensor:
    """Give x W^T with a weight in blocks: (..., in) -> (..., out), in x's dtype."""
    rows = x.numel() // weight.in_features
    if rows > FEW_ROWS:
        return x @ take_apart(weight, x.dtype).t()
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], weight.out_features, dtype=x.dtype, device=x.device)
    panels, blocks = weight.scales.shape[:2]
    block_kernels.block_product[(panels, rows)](
        *_described(weight),
        x,
        y,
        weight.out_features,
        BLOCKS=blocks,
        AT_ONCE=min(_BLOCKS_AT_ONCE, _power(blocks)),
        BITS=weight.bits,
        MINS=weight.mins is not None,
        num_warps=8,
    )
    return y


def take_apart(weight: Any, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) of a weight in blocks."""
    y = torch.empty(
        weight.out_features, weight.in_features, dtype=dtype, device=weight.scales.device
    )
    panels, blocks = weight.scales.shape[:2]
    at_once = min(8, _power(blocks))
    block_kernels.take_apart[(panels, -(-blocks // at_once))](
        *_described(weight),
        y,
        weight.out_features,
        BLOCKS=blocks,
        AT_ONCE=at_once,
        BITS=weight.bits,
        MINS=weight.mins is not None,
    )
    return y


def _described(weight: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Four columns of a row in each whole number, scales, and mins or what stands in for them."""
    mins = weight.scales if weight.mins is None else weight.mins
    return weight.quants.view(torch.int32), weight.scales, mins


def _power(n: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (n - 1).bit_length()
