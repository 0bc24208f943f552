"""Forward passes without padding, repeated prefixes and positions that are not selected.

Padded sequences are packed one after the other into one row for the layers (cu_seqlens in other
libraries); a prefix that all share is computed once; and the last layer computes the selected
positions alone. Results are those of `minllama.model.llama`'s forward pass on padded rows, with
gradients; engines and classifiers call it. Positions are selected by their flat index b * T + t.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.engine.support import has_hooks
from minllama.kernels.cpu import attention, ops
from minllama.model.attention_layout import (
    AttentionLayout,
    PackedSequences,
    check_context,
    check_inputs,
    check_logits,
    is_right_padded,
    layout_of_continuation,
    layout_without_cache,
    row_lens,
    selected_positions,
)
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Attention, Llama, LlamaLayer, LlamaOutput

# Share of a batch's tokens that a shared prefix must save: each layer copies queries, keys and
# values for it.
SHARING_PAYS = 0.03
# The LlamaConfig fields that packing implements: a token attends to all before it in its sequence.
IMPLEMENTED = frozenset(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"),
        *("max_seq_len", "norm_eps", "rope_theta", "rope_scaling", "dropout"),
        *("tie_embeddings", "attention_bias", "ffn_bias"),
    )
)


def forward(
    llama: Llama,
    ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cache: KVCache | None = None,
    logits: Literal["all", "last"] | Tensor | None = "all",
) -> LlamaOutput:
    """`Llama.forward` for the same arguments, faster.

    Raises:
        MinllamaError: as `Llama.forward` does.
    """
    check_logits(logits, attention_mask)
    packing, layout = _layout_of(llama, ids, attention_mask, None, cache)
    selected = selected_positions(ids, attention_mask, logits)
    flat = None if selected is None else selected.flatten()
    h = _hidden_states(llama, len(llama.layers), ids, packing, layout, cache, flat)
    h = llama.norm(h if selected is None else h.view(*selected.shape, -1))
    if cache is not None:
        cache.advance(row_lens(ids, attention_mask))
    return LlamaOutput(h, None if logits is None else llama.compute_logits(h))


def hidden_states(
    llama: Llama,
    n_layers: int,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: KVCache | None = None,
    *,
    selected: Tensor | None = None,
    start: tuple[int, Tensor] | None = None,
) -> Tensor:
    """The residual stream after selected layers; layers above these do not run.

    Args:
        llama: the model.
        n_layers: how many layers.
        ids, attention_mask, positions, cache: as for `Llama.forward`. A cache is not advanced.
        selected: (M,), flat indices of positions; None for all. The last of these layers
            computes everything but attention for them only.
        start: fewer than `n_layers` layers, and the state after them; None for the embeddings.

    Returns:
        (B, T, D), zero at padding; or (M, D) at the selected positions.

    Raises:
        MinllamaError: as `Llama.forward` does.
    """
    packing, layout = _layout_of(llama, ids, attention_mask, positions, cache)
    return _hidden_states(llama, n_layers, ids, packing, layout, cache, selected, start)


def _hidden_states(
    llama: Llama,
    n_layers: int,
    ids: Tensor,
    packing: "Packing | None",
    layout: AttentionLayout,
    cache: KVCache | None,
    selected: Tensor | None,
    start: tuple[int, Tensor] | None = None,
) -> Tensor:
    """`hidden_states`, given the packing and the layout of the tokens."""
    tokens = ids if packing is None else packing.packed(ids)
    row_indices = selected if packing is None or selected is None else packing.row_indices(selected)
    selects = _can_select(llama, n_layers, row_indices, tokens)
    first, h, rotation = _started(llama, tokens, packing, layout, start)
    for layer in llama.layers[first : n_layers - selects]:
        h = llama.run_layer(layer, h, rotation, layout, cache)
    if selects:
        layer = llama.layers[n_layers - 1]
        assert isinstance(layer, LlamaLayer)
        assert row_indices is not None
        last = partial(_layer_at_positions, layer, row_indices)
        h = llama.run_layer(last, h, rotation, layout, cache)
    h = h.to(llama.dtype)
    if selected is None:
        return h if packing is None else packing.padded(h)
    assert row_indices is not None
    h = (h if selects else _select(h, row_indices)).squeeze(0)  # (M, D)
    if packing is None:
        return h
    is_padding = packing.tokens[row_indices] != packing.computed_for(selected)
    return h.masked_fill(is_padding.unsqueeze(-1), 0.0)


def layer_states(
    llama: Llama,
    ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: KVCache | None = None,
    start: tuple[int, Tensor] | None = None,
) -> Iterator[Tensor]:
    """The residual stream after each layer, computed lazily.

    The first n layers take n + 1 states; layers above are not computed.

    Args:
        llama: the model.
        ids, attention_mask, positions, cache: as for `Llama.forward`. A cache is not advanced.
        start: a number of layers and the state after them, which comes first; None for the
            embeddings.

    Yields:
        (B, T, D): the embeddings, then the output of each layer, before the last norm.

    Raises:
        MinllamaError: as `Llama.forward` does.
    """
    packing, layout = _layout_of(llama, ids, attention_mask, positions, cache)
    tokens = ids if packing is None else packing.packed(ids)
    first, h, rotation = _started(llama, tokens, packing, layout, start)

    def run(h: Tensor, layer: nn.Module) -> Tensor:
        return llama.run_layer(layer, h, rotation, layout, cache)

    for state in itertools.accumulate(llama.layers[first:], run, initial=h):
        state = state.to(llama.dtype)
        yield state if packing is None else packing.padded(state)


def dtype_of_pass(llama: Llama, n_tokens: int) -> torch.dtype:
    """The dtype of activations in a forward pass over this number of tokens."""
    long = llama.long_dtype
    if long is None or torch.is_grad_enabled() or n_tokens <= ops.most_rows(long):
        return llama.dtype
    return long if llama.device.type == "cpu" else llama.dtype


def _started(
    llama: Llama,
    tokens: Tensor,
    packing: "Packing | None",
    layout: AttentionLayout,
    start: tuple[int, Tensor] | None,
) -> tuple[int, Tensor, Tensor]:
    """The first layer to run, its input (B, T, D) of packed tokens, and the rotation of all."""
    rotation = llama.rope(layout.positions, layout.text_len)
    dtype = dtype_of_pass(llama, tokens.numel())
    if start is None:
        return 0, llama.dropout(llama.tok_embeddings(tokens)).to(dtype), rotation
    first, state = start
    return first, (state if packing is None else packing.packed(state)).to(dtype), rotation


def _layer_at_positions(
    layer: LlamaLayer,
    row_indices: Tensor,
    x: Tensor,
    rotation: Tensor,
    layout: AttentionLayout,
    cache: KVCache | None,
) -> Tensor:
    """`LlamaLayer.forward` at selected positions: (B, T, D) -> (1, M, D).

    All are keys and values; after the attention only these are computed.
    """
    attended = layer.attention.attend(layer.attention_norm(x), rotation, layout, cache)
    projected = layer.attention.compute_output(_select(attended, row_indices))
    h: Tensor = _select(x, row_indices) + layer.attention.resid_dropout(projected)
    output: Tensor = h + layer.feed_forward(layer.ffn_norm(h))
    return output


def _select(x: Tensor, row_indices: Tensor) -> Tensor:
    """Select tokens of (B, T, ...) by their flat indices (M,): (1, M, ...)."""
    return x.flatten(0, 1).index_select(0, row_indices).unsqueeze(0)


def _can_select(llama: Llama, n_layers: int, row_indices: Tensor | None, tokens: Tensor) -> bool:
    """Whether the last of these layers can compute only the selected tokens."""
    if row_indices is None or n_layers == 0 or row_indices.numel() >= tokens.numel():
        return False
    layer = llama.layers[n_layers - 1]
    is_plain = type(layer) is LlamaLayer and type(layer.attention) is Attention
    return is_plain and not has_hooks(llama)  # hooks are called with (B, T, D)


def _layout_of(
    llama: Llama,
    ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    cache: KVCache | None,
) -> tuple["Packing | None", AttentionLayout]:
    """The layout of tokens for the layers: with a packing, one row of the real ones."""
    mask = None if attention_mask is None else attention_mask.bool()
    check_inputs(ids, mask, llama.config.vocab_size)
    if cache is not None:
        cache.check_serves(llama.config, llama.dtype, llama.device)
        return None, layout_of_continuation(ids, mask, positions, cache, llama.config)
    if positions is None and (packed := _packed(llama, ids, mask)) is not None:
        return packed
    return None, layout_without_cache(ids, mask, positions, llama.config)


def _packed(
    llama: Llama, ids: Tensor, mask: Tensor | None
) -> "tuple[Packing, AttentionLayout] | None":
    """Pack sequences into one row, if that saves tokens and attention supports it."""
    if not llama.config.has_defaults_beyond(IMPLEMENTED) or not ops.serves(llama.norm.weight):
        return None
    if mask is not None and (mask.dim() == 3 or not mask.any()):
        return None
    # Not in training: adapters' dropout differs for each token.
    shared = 0 if torch.is_grad_enabled() else shared_prefix_len(ids, mask)
    if not shared and (mask is None or mask.all()):
        return None
    if has_hooks(llama):  # hooks are called with (B, T, D)
        return None
    parts = (module for module in llama.modules() if isinstance(module, Attention))
    if any(part.training and part.attention_dropout for part in parts):
        return None
    mask = torch.ones_like(ids).bool() if mask is None else mask
    if not attention.serves_packed(int(mask.sum(-1).max())):
        return None
    return packed_layout(mask, llama.config, shared)


class Packing(NamedTuple):
    """The real tokens of padded rows, packed into one row without the padding.

    Attributes:
        tokens: (N,), their flat indices b * T + t.
        shape: (B, T) of the padded rows.
        shared: columns of a prefix that all rows share; only the first row's are computed.
    """

    tokens: Tensor
    shape: tuple[int, int]
    shared: int = 0

    def packed(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return x.flatten(0, 1)[self.tokens].unsqueeze(0)

    def row_indices(self, selected: Tensor) -> Tensor:
        """Indices in that row of selected tokens, by their flat indices; arbitrary for padding."""
        computed = self.computed_for(selected)
        return torch.searchsorted(self.tokens, computed).clamp(max=len(self.tokens) - 1)

    def computed_for(self, selected: Tensor) -> Tensor:
        """The flat indices of the tokens computed instead: those of the first row's prefix."""
        if not self.shared:
            return selected
        columns = selected % self.shape[1]
        return torch.where(columns < self.shared, columns, selected)

    def padded(self, h: Tensor) -> Tensor:
        """(1, N, D) -> (B, T, D), zeros at padding."""
        batch, length = self.shape
        rows = h.new_zeros(batch * length, h.shape[-1])
        rows = rows.index_copy(0, self.tokens, h[0]).view(batch, length, -1)
        if self.shared:
            rows[1:, : self.shared] = rows[:1, : self.shared]
        return rows


def packed_layout(
    mask: Tensor, config: LlamaConfig, shared: int = 0
) -> tuple[Packing, AttentionLayout]:
    """The real tokens of padded sequences, and their layout: no padding is computed.

    Args:
        mask: bool (B, T), true at real tokens, padding on either side.
        shared: columns that all rows share, as `shared_prefix_len` finds them.

    Raises:
        ContextError: a row is longer than the context.
    """
    batch, length = mask.shape
    check_context(length, config)
    lengths = mask.sum(-1)  # (B,)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    tokens = mask.flatten().nonzero().squeeze(-1)
    positions = (mask.long().cumsum(-1) - 1).flatten()[tokens]
    packed = PackedSequences(starts, int(lengths.max()))
    if shared:
        is_computed = positions >= shared
        is_computed[:shared] = True  # the first row's
        # For each token of the complete sequences, the number of computed ones before it.
        expand = torch.where(positions < shared, positions, is_computed.cumsum(0) - 1)
        compact = is_computed.nonzero().squeeze(-1)
        packed = packed._replace(expand=expand, compact=compact)
        tokens, positions = tokens[compact], positions[compact]
    layout = AttentionLayout(positions.unsqueeze(0), length, is_causal=True, packed=packed)
    return Packing(tokens, (batch, length), shared), layout


def shared_prefix_len(ids: Tensor, mask: Tensor | None) -> int:
    """The length of the prefix that all rows share; 0 if computing it once does not pay.

    Args:
        ids: (B, T).
        mask: bool (B, T), true at real tokens; None where all are.
    """
    is_shared = (ids == ids[:1]).all(0)
    if mask is not None:
        if not is_right_padded(mask):
            return 0
        is_shared &= mask.all(0)
    shared = int(is_shared.cumprod(0).sum())
    n_tokens = ids.numel() if mask is None else int(mask.sum())
    return shared if shared * (len(ids) - 1) > SHARING_PAYS * n_tokens else 0
