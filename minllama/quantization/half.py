"""Modules that keep half-precision weights and compute in float32.

For machines that read bfloat16 or float16 but only emulate arithmetic in it: results are those of
the same weights in float32, in half the memory, and a decode step reads half as much. Compiled code
upcasts while it multiplies; without it, and in backward passes, one matrix is upcast at a time.
"""

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import best_level
from minllama.kernels.hardware import choice

MAX_BUFFERED = 2**24  # values of an upcast matrix that memory is kept for: 64 MiB


class UpcastLinear(nn.Linear):
    """y = W x + b in float32, with a W in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), float32."""
        y = upcast_matmul(x, self.weight)
        return y if self.bias is None else y + self.bias.float()


class UpcastEmbedding(nn.Embedding):
    """Rows of a matrix in half precision, as float32."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., dim), float32."""
        return super().forward(ids).float()

    def as_linear(self, x: Tensor) -> Tensor:
        """X W^T in float32: (..., dim) -> (..., V)."""
        return upcast_matmul(x, self.weight)


def upcast_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Give x W^T in float32: (..., in), (out, in) -> (..., out)."""
    y: Tensor = _Matmul.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _Matmul(torch.autograd.Function):
    """The weight is upcast again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.float()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        # Compiled code upcasts while it multiplies, and keeps no buffer.
        few = choice("upcast", best_level()).limit
        if x.numel() <= few * weight.shape[1] and ops.serves(weight):
            return ops.dense_matmul(weight, x)
        return F.linear(x, _upcast(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = gradient @ _upcast(weight) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        grad_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return grad_x, grad_weight.to(weight.dtype)


_scratch = threading.local()


def _upcast(weight: Tensor) -> Tensor:
    """The weight in float32, in a buffer that the next one reuses: new memory would be slower."""
    n = weight.numel()
    if n > MAX_BUFFERED or weight.device.type != "cpu":
        return weight.float()
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < n:
        with torch.inference_mode(False):
            buffer = _scratch.buffer = ops.floats(n)
    upcast: Tensor = buffer[:n].view(weight.shape).copy_(weight.detach())
    return upcast


def replace_by_upcast(model: nn.Module, name: str) -> None:
    """Replace a linear layer or embedding by one that upcasts the same tensors."""
    old = model.get_submodule(name)
    new: UpcastLinear | UpcastEmbedding
    if isinstance(old, nn.Embedding):
        new = UpcastEmbedding(old.num_embeddings, old.embedding_dim, _weight=old.weight)
    else:
        assert isinstance(old, nn.Linear)
        new = UpcastLinear(old.in_features, old.out_features, bias=False, device="meta")
        new.weight, new.bias = old.weight, old.bias
    model.set_submodule(name, new)
