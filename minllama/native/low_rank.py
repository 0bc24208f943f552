"""What a low-rank adapter adds to a linear layer on a CPU, with gradients, by compiled code."""

from typing import Any

import torch
from torch import Tensor

from minllama.native.layout import KINDS, LowRank
from minllama.native.library import call


def low_rank_product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Give scale * B (A x), computed in float32, in x's dtype.

    Args:
        x: (..., in).
        a: lora_A (R, in).
        b: lora_B (out, R).
        scale: factor on all of it.

    Returns:
        (..., out).
    """
    y: Tensor = _LowRank.apply(x, a.float(), b.float(), scale)  # type: ignore[no-untyped-call]
    return y


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
        y = torch.empty(*x.shape[:-1], len(b), dtype=x.dtype)
        low = torch.empty(*x.shape[:-1], len(a))
        call("low_rank", _described(x, a, b, y, low, scale))
        ctx.save_for_backward(x, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, a, b, low = ctx.saved_tensors
        arguments = _described(x, a, b, gradient.contiguous(), low, ctx.scale)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        threads = torch.get_num_threads()
        a_parts = torch.zeros(threads, *a.shape)
        b_parts = torch.zeros(threads, *b.t().shape)
        arguments.x_gradient = None if of_x is None else of_x.data_ptr()
        arguments.a_parts, arguments.b_parts = a_parts.data_ptr(), b_parts.data_ptr()
        call("low_rank_gradient", arguments)
        return of_x, a_parts.sum(0), b_parts.sum(0).t(), None


def _described(x: Tensor, a: Tensor, b: Tensor, y: Tensor, low: Tensor, scale: float) -> LowRank:
    return LowRank(
        rows=x.numel() // x.shape[-1],
        in_dim=x.shape[-1],
        out_dim=len(b),
        rank=len(a),
        kind=KINDS[x.dtype],
        scale=scale,
        x=x.data_ptr(),
        a=a.data_ptr(),
        b=b.data_ptr(),
        y=y.data_ptr(),
        low=low.data_ptr(),
    )
