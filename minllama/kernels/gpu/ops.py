"""Operations between large matmuls on a GPU, and matmuls with quantized weights; no gradients.

Each is one pass over memory. Quantized weights are `minllama.quantization.modules.QuantizedWeight`,
whose tiles the kernels read directly.
"""

import torch
from torch import Tensor

from minllama.kernels.cpu.ops import unfit
from minllama.kernels.gpu import decode_kernels as kernels
from minllama.kernels.gpu import quantized_kernels as block_kernels
from minllama.kernels.gpu.support import power_of_two
from minllama.kernels.quantized_matrix import QuantizedMatrix

_BLOCK = 1024
FEW_ROWS = 4  # up to which a weight in blocks is read once for each row, not taken apart
_BLOCKS_AT_ONCE = 64  # of a panel's 16 rows, that a program of a product reads


def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """SiLU(u) * v, in u's dtype: (..., F) -> (..., F)."""
    if u.shape != v.shape:
        raise unfit("swiglu", u, v)
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
    n_turns = turns.numel() // head_dim
    fits = n_turns in (x.shape[1], x.shape[0] * x.shape[1]) and turns.dtype == torch.float32
    if not fits or turns.numel() != n_turns * head_dim:
        raise unfit("rotate", x, rotation)
    kernels.turn[(x.shape[0] * x.shape[1],)](
        x,
        turned,
        turns,
        n_turns,
        H=heads,
        C=head_dim,
        HEADS=power_of_two(heads),
        BLOCK=power_of_two(head_dim),
    )
    return turned


def product(weight: QuantizedMatrix, x: Tensor) -> Tensor:
    """Compute x W^T with a quantized weight: (..., in) -> (..., out), in x's dtype."""
    if x.shape[-1] != weight.in_features:
        raise unfit("product", weight.scales, x)
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
        AT_ONCE=min(_BLOCKS_AT_ONCE, power_of_two(blocks)),
        BITS=weight.bits,
        MINS=weight.mins is not None,
        num_warps=8,
    )
    return y


def take_apart(weight: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight to a matrix (out, in)."""
    y = torch.empty(
        weight.out_features, weight.in_features, dtype=dtype, device=weight.scales.device
    )
    panels, blocks = weight.scales.shape[:2]
    at_once = min(8, power_of_two(blocks))
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


def _described(weight: QuantizedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """The quants as words of four or eight columns, the scales, and the mins or a placeholder."""
    mins = weight.scales if weight.mins is None else weight.mins
    return weight.quants.view(torch.int32), weight.scales, mins
