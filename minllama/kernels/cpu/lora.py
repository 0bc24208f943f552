"""The low-rank update of a linear layer on a CPU, with gradients, in compiled code."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import call
from minllama.kernels.cpu.ops import floats, unfit
from minllama.kernels.cpu.structs import KINDS, LowRank
from minllama.kernels.dispatch import register


def low_rank_product(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    onto: Tensor | None = None,
) -> Tensor:
    """Compute scale * B (A dropout(x)) in float32; the result has x's dtype.

    Args:
        x: (..., in).
        a: lora_A (R, in).
        b: lora_B (out, R).
        scale: factor on all of it.
        dropout: probability of zeroing each element of x; the others are scaled by 1 / (1 -
            dropout). Uses torch's random numbers.
        onto: (..., out), contiguous and of x's dtype, to which the result is added, in place.

    Returns:
        (..., out).
    """
    fits_onto = onto is None or onto.shape == (*x.shape[:-1], len(b))
    if x.shape[-1] != a.shape[1] or len(a) != b.shape[1] or not fits_onto:
        raise unfit("low_rank_product", x, a, b, *([] if onto is None else [onto]))
    seed = int(torch.randint(2**62, ()).item()) if dropout else 0
    settings = (scale, dropout, seed)
    y: Tensor = _LowRank.apply(x, a.float(), b.float(), onto, settings)  # type: ignore[no-untyped-call]
    return y


def _add_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Compute y + scale * B (A dropout(x)), in place if possible."""
    # A view (as a layer with a bias gives) belongs to what it was made by: none is written to.
    if y.dtype == x.dtype and not y._is_view() and y.is_contiguous():
        return low_rank_product(x, a, b, scale, dropout=dropout, onto=y)
    # Autocast chooses y's dtype.
    return y + low_rank_product(x, a, b, scale, dropout=dropout).to(y.dtype)


def _product(x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    return low_rank_product(x, a, b, scale, dropout=dropout)


register("low_rank", lambda x, *_, **__: ops.serves(x), _product)
register("add_low_rank", lambda y, x, *_, **__: ops.serves(x), _add_low_rank)


Settings = tuple[float, float, int]  # scale, dropout, seed


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, onto: Tensor | None, settings: Settings
    ) -> Tensor:
        x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
        y = x.new_empty(*x.shape[:-1], len(b)) if onto is None else onto
        if onto is not None:
            ctx.mark_dirty(onto)
        low = floats(*x.shape[:-1], len(a))
        arguments = _described(x, a, b, y, low, settings)
        arguments.onto = onto is not None
        call("low_rank", arguments)
        ctx.save_for_backward(x, a, b, low)
        ctx.settings = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, None]:
        x, a, b, low = ctx.saved_tensors
        gradient = gradient.contiguous()
        arguments = _described(x, a, b, gradient, low, ctx.settings)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        threads = torch.get_num_threads()
        a_parts = floats(threads, *a.shape).zero_()
        b_parts = floats(threads, *b.t().shape).zero_()
        arguments.x_gradient = None if of_x is None else of_x.data_ptr()
        arguments.a_parts, arguments.b_parts = a_parts.data_ptr(), b_parts.data_ptr()
        call("low_rank_gradient", arguments)
        of_onto = gradient if ctx.needs_input_grad[3] else None
        return of_x, a_parts.sum(0), b_parts.sum(0).t(), of_onto, None


def _described(
    x: Tensor, a: Tensor, b: Tensor, y: Tensor, low: Tensor, settings: Settings
) -> LowRank:
    scale, dropout, seed = settings
    return LowRank(
        rows=x.numel() // x.shape[-1],
        in_dim=x.shape[-1],
        out_dim=len(b),
        rank=len(a),
        kind=KINDS[x.dtype],
        scale=scale,
        dropout=dropout,
        seed=seed,
        x=x.data_ptr(),
        a=a.data_ptr(),
        b=b.data_ptr(),
        y=y.data_ptr(),
        low=low.data_ptr(),
    )
