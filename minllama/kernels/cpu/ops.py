"""Operations between large matmuls on a CPU, each in one pass over memory, with gradients.

Norms, SwiGLU and RoPE: torch computes each in several passes, with float32 copies that are kept for
the backward pass. Here only the inputs are kept, and cheap intermediate results are recomputed.
`serves` decides where these are used; elsewhere the plain equations of `minllama.model.llama` and
`minllama.model.rope` are.
"""

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minllama.errors import MinllamaError
from minllama.kernels.cpu.library import best_level, call, library
from minllama.kernels.cpu.structs import (
    INT4,
    INT8,
    KINDS,
    AdamW,
    Blocks,
    Dequantize,
    HalfMatmul,
    Matmul,
    Norm,
    RoPE,
    SwiGLU,
    dense_linear,
    quantized_linear,
)
from minllama.kernels.dispatch import is_plain, register
from minllama.kernels.hardware import amx_from, choice, sums_from
from minllama.kernels.quantized_matrix import QuantizedMatrix

DTYPES = frozenset(KINDS)
# Rows of a dense product, beyond which they are packed (FEW_TOKENS of src/dense_panels.inc), to a
# multiple of what a panel has at any level.
FEW_ROWS, MOST_PANEL = 24, 48
AMX_COLUMNS = 32  # that matrix instructions multiply at a time
MOST_PACKED = 576  # rows that are packed together, which bounds the memory that it takes


def serves(x: Tensor) -> bool:
    """Whether the operations here support this tensor."""
    # Devices first: elsewhere torch.compile need not understand the rest.
    is_known = x.device.type == "cpu" and x.dtype in KINDS
    return is_known and library() is not None and is_plain(x)


def floats(*shape: int) -> Tensor:
    """Allocate an output of compiled code: float32 on the CPU, whatever torch's default."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def unfit(operation: str, *tensors: Tensor) -> MinllamaError:
    """The error for shapes with which compiled code would access memory out of bounds."""
    shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
    return MinllamaError(f"{operation}: tensors of shapes {shapes} do not match")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / RMS(x) * weight over the last dimension, in x's dtype: (..., D) -> (..., D)."""
    if x.shape[-1:] != weight.shape:
        raise unfit("rms_norm", x, weight)
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """SiLU(u) * v: (..., F) -> (..., F)."""
    if u.shape != v.shape:
        raise unfit("swiglu", u, v)
    y: Tensor = _SwiGLU.apply(u, v.to(u.dtype))  # type: ignore[no-untyped-call]
    return y


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of channels: (B, T, H, C), complex64 ([B or 1,] T, 1, C / 2) -> (B, T, H, C)."""
    batch, length, _, head_dim = x.shape
    cos_sin = torch.view_as_real(rotation).contiguous()
    rows = cos_sin.numel() // (length * head_dim)
    fits = rows in (1, batch) and cos_sin.numel() == rows * length * head_dim
    if not fits or cos_sin.dtype != torch.float32:
        raise unfit("rotate", x, rotation)
    y: Tensor = _Rotation.apply(x, cos_sin)  # type: ignore[no-untyped-call]
    return y


register("rms_norm", lambda x, weight, eps: serves(x), rms_norm)
register("swiglu", lambda u, v: serves(u), swiglu)
register("apply_rotary_embedding", lambda x, rotation: serves(x), rotate)


def dequantize_transposed(weight: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """The matrix (in, out) of a `quantization.modules.QuantizedWeight` (out, in), on the CPU."""
    y = torch.empty(weight.in_features, weight.out_features, dtype=dtype, device="cpu")
    described = quantized_linear(weight)
    call("dequantize", Dequantize(ctypes.pointer(described), y.data_ptr(), KINDS[dtype]))
    return y


def can_pack(raw: Tensor) -> bool:
    """Whether `pack` supports these bytes."""
    return raw.device.type == "cpu" and library() is not None and is_plain(raw)


def pack(raw: Tensor, rows: int, bits: int, has_mins: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convert a GGUF file's blocks of 32 to the tiles of `minllama.quantization.modules`.

    Args:
        raw: (n, block_bytes) uint8, row after row: a float16 scale, an optional min, and the
            values, in 4 bits with the low halves of the bytes before the high ones.
        rows: of the matrix.
        bits: 4, or 8, which are signed.
        has_mins: whether there are mins.

    Returns:
        The first parts of `minllama.quantization.modules.Parts`.

    Raises:
        MinllamaError: these are no such bytes.
    """
    raw, block_bytes = raw.contiguous(), 2 + 2 * has_mins + 4 * bits
    if raw.dtype != torch.uint8 or raw.shape[1:] != (block_bytes,) or len(raw) % rows:
        raise MinllamaError(
            f"{rows} rows of quantized blocks do not match {tuple(raw.shape)} {raw.dtype}"
        )
    blocks, tiles = len(raw) // rows, -(-rows // 16)
    quants = torch.empty(tiles, blocks, bits, 16, 4, dtype=torch.uint8, device="cpu")
    scales = torch.empty(tiles, blocks, 16, dtype=torch.float16, device="cpu")
    mins = torch.empty_like(scales) if has_mins else None
    arguments = Blocks(
        rows=rows,
        blocks=blocks,
        bytes=block_bytes,
        kind=INT4 if bits == 4 else INT8,
        data=raw.data_ptr(),
        weight=quants.data_ptr(),
        scales=scales.data_ptr(),
        mins=None if mins is None else mins.data_ptr(),
    )
    call("pack", arguments)
    return quants, scales, mins


def most_rows(dtype: torch.dtype) -> float:
    """The most rows for which `quantized_matmul` is faster than products of dequantized weights."""
    return choice("quantized", best_level(), dtype).limit


def quantized_matmul(weight: QuantizedMatrix, x: Tensor) -> Tensor:
    """Compute x W^T with a quantized W: (..., in) -> (..., out), float32.

    Values of x become integers of `weight.activation_bits`, with a scale for each 32.
    """
    if x.shape[-1] != weight.in_features:
        raise MinllamaError(f"a weight of {weight.in_features} columns times {tuple(x.shape)}")
    x = x.float().contiguous()
    rows, blocks = x.numel() // weight.in_features, weight.in_features // 32
    quants = torch.empty(rows, blocks, 96, dtype=torch.int8, device="cpu")
    scales, sums = floats(rows, blocks), torch.empty(rows, blocks, dtype=torch.int32, device="cpu")
    y = floats(*x.shape[:-1], weight.out_features)
    described = quantized_linear(weight)
    arguments = Matmul(
        ctypes.pointer(described),
        rows=rows,
        activation_bits=weight.activation_bits,
        sums_from=sums_from(best_level()),
        x=x.data_ptr(),
        quants=quants.data_ptr(),
        scales=scales.data_ptr(),
        sums=sums.data_ptr(),
        y=y.data_ptr(),
    )
    call("quantize_activations", arguments)
    call("matmul", arguments)
    return y


def dense_matmul(weight: Tensor, x: Tensor) -> Tensor:
    """Compute x W^T in float32, with a dense W (out, in): (..., in) -> (..., out), float32."""
    if x.shape[-1] != weight.shape[1]:
        raise unfit("dense_matmul", weight, x)
    x, weight = x.float().contiguous(), weight.contiguous()
    y = floats(*x.shape[:-1], weight.shape[0])
    described = dense_linear(weight)
    (out_dim, in_dim), rows = weight.shape, x.numel() // weight.shape[1]
    pieces = -(-rows // MOST_PACKED)
    most = -(-rows // pieces) if pieces else 0
    panels = floats(-(-most // MOST_PANEL) * MOST_PANEL, in_dim) if most > FEW_ROWS else None
    for piece in range(pieces):
        start, end = rows * piece // pieces, rows * (piece + 1) // pieces
        arguments = Matmul(
            ctypes.pointer(described),
            rows=end - start,
            x=x.data_ptr() + start * in_dim * x.itemsize,
            y=y.data_ptr() + start * out_dim * y.itemsize,
        )
        if panels is not None:
            arguments.panels = panels.data_ptr()
            call("pack_activations", arguments)
        call("matmul", arguments)
    return y


def half_matmul(weight: QuantizedMatrix | Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
    """Compute x W^T in bfloat16 by matrix instructions: (..., in) -> (..., out), bfloat16.

    Args:
        weight: quantized, or dense (out, in); `in` is a multiple of 32.
        x: bfloat16.
        transposed: whether a dense weight is (in, out) instead, so that this is x W.

    Raises:
        MinllamaError: shapes or dtypes do not match.
    """
    if isinstance(weight, Tensor):
        weight = weight.contiguous()
        described = dense_linear(weight)
        if transposed:
            described.in_dim, described.out_dim = described.out_dim, described.in_dim
    else:
        described = quantized_linear(weight)
    in_dim, out_dim = described.in_dim, described.out_dim
    if x.shape[-1] != in_dim or in_dim % AMX_COLUMNS or x.dtype != torch.bfloat16:
        raise MinllamaError(f"a weight of {in_dim} columns times {tuple(x.shape)} {x.dtype}")
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], out_dim, dtype=torch.bfloat16, device="cpu")
    arguments = HalfMatmul(
        ctypes.pointer(described),
        transposed=transposed,
        rows=x.numel() // in_dim,
        x=x.data_ptr(),
        y=y.data_ptr(),
    )
    call("half_matmul", arguments)
    return y


def has_half_matmul(x: Tensor, in_dim: int, *, is_quantized: bool) -> bool:
    """Whether `half_matmul` supports x (..., in), and is faster than torch's products."""
    if x.dtype != torch.bfloat16 or in_dim % AMX_COLUMNS or not serves(x):
        return False
    least = amx_from(best_level(), is_quantized=is_quantized)
    return 0 < least <= x.numel() // max(in_dim, 1)


def _adamw_serves(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *_: Any,
) -> bool:
    lists = parameters, gradients, exp_avgs, exp_avg_sqs
    return library() is not None and all(
        t.device.type == "cpu"
        and t.dtype == torch.float32
        and t.is_contiguous()
        and t.shape == of_one[0].shape
        for of_one in zip(*lists, strict=True)
        for t in of_one
    )


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    betas: tuple[float, float],
    eps: float,
    step_size: float,
    shrink: float,
) -> None:
    """One step of AdamW on float32 tensors, in place and in one pass over memory.

    See `adamw_update` in `minllama.training.optimizer`.
    """
    n = len(parameters)
    starts = (ctypes.c_int64 * (n + 1))(0, *itertools.accumulate(p.numel() for p in parameters))
    pointers = [
        (ctypes.c_void_p * n)(*(tensor.data_ptr() for tensor in tensors))
        for tensors in (parameters, gradients, exp_avgs, exp_avg_sqs)
    ]
    addresses = map(ctypes.addressof, pointers)
    arguments = AdamW(n, ctypes.addressof(starts), *addresses, *betas, eps, step_size, shrink)
    call("adamw", arguments)
    # Written by address, which autograd does not see: it counts a version for what it has saved.
    torch.autograd.graph.increment_version((*parameters, *exp_avgs, *exp_avg_sqs))


register("adamw_update", _adamw_serves, adamw)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, inverse = torch.empty_like(x), floats(*x.shape[:-1])
        call("norm", _norm(x, weight, y, inverse, eps))
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        arguments = _norm(x, weight, gradient.contiguous(), inverse, ctx.eps)
        of_x = torch.empty_like(x)
        arguments.gradient = of_x.data_ptr()
        parts = None
        if ctx.needs_input_grad[1]:
            parts = floats(torch.get_num_threads(), x.shape[-1]).zero_()
            arguments.of_weight = parts.data_ptr()
        call("norm_gradient", arguments)
        return of_x, None if parts is None else parts.sum(0).to(weight.dtype), None


def _norm(x: Tensor, weight: Tensor, y: Tensor, inverse: Tensor, eps: float) -> Norm:
    return Norm(
        rows=inverse.numel(),
        dim=x.shape[-1],
        eps=eps,
        x=x.data_ptr(),
        x_kind=KINDS[x.dtype],
        weight=weight.data_ptr(),
        weight_kind=KINDS[weight.dtype],
        y=y.data_ptr(),
        y_kind=KINDS[y.dtype],
        inverse=inverse.data_ptr(),
    )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        u, v = u.contiguous(), v.contiguous()
        y = torch.empty_like(u)
        call("swiglu", _swiglu_arguments(u, v, y))
        ctx.save_for_backward(u, v)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        u, v = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_u, of_v = torch.empty_like(u), torch.empty_like(v)
        arguments = _swiglu_arguments(u, v, gradient)
        arguments.u_gradient, arguments.v_gradient = of_u.data_ptr(), of_v.data_ptr()
        call("swiglu_gradient", arguments)
        return of_u, of_v


def _swiglu_arguments(u: Tensor, v: Tensor, y: Tensor) -> SwiGLU:
    return SwiGLU(u.numel(), KINDS[u.dtype], u.data_ptr(), v.data_ptr(), y.data_ptr())


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return _rotated(x, rotation, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return _rotated(gradient, rotation, back=True), None


def _rotated(x: Tensor, rotation: Tensor, *, back: bool) -> Tensor:
    x = x.contiguous()
    batch, length, heads, head_dim = x.shape
    y = torch.empty_like(x)
    arguments = RoPE(
        tokens=batch * length,
        heads=heads,
        head_dim=head_dim,
        kind=KINDS[x.dtype],
        n_rotations=rotation.numel() // head_dim,
        back=back,
        x=x.data_ptr(),
        y=y.data_ptr(),
        rotation=rotation.data_ptr(),
    )
    call("rope", arguments)
    return y
