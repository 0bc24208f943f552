"""Positions of the tokens of a forward pass, and which keys each of them may attend to.

A layout follows from masks, positions and the cache's contents. Also here: checks of a forward
pass's arguments, and the selection of positions for logits. Token t of sequence b has the flat
index b * T + t.
"""

import math
import reprlib
from typing import NamedTuple

import torch
from torch import Tensor

from minllama.errors import ContextError, MinllamaError
from minllama.kernels.dispatch import is_plain
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache

ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
NOT_FINITE = (
    "the model's logits are NaN or infinite: its weights are damaged, or values overflow the "
    "dtype; try --dtype bfloat16 or float32, and --quantize none for quantized weights"
)


class PackedSequences(NamedTuple):
    """Sequences concatenated into one row, without padding (cu_seqlens in other libraries).

    A prefix that all share is stored once, in the first sequence.

    Attributes:
        starts: (n + 1,) int64, the start of each sequence and the end of the last, counting shared
            prefixes for every sequence.
        longest: tokens of the longest.
        expand: (starts[-1],), index in the row of each token of the complete sequences; None
            without a shared prefix.
        compact: (N,), index in the complete sequences of each token of the row; None likewise.
    """

    starts: Tensor
    longest: int
    expand: Tensor | None = None
    compact: Tensor | None = None

    def mask(self) -> Tensor:
        """Bool (N, N), true where a token may attend: in its own sequence, up to itself."""
        every = torch.arange(int(self.starts[-1]), device=self.starts.device)
        sequence = torch.searchsorted(self.starts, every, right=True)
        queries = every if self.compact is None else self.compact
        allowed = (sequence[queries, None] == sequence) & (every <= queries[:, None])
        if self.expand is None:
            return allowed
        in_row = torch.zeros(len(queries), len(queries), device=allowed.device)
        return in_row.index_add(1, self.expand, allowed.float()) > 0


class AttentionLayout(NamedTuple):
    """Positions of the tokens of one forward pass, and which keys each of them may attend to.

    Attributes:
        positions: (B, T) or (1, T), integers from 0.
        text_len: a number above all positions.
        mask: bool, broadcast to (B, H, T, S), true where a query may attend; None for everywhere.
        is_causal: query t attends to keys 0..t of S = T; replaces a mask.
        packed: the only row contains several sequences, each of which attends only to itself; with
            `is_causal`.
    """

    positions: Tensor
    text_len: int
    mask: Tensor | None = None
    is_causal: bool = False
    packed: PackedSequences | None = None


def layout_of(
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: KVCache | None,
    config: LlamaConfig,
) -> AttentionLayout:
    """The layout of a forward pass over (B, T) tokens; arguments as for `Llama.forward`.

    Raises:
        MinllamaError: the sequences outgrow the context or the cache, or the arguments contradict
            one another.
    """
    check_inputs(ids, mask, config.vocab_size)
    mask = None if mask is None else mask.bool()
    if cache is not None:
        return layout_of_continuation(ids, mask, positions, cache, config)
    return layout_without_cache(ids, mask, positions, config)


def layout_without_cache(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, config: LlamaConfig
) -> AttentionLayout:
    """The layout of sequences that are read from their start.

    Args:
        ids: (B, T).
        mask: bool (B, T), true at real tokens; or (B, T, T), true where a token may attend, which
            then replaces causal masking.
        positions: (B, T); None counts each sequence's real tokens; needed with a (B, T, T) mask.

    Raises:
        MinllamaError: the texts are longer than the context, or positions are out of it.
    """
    if mask is not None and mask.dim() == 3:
        if positions is None:
            raise MinllamaError("an attention_mask of shape (B, T, T) needs positions, too")
        return AttentionLayout(positions, _checked_text_len(positions, config), mask.unsqueeze(1))
    text_len = ids.shape[1]
    check_context(text_len, config)
    columns = torch.arange(text_len, device=ids.device)
    if mask is None or (config.causal and is_right_padded(mask)):
        # No earlier token attends to padding after the text anyway.
        default, allowed = columns.unsqueeze(0), None
    else:
        default = (mask.long().cumsum(-1) - 1).clamp(min=0)
        allowed = mask[:, None, None, :]  # (B, 1, 1, T)
        if config.causal:
            allowed = allowed & (columns <= columns[:, None])  # (B, 1, T, T)
        # Padding attends to itself: a softmax over nothing is NaN.
        allowed = allowed | (columns == columns[:, None])
    is_causal = config.causal and allowed is None
    if positions is None:
        return AttentionLayout(default, text_len, allowed, is_causal)
    return AttentionLayout(positions, _checked_text_len(positions, config), allowed, is_causal)


def layout_of_continuation(
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: KVCache,
    config: LlamaConfig,
) -> AttentionLayout:
    """The layout of tokens that continue a cache's sequences; reserves space for them.

    Args:
        ids: (B, T), the new tokens.
        mask: bool (B, T), true at real tokens, padding on the right; or (B, T, T), true where a new
            token may attend among the new ones. All of them attend to everything in the cache.
        positions: (B, T), with a (B, T, T) mask only.

    Raises:
        MinllamaError: the texts outgrow the context or the cache, or the arguments contradict one
            another.
    """
    batch, new_len = ids.shape
    _check_rows(ids, cache, config)
    is_free = mask is not None and mask.dim() == 3
    if is_free != (positions is not None):
        raise MinllamaError(
            "with a cache, give both positions and an attention_mask of shape (B, T, T), or neither"
        )
    if mask is not None and not is_free and not is_right_padded(mask):
        raise MinllamaError("with a cache, padding must be on the right of each row")
    cache.reserve(new_len)
    if mask is not None and positions is not None:
        if not cache.is_uniform:
            raise MinllamaError(
                "an attention_mask of shape (B, T, T) needs sequences of equal length"
            )
        cached = mask.new_ones(batch, new_len, cache.max_len)
        allowed = torch.cat((cached, mask), dim=-1).unsqueeze(1)  # (B, 1, T, S)
        return AttentionLayout(positions, _checked_text_len(positions, config), allowed)
    text_len = cache.max_len + new_len
    check_context(text_len, config)
    columns = torch.arange(new_len, device=ids.device)
    if cache.is_uniform:
        positions = columns.unsqueeze(0) + cache.max_len  # (1, T)
    else:
        positions = columns + torch.tensor(cache.lengths, device=ids.device).unsqueeze(-1)
    if cache.max_len == 0:
        return AttentionLayout(positions, text_len, is_causal=True)
    if cache.is_uniform and new_len == 1:
        return AttentionLayout(positions, text_len)
    # A slot's index is its position, so one comparison hides the future, the free slots of
    # shorter rows, and their padding.
    slots = torch.arange(text_len, device=ids.device)
    return AttentionLayout(
        positions, text_len, mask=(slots <= positions.unsqueeze(-1)).unsqueeze(1)
    )


def check_continuation(ids: Tensor, cache: KVCache, config: LlamaConfig) -> None:
    """Refuse tokens (B, T), all real, that cannot continue a cache's sequences."""
    _check_rows(ids, cache, config)
    cache.reserve(ids.shape[1])
    check_context(cache.max_len + ids.shape[1], config)


def _check_rows(ids: Tensor, cache: KVCache, config: LlamaConfig) -> None:
    if not config.causal:
        raise MinllamaError("a cache needs causal attention, and this model is bidirectional")
    if len(ids) != cache.batch_size:
        raise MinllamaError(f"{len(ids)} sequences for a cache of {cache.batch_size}")


def check_context(text_len: int, config: LlamaConfig) -> None:
    """Refuse a text that is longer than the context with a ContextError."""
    if text_len > config.context_len:
        raise ContextError(
            f"the text has {text_len} tokens, but the model's context is {config.context_len}"
        )


def is_right_padded(mask: Tensor) -> bool:
    """Whether padding is on the right only."""
    return bool((mask[:, :-1] >= mask[:, 1:]).all())


def _checked_text_len(positions: Tensor, config: LlamaConfig) -> int:
    first, last = positions.min().item(), positions.max().item()
    if first < 0 or last >= config.context_len:
        raise MinllamaError(
            f"positions must be from 0 to {config.context_len - 1}, not {first} to {last}"
        )
    return int(last) + 1


def check_inputs(ids: Tensor, mask: Tensor | None, vocab_size: int) -> None:
    """Refuse ids that are not integers (B, T) in [0, V), and a mask not (B, T) nor (B, T, T)."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise MinllamaError(f"ids must be int64 or int32, not {ids.dtype}")
    if ids.dim() != 2 or 0 in ids.shape:
        raise MinllamaError(f"ids must have shape (B, T), neither 0, not {tuple(ids.shape)}")
    if mask is not None and mask.shape not in (ids.shape, (*ids.shape, ids.shape[1])):
        raise MinllamaError(
            f"attention_mask has shape {tuple(mask.shape)} and ids {tuple(ids.shape)}; they must "
            "be equal, or the mask (B, T, T) (with a cache, both cover the new tokens only)"
        )
    if ids.is_cpu and is_plain(ids):  # reading ids on a GPU would wait for it
        out_of_range = (ids.min() < 0) | (ids.max() >= vocab_size)
        if is_plain(out_of_range) and out_of_range:  # meta tensors have no values
            raise MinllamaError(f"token ids must be from 0 to {vocab_size - 1}")


def check_logits(logits: str | Tensor | None, mask: Tensor | None) -> None:
    """Refuse unknown selections, and the last real token of a sequence without any."""
    if not isinstance(logits, str):
        return
    if logits not in ("all", "last"):
        raise MinllamaError(f"logits must be 'all', 'last', a tensor or None, not {logits!r}")
    if logits == "last" and mask is not None and (mask.dim() == 3 or not mask.any(-1).all()):
        raise MinllamaError("attention_mask has a sequence without tokens, so there is no last one")


def selected_positions(
    ids: Tensor, mask: Tensor | None, which: str | Tensor | None
) -> Tensor | None:
    """Flat indices of the tokens whose logits are selected, (B,) or (B, N).

    None if no positions are selected: for all logits, and for none.
    """
    if which is None or (isinstance(which, str) and which == "all"):
        return None
    if not isinstance(which, Tensor):
        return last_tokens(ids, mask)
    batch, length = ids.shape
    if which.dim() != 2 or len(which) not in (1, batch) or which.numel() == 0:
        raise MinllamaError(
            f"logits selects positions of shape {tuple(which.shape)}; give (B, N), here "
            f"({batch}, N)"
        )
    if which.is_floating_point() or which.dtype == torch.bool:
        raise MinllamaError(f"logits must select positions by integers, not {which.dtype}")
    starts = torch.arange(batch, device=ids.device) * length
    which = which.to(starts)
    if ((which < -length) | (which >= length)).any():
        raise MinllamaError(f"logits selects positions that {length} tokens do not have")
    return starts.unsqueeze(-1) + which % length  # some count from the end


def last_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B,), the flat index of the last real token of each sequence of x, (B, T) or (B, T, D)."""
    batch, length = x.shape[:2]
    starts = torch.arange(batch, device=x.device) * length
    if mask is None:
        return starts + (length - 1)
    return starts + (torch.arange(length, device=x.device) * mask.bool()).argmax(-1)


def row_lens(ids: Tensor, mask: Tensor | None) -> list[int]:
    """The number of real tokens of each sequence."""
    if mask is None or mask.dim() == 3:
        return [ids.shape[1]] * ids.shape[0]
    lens: list[int] = mask.bool().sum(-1).tolist()
    return lens


def check_generation(
    ids: Tensor, max_new_tokens: int, temperature: float, config: LlamaConfig
) -> None:
    """Refuse what `Llama.generate` cannot continue with a MinllamaError."""
    if not isinstance(ids, Tensor):
        raise MinllamaError(f"ids must be a tensor of shape (B, T), not {reprlib.repr(ids)}")
    if ids.dim() != 2 or 0 in ids.shape or ids.dtype not in ID_DTYPES:
        raise MinllamaError(
            f"ids must be integers of shape (B, T), neither 0, not {ids.dtype} of "
            f"{tuple(ids.shape)}"
        )
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise MinllamaError(f"max_new_tokens must be an integer above 0, not {max_new_tokens!r}")
    if type(temperature) not in (int, float) or not 0 <= temperature < math.inf:
        raise MinllamaError(f"temperature must be >= 0, not {temperature!r}")
    total = ids.shape[1] + max_new_tokens
    if total > config.context_len:
        raise ContextError(
            f"{ids.shape[1]} tokens and {max_new_tokens} new ones make {total}, but the context "
            f"is {config.context_len}; request fewer"
        )


def check_finite(logits: Tensor) -> None:
    """Raise MinllamaError if the largest of a sequence's logits (B, V) is NaN or infinite."""
    if not (logits.amax(-1) < math.inf).all():  # comparisons with NaN are false
        raise MinllamaError(NOT_FINITE)
