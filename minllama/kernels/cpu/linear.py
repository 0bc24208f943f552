"""Linear layers of many rows: in float32, in compiled code where that is faster than torch's, and
in half precision with memory that does not grow with the number of shapes.

torch multiplies bfloat16 and float16 on CPUs with oneDNN, which compiles and keeps a primitive for
each number of rows, with scratch memory proportional to the rows: 2 MB for each of the four matrix
shapes of a 135M model at 3,000 rows. A long file of texts, whose batches all have different numbers
of tokens, then takes gigabytes. Here such a matmul is computed in chunks of CHUNK rows, the last
one padded to a multiple of STEP, so that there are only CHUNK / STEP numbers of rows. Beside AMX,
bfloat16 is multiplied in compiled code instead.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import best_level
from minllama.kernels.dispatch import is_plain, register
from minllama.kernels.hardware import choice

HALF_DTYPES = (torch.bfloat16, torch.float16)
CHUNK = 512  # rows, from which on oneDNN is no faster with more
STEP = 32


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether this is a half-precision matmul on a CPU with a frozen weight."""
    is_half = x.device.type == "cpu" and x.dtype in HALF_DTYPES and weight.dtype == x.dtype
    is_trained = weight.requires_grad and torch.is_grad_enabled()
    return is_half and not is_trained and is_plain(x) and is_plain(weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b in chunks: (..., in), (out, in), (out,) -> (..., out)."""
    y: Tensor = _Matmul.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


register("linear", serves, linear)


def serves_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether this is a float32 matmul, without gradients, that compiled code computes faster."""
    is_float32 = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not is_float32 or torch.is_autocast_enabled("cpu"):
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if not all(map(ops.serves, tensors)):
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    return ops.FEW_ROWS < rows <= choice("dense", best_level()).limit


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b in compiled code: (..., in), (out, in), (out,) -> (..., out)."""
    y = ops.dense_matmul(weight, x)
    return y if bias is None else y.add_(bias)


register("linear", serves_float32, linear_float32)


def matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """Compute x M in chunks, for half precision on a CPU; no gradients.

    Args:
        x: (..., in).
        matrix: (in, out), of the same dtype.

    Returns:
        (..., out).
    """
    if x.device.type != "cpu" or x.dtype not in HALF_DTYPES:
        return x @ matrix
    if matrix.dtype == x.dtype and ops.has_half_matmul(x, len(matrix), is_quantized=False):
        transposed = matrix.is_contiguous()
        return ops.half_matmul(matrix if transposed else matrix.t(), x, transposed=transposed)
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    y = rows.new_empty(n, matrix.shape[1])
    whole = n - n % CHUNK
    for start in range(0, whole, CHUNK):
        torch.mm(rows[start : start + CHUNK], matrix, out=y[start : start + CHUNK])
    if rest := n - whole:
        padding = -rest % STEP if rest > 1 else 0
        if padding:
            y[whole:] = torch.mm(F.pad(rows[whole:], (0, 0, 0, padding)), matrix)[:rest]
        else:
            torch.mm(rows[whole:], matrix, out=y[whole:])
    return y.view(*x.shape[:-1], matrix.shape[1])


class _Matmul(torch.autograd.Function):
    """x W^T with a weight that is not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return matmul(x, weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return matmul(gradient, weight), None
