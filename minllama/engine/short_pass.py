"""A few tokens that continue a cache, in compiled code in the place of a Llama's modules.

The same hidden states and logits, sooner: by `minllama.engine.cpu` on CPUs and by
`minllama.engine.cuda_graph` on GPUs. Here it is said when that may be; `minllama.engine.support`
keeps who does it with the cache. Knows nothing of what the tokens are for.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from minllama.engine import cpu as native_step
from minllama.engine import cuda_graph
from minllama.engine.cpu import NativeStep
from minllama.engine.cuda_graph import GraphStep
from minllama.engine.support import Runner, has_hooks
from minllama.model.attention_layout import check_continuation, view_of_continuation
from minllama.model.inputs import row_lens, wanted_tokens
from minllama.model.kv_cache import KVCache

Wanted = Literal["all", "last"] | Tensor | None
Found = tuple[Tensor, Tensor | None]  # hidden states and logits


def short_pass(
    llama: Any, ids: Tensor, attention_mask: Tensor | None, cache: KVCache, logits: Wanted
) -> Found | None:
    """What `Llama.forward` gives for these, the cache advanced; None where the modules must.

    Args:
        llama: a `minllama.Llama`.
        ids, attention_mask, cache, logits: as `Llama.forward` has checked them.

    Raises:
        MinllamaError: the cache is of another model, or the tokens cannot continue it.
    """
    if cache.is_steady and attention_mask is None and logits is not None:
        found = None if isinstance(logits, Tensor) else _next_logits(llama, ids, cache, logits)
        if found is not None:
            return found
    if not _is_short(llama, ids, attention_mask):
        if not cache.is_steady:  # the passes behind it are to look at what has just read a text
            cache.native = None
        return None
    cache.check_serves(llama.config, llama.dtype, llama.device)
    step = _step_of(llama, cache)
    if isinstance(step, NativeStep):
        return _run_natively(llama, step, ids, attention_mask, cache, logits)
    if isinstance(step, GraphStep) and not isinstance(logits, Tensor):
        return _run_in_graph(llama, step, ids, cache, logits)
    return None


def runs_natively(llama: Any) -> bool:
    """Whether the compiled code for CPUs computes what this Llama's modules do."""
    return llama.has_own_layers() and native_step.can_run(llama)


def _is_short(llama: Any, ids: Tensor, attention_mask: Tensor | None) -> bool:
    if llama.device.type == "cuda":
        return ids.is_cuda and cuda_graph.is_step(ids, attention_mask)
    return native_step.is_short(ids, attention_mask, llama.long_dtype or llama.dtype)


def _is_for_modules(device: str) -> bool:
    """Whether a pass is to be one of torch's operations: for gradients, or in autocast's dtypes."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled(device)


def _step_of(llama: Any, cache: KVCache) -> NativeStep | GraphStep | None:
    """What runs short passes over this cache in compiled code; None for the model's modules."""
    device = llama.device.type
    if device not in ("cpu", "cuda") or _is_for_modules(device):
        return None
    if device == "cuda" and cache.keys[0].dtype != llama.dtype:
        return None
    known = cache.native
    if (
        isinstance(known, Runner)
        and known.serves(llama)
        and cache.max_len
        and (cache.is_steady or known.finds_all_in_place())
    ):
        step: NativeStep | GraphStep | None = known.step_unless_heard(is_steady=cache.is_steady)
        if not isinstance(step, GraphStep) or step.is_of_this_stream():
            return step
    if has_hooks(llama):  # it may be for a while only
        return None
    step = None
    if runs_natively(llama):
        step = NativeStep(llama)
    elif llama.has_own_layers() and cuda_graph.can_run(llama):
        step = cuda_graph.step_of(llama)
    cache.native = Runner.of(llama, step)
    return step


def _next_logits(llama: Any, ids: Tensor, cache: KVCache, logits: str) -> Found | None:
    """A decoder's step on a CPU, of which all is known that the passes before it have looked up.

    The same as `_run_natively`, with next to no work besides: on a processor that has just read all
    weights the interpreter finds nothing in the caches, and ten of its lines take 0.1 ms.
    """
    known = cache.native
    if (
        logits != "last"
        or ids.shape[1] != 1
        or not cache.max_len
        or not isinstance(known, Runner)
        or not isinstance(known.step, NativeStep)
        or not known.serves(llama)
        or known.step_unless_heard(is_steady=True) is None
        or len(ids) > known.step.most_rows
        or _is_for_modules("cpu")
    ):
        return None
    check_continuation(ids, cache, llama.config)
    table = llama.rope.fixed_table(cache.max_len + 1, ids.device)
    if table is None:
        return None
    found: Found = known.step.next_logits(ids, cache, table)
    cache.advance([1] * len(ids))
    return found


def _run_natively(
    llama: Any,
    step: NativeStep,
    ids: Tensor,
    attention_mask: Tensor | None,
    cache: KVCache,
    logits: Wanted,
) -> Found:
    view = view_of_continuation(ids, attention_mask, None, cache, llama.config)
    at = wanted_tokens(ids, attention_mask, logits)
    every = torch.arange(0 if logits is None else ids.numel(), device=ids.device)
    rotation = llama.rope(view.positions, view.text_len)
    logits_of = every if at is None else at.flatten()
    hidden, found = step(ids, view.positions, rotation, cache, logits_of)
    cache.advance(row_lens(ids, attention_mask))
    if at is not None:
        hidden = hidden.flatten(0, 1)[at]
    return hidden, None if logits is None else found.view(*hidden.shape[:-1], -1)


def _run_in_graph(
    llama: Any,
    step: GraphStep,
    ids: Tensor,
    cache: KVCache,
    logits: Literal["all", "last"] | None,
) -> Found | None:
    """The same for one token of each row; None where no graph could be captured."""
    check_continuation(ids, cache, llama.config)
    found = step(ids, cache)
    if found is None:
        return None
    hidden, every = found
    cache.advance([1] * len(ids))
    if logits == "last":
        return hidden.squeeze(1), every.squeeze(1)
    return hidden, None if logits is None else every
