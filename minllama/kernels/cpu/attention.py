"""Causal attention of whole texts on a CPU, with gradients, by compiled code."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import best_level, call
from minllama.kernels.cpu.structs import KINDS, Attention, Heads

# Tokens of a text up to which the gradients here take less time than torch's, and up to which the
# result alone takes no longer: with AVX-512, for which torch has more of its own, and without.
LONGEST_TRAINED = 512
LONGEST = {2: 64, 1: 512, 0: 64}


class Texts(NamedTuple):
    """Texts one after the other in one row, without padding.

    Where all begin alike, the row holds their beginning once, in the first of them.

    Attributes:
        starts: (n + 1,) int64, where each begins, and where the last one ends, beginnings and all.
        longest: tokens of the longest.
        spread: (starts[-1],), which token of the row each token of the whole texts is; None: they
            share nothing.
        kept: which tokens of the whole texts those of the row are.
    """

    starts: Tensor
    longest: int
    spread: Tensor | None = None
    kept: Tensor | None = None


def serves(query: Tensor) -> bool:
    """Whether this is faster than torch's for a query (B, H, T, C)."""
    wants_gradients = torch.is_grad_enabled() and query.requires_grad
    return ops.serves(query) and query.shape[2] <= _longest(wants_gradients)


def serves_packed(longest: int) -> bool:
    """Whether this is faster than torch's for texts of up to so many tokens, in one row."""
    return longest <= _longest(torch.is_grad_enabled())


def _longest(wants_gradients: bool) -> int:
    return LONGEST_TRAINED if wants_gradients else LONGEST[best_level()]


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(C)) V, each query seeing the keys of its text up to its own.

    In float32 within, whatever the dtype. torch's own takes a third of a training step on short
    texts, nearly all of it in the backward pass.

    Args:
        query: (B, T, H, C).
        key, value: (B, T, K, C); each of the K heads serves H / K query heads.
        texts: where the texts lie in the only row; None: each row is one.

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
    if texts is not None and texts.spread is not None:
        query, key, value = (x[:, texts.spread] for x in (query, key, value))
    y: Tensor = _CausalAttention.apply(query, key, value, texts)  # type: ignore[no-untyped-call]
    return y if texts is None or texts.kept is None else y[:, texts.kept]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, texts: Texts | None) -> Tensor:
        query, key, value = (_with_whole_heads(x.to(query.dtype)) for x in (query, key, value))
        out = query.new_empty(query.shape)
        batch, length, n_heads, _ = query.shape
        log_sums = ops.floats(batch, n_heads, length)
        call("attention", _described(query, key, value, out, log_sums, texts))
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.texts = texts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sums = ctx.saved_tensors
        gradient = _with_whole_heads(gradient)
        results = [x.new_empty(x.shape) for x in (query, key, value)]
        arguments = _described(query, key, value, out, log_sums, ctx.texts)
        arguments.out_gradient = _heads(gradient)
        arguments.query_gradient, arguments.key_gradient, arguments.value_gradient = map(
            _heads, results
        )
        call("attention_gradient", arguments)
        return results[0], results[1], results[2], None


def _with_whole_heads(x: Tensor) -> Tensor:
    """The same numbers, those of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _described(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, texts: Texts | None
) -> Attention:
    rows, length, n_heads, head_dim = query.shape
    return Attention(
        rows=rows if texts is None else len(texts.starts) - 1,
        length=length if texts is None else texts.longest,
        n_heads=n_heads,
        n_kv_heads=key.shape[2],
        head_dim=head_dim,
        kind=KINDS[query.dtype],
        starts=None if texts is None else texts.starts.data_ptr(),
        query=_heads(query),
        key=_heads(key),
        value=_heads(value),
        out=_heads(out),
        log_sums=log_sums.data_ptr(),
    )


def _heads(x: Tensor) -> Heads:
    return Heads(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))
