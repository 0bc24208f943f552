"""Modules that keep half-precision weights and compute in float32.

For machines that read bfloat16 or float16 but only emulate arithmetic in it: results are those of
the same weights in float32, in half the memory, and a decode step reads half as much. A forward
pass over many tokens upcasts one matrix at a time.
"""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.kernels.cpu import ops

MOST_KEPT = 2**24  # numbers of a widened matrix that memory is kept for: 64 MiB
FEW_ROWS = 16  # up to which compiled code widens a row of a weight on its way, and keeps none


class WidenedLinear(nn.Linear):
    """y = W x + b in float32, with a W in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), float32."""
        y = widened_product(x, self.weight)
        return y if self.bias is None else y + self.bias.float()


class WidenedEmbedding(nn.Embedding):
    """Rows of a matrix in half precision, as float32."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., dim), float32."""
        return super().forward(ids).float()

    def as_linear(self, x: Tensor) -> Tensor:
        """X W^T in float32: (..., dim) -> (..., V)."""
        return widened_product(x, self.weight)


def widened_product(x: Tensor, weight: Tensor) -> Tensor:
    """Give x W^T in float32: (..., in), (out, in) -> (..., out)."""
    y: Tensor = _Matmul.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _Matmul(torch.autograd.Function):
    """The weight is upcast again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.float()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        if x.numel() <= FEW_ROWS * weight.shape[1] and ops.serves(weight):
            return ops.dense_matmul(weight, x)
        return F.linear(x, _widened(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ _widened(weight) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return of_x, of_weight.to(weight.dtype)


_kept = threading.local()


def _widened(weight: Tensor) -> Tensor:
    """The weight in float32, in a buffer that the next one reuses: new memory would be slower."""
    n = weight.numel()
    if n > MOST_KEPT or weight.device.type != "cpu":
        return weight.float()
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < n:
        with torch.inference_mode(False):
            buffer = _kept.buffer = ops.floats(n)
    widened: Tensor = buffer[:n].view(weight.shape).copy_(weight.detach())
    return widened


def replace_by_widened(model: nn.Module, name: str) -> None:
    """Replace a linear layer or embedding by such a module with the same tensors."""
    old = model.get_submodule(name)
    new: WidenedLinear | WidenedEmbedding
    if isinstance(old, nn.Embedding):
        new = WidenedEmbedding(old.num_embeddings, old.embedding_dim, _weight=old.weight)
    else:
        assert isinstance(old, nn.Linear)
        new = WidenedLinear(old.in_features, old.out_features, bias=False, device="meta")
        new.weight, new.bias = old.weight, old.bias
    model.set_submodule(name, new)
