"""Causal attention of whole sequences on a CPU, with gradients, in compiled code."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import best_level, call
from minllama.kernels.cpu.structs import KINDS, Attention, Heads
from minllama.kernels.dispatch import register
from minllama.kernels.hardware import choice


class Packed(Protocol):
    """Packed sequences, see `minllama.model.attention_layout.PackedSequences`."""

    @property
    def starts(self) -> Tensor: ...

    @property
    def longest(self) -> int: ...

    @property
    def expand(self) -> Tensor | None: ...

    @property
    def compact(self) -> Tensor | None: ...


def serves(query: Tensor) -> bool:
    """Whether this is faster than torch's for a query (B, H, T, C)."""
    wants_gradients = torch.is_grad_enabled() and query.requires_grad
    return ops.serves(query) and query.shape[2] <= _longest(wants_gradients)


def serves_packed(longest: int) -> bool:
    """Whether this is faster than torch's for packed sequences of up to so many tokens."""
    return longest <= _longest(torch.is_grad_enabled())


def _longest(wants_gradients: bool) -> float:
    return choice("attention trained" if wants_gradients else "attention", best_level()).limit


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(C)) V, each query seeing the keys of its text up to its own.

    Computed in float32, whatever the dtype. torch's own takes a third of a training step on short
    sequences, nearly all of it in the backward pass.

    Args:
        query: (B, T, H, C).
        key, value: (B, T, K, C); each of the K heads serves H / K query heads.
        packed: the sequences' boundaries in the only row; None if each row is one sequence.

    Returns:
        (B, T, H, C).
    """
    if (
        key.shape != value.shape
        or key.shape[:2] != query.shape[:2]
        or key.shape[3] != query.shape[3]
        or query.shape[2] % key.shape[2]
    ):
        raise ops.unfit("causal_attention", query, key, value)
    if packed is not None and packed.expand is not None:
        query, key, value = (x[:, packed.expand] for x in (query, key, value))
    y: Tensor = _CausalAttention.apply(query, key, value, packed)  # type: ignore[no-untyped-call]
    return y if packed is None or packed.compact is None else y[:, packed.compact]


def _supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    packed: Packed | None = None,
    dropout: float = 0.0,
) -> bool:
    """Whether the operation `attention` of the model is one for `causal_attention`."""
    if not is_causal or mask is not None or dropout:
        return False
    return serves(query) if packed is None else ops.serves(query)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    packed: Packed | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same with heads before positions, as the model has it: (B, H, T, C) -> (B, H, T, C)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, H, C)
    return causal_attention(query, key, value, packed).transpose(1, 2)


register("attention", _supports, _attention)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: Packed | None
    ) -> Tensor:
        query, key, value = (_with_whole_heads(x.to(query.dtype)) for x in (query, key, value))
        out = query.new_empty(query.shape)
        batch, length, n_heads, _ = query.shape
        log_sums = ops.floats(batch, n_heads, length)
        call("attention", _described(query, key, value, out, log_sums, packed))
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.packed = packed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sums = ctx.saved_tensors
        gradient = _with_whole_heads(gradient)
        results = [x.new_empty(x.shape) for x in (query, key, value)]
        arguments = _described(query, key, value, out, log_sums, ctx.packed)
        arguments.out_gradient = _heads(gradient)
        arguments.query_gradient, arguments.key_gradient, arguments.value_gradient = map(
            _heads, results
        )
        call("attention_gradient", arguments)
        return results[0], results[1], results[2], None


def _with_whole_heads(x: Tensor) -> Tensor:
    """The same values, those of a head contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _described(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, packed: Packed | None
) -> Attention:
    rows, length, n_heads, head_dim = query.shape
    return Attention(
        rows=rows if packed is None else len(packed.starts) - 1,
        length=length if packed is None else packed.longest,
        n_heads=n_heads,
        n_kv_heads=key.shape[2],
        head_dim=head_dim,
        kind=KINDS[query.dtype],
        starts=None if packed is None else packed.starts.data_ptr(),
        query=_heads(query),
        key=_heads(key),
        value=_heads(value),
        out=_heads(out),
        log_sums=log_sums.data_ptr(),
    )


def _heads(x: Tensor) -> Heads:
    return Heads(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))
