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
FEW_ROWS = 4  # up to which a weight in blocks is read once for each row, not dequantized
_BLOCKS_AT_ONCE = 64  # of a tile's 16 rows, that a program of a matmul reads


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
    """Rotate pairs of channels: (B, T, H, C), complex64 ([B or 1,] T, 1, C / 2) -> (B, T, H, C)."""
    x = x.contiguous()
    turned = torch.empty_like(x)
    heads, head_dim = x.shape[2:]
    cos_sin = torch.view_as_real(rotation).contiguous()
    n_rotations = cos_sin.numel() // head_dim
    fits = n_rotations in (x.shape[1], x.shape[0] * x.shape[1]) and cos_sin.dtype == torch.float32
    if not fits or cos_sin.numel() != n_rotations * head_dim:
        raise unfit("rotate", x, rotation)
    kernels.rope[(x.shape[0] * x.shape[1],)](
        x,
        turned,
        cos_sin,
        n_rotations,
        H=heads,
        C=head_dim,
        HEADS=power_of_two(heads),
        BLOCK=power_of_two(head_dim),
    )
    return turned


def quantized_matmul(weight: QuantizedMatrix, x: Tensor) -> Tensor:
    """Compute x W^T with a quantized weight: (..., in) -> (..., out), in x's dtype."""
    if x.shape[-1] != weight.in_features:
        raise unfit("quantized_matmul", weight.scales, x)
    rows = x.numel() // weight.in_features
    if rows > FEW_ROWS:
        return x @ dequantize(weight, x.dtype).t()
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], weight.out_features, dtype=x.dtype, device=x.device)
    tiles, blocks = weight.scales.shape[:2]
    block_kernels.block_matmul[(tiles, rows)](
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


def dequantize(weight: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight to a matrix (out, in)."""
    y = torch.empty(
        weight.out_features, weight.in_features, dtype=dtype, device=weight.scales.device
    )
    tiles, blocks = weight.scales.shape[:2]
    at_once = min(8, power_of_two(blocks))
    block_kernels.dequantize[(tiles, -(-blocks // at_once))](
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
