"""Forward passes without what nobody needs: padding, repeated prefixes, positions not selected.

Padded sequences are packed one after the other into one row for the layers (cu_seqlens, as others
call it); a prefix that all share is computed once; and the last layer computes the selected
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
    layout_of_whole,
    row_lens,
    selected_positions,
)
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Attention, Llama, LlamaLayer, LlamaOutput

# Share of a batch's tokens that a shared prefix must spare: each layer takes queries, keys and
# values apart for it.
SHARING_PAYS = 0.03
# The fields of LlamaConfig that packed sequences follow: a token sees all before it in its own.
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
    """What `Llama.forward` gives for the same arguments, sooner.

    Raises:
        MinllamaError: as `Llama.forward` does.
    """
    check_logits(logits, attention_mask)
    packing, layout = _laid_out(llama, ids, attention_mask, None, cache)
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
) -> Tensor:
    """The residual stream after some layers; those above never run.

    Args:
        llama: the model.
        n_layers: how many layers.
        ids, attention_mask, positions, cache: as for `Llama.forward`. A cache is not advanced.
        selected: (M,), flat indices of positions; None for all. What the last of these layers
            computes token by token it computes for them alone.

    Returns:
        (B, T, D), zero at padding; or (M, D) at the selected positions.

    Raises:
        MinllamaError: as `Llama.forward` does.
    """
    packing, layout = _laid_out(llama, ids, attention_mask, positions, cache)
    return _hidden_states(llama, n_layers, ids, packing, layout, cache, selected)


def _hidden_states(
    llama: Llama,
    n_layers: int,
    ids: Tensor,
    packing: "Packing | None",
    layout: AttentionLayout,
    cache: KVCache | None,
    selected: Tensor | None,
) -> Tensor:
    """`hidden_states` of tokens that are laid out already."""
    tokens = ids if packing is None else packing.packed(ids)
    place = selected if packing is None or selected is None else packing.places(selected)
    selects = _can_select(llama, n_layers, place, tokens)
    h, rotation = _embedded(llama, tokens, layout)
    for layer in llama.layers[: n_layers - selects]:
        h = llama.run_layer(layer, h, rotation, layout, cache)
    if selects:
        layer = llama.layers[n_layers - 1]
        assert isinstance(layer, LlamaLayer)
        assert place is not None
        last = partial(_layer_at, layer, place)
        h = llama.run_layer(last, h, rotation, layout, cache)
    h = h.to(llama.dtype)
    if selected is None:
        return h if packing is None else packing.padded(h)
    assert place is not None
    h = (h if selects else _at(h, place)).squeeze(0)  # (M, D)
    if packing is None:
        return h
    is_padding = packing.tokens[place] != packing.own(selected)
    return h.masked_fill(is_padding.unsqueeze(-1), 0.0)


def layer_states(
    llama: Llama,
    ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """The residual stream, layer after layer, each computed when it is taken.

    The first n layers take n + 1 states; layers above are not computed.

    Args:
        llama: the model.
        ids, attention_mask, positions, cache: as for `Llama.forward`. A cache is not advanced.

    Yields:
        (B, T, D): the embeddings, then what each layer gives, before the last norm.

    Raises:
        MinllamaError: as `Llama.forward` does.
    """
    packing, layout = _laid_out(llama, ids, attention_mask, positions, cache)
    tokens = ids if packing is None else packing.packed(ids)
    h, rotation = _embedded(llama, tokens, layout)

    def run(h: Tensor, layer: nn.Module) -> Tensor:
        return llama.run_layer(layer, h, rotation, layout, cache)

    for state in itertools.accumulate(llama.layers, run, initial=h):
        state = state.to(llama.dtype)
        yield state if packing is None else packing.padded(state)


def dtype_of_pass(llama: Llama, n_tokens: int) -> torch.dtype:
    """What a forward pass over so many tokens is computed in between its matrices."""
    long = llama.long_dtype
    if long is None or torch.is_grad_enabled() or n_tokens <= ops.most_rows(long):
        return llama.dtype
    return long if llama.device.type == "cpu" else llama.dtype


def _embedded(llama: Llama, ids: Tensor, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
    """What the first layer reads, (B, T, D), and the rotation of all layers."""
    rotation = llama.rope(layout.positions, layout.text_len)
    h = llama.dropout(llama.tok_embeddings(ids)).to(dtype_of_pass(llama, ids.numel()))
    return h, rotation


def _layer_at(
    layer: LlamaLayer,
    place: Tensor,
    x: Tensor,
    rotation: Tensor,
    layout: AttentionLayout,
    cache: KVCache | None,
) -> Tensor:
    """`LlamaLayer.forward` at some tokens: (B, T, D) -> (1, M, D).

    All are keys and values; after the attention only these are computed.
    """
    attended = layer.attention.attend(layer.attention_norm(x), rotation, layout, cache)
    projected = layer.attention.compute_output(_at(attended, place))
    h: Tensor = _at(x, place) + layer.attention.resid_dropout(projected)
    output: Tensor = h + layer.feed_forward(layer.ffn_norm(h))
    return output


def _at(x: Tensor, place: Tensor) -> Tensor:
    """Tokens of (B, T, ...) by their flat indices (M,): (1, M, ...)."""
    return x.flatten(0, 1).index_select(0, place).unsqueeze(0)


def _can_select(llama: Llama, n_layers: int, place: Tensor | None, tokens: Tensor) -> bool:
    """Whether the last of so many layers can compute some tokens alone."""
    if place is None or n_layers == 0 or place.numel() >= tokens.numel():
        return False
    layer = llama.layers[n_layers - 1]
    is_own = type(layer) is LlamaLayer and type(layer.attention) is Attention
    return is_own and not has_hooks(llama)  # hooks are called with (B, T, D)


def _laid_out(
    llama: Llama,
    ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None,
    cache: KVCache | None,
) -> tuple["Packing | None", AttentionLayout]:
    """How tokens are laid out for the layers: with a packing, as one row of the real ones."""
    mask = None if attention_mask is None else attention_mask.bool()
    check_inputs(ids, mask, llama.config.vocab_size)
    if cache is not None:
        cache.check_serves(llama.config, llama.dtype, llama.device)
        return None, layout_of_continuation(ids, mask, positions, cache, llama.config)
    if positions is None and (found := _packed(llama, ids, mask)) is not None:
        return found
    return None, layout_of_whole(ids, mask, positions, llama.config)


def _packed(
    llama: Llama, ids: Tensor, mask: Tensor | None
) -> "tuple[Packing, AttentionLayout] | None":
    """Sequences in one row, where that spares padding or a prefix, and attention can."""
    if not llama.config.has_defaults_beyond(IMPLEMENTED) or not ops.serves(llama.norm.weight):
        return None
    if mask is not None and (mask.dim() == 3 or not mask.any()):
        return None
    # Not in training: dropout of adapters is another for each token.
    shared = 0 if torch.is_grad_enabled() else shared_prefix_len(ids, mask)
    if not shared and (mask is None or mask.all()):
        return None
    if has_hooks(llama):  # which are called with (B, T, D)
        return None
    parts = (module for module in llama.modules() if isinstance(module, Attention))
    if any(part.training and part.attention_dropout for part in parts):
        return None
    mask = torch.ones_like(ids).bool() if mask is None else mask
    if not attention.serves_packed(int(mask.sum(-1).max())):
        return None
    return packed_layout(mask, llama.config, shared)


class Packing(NamedTuple):
    """Where the real tokens of padded rows are, packed into one row without the padding.

    Attributes:
        tokens: (N,), their flat indices b * T + t.
        shape: (B, T) of the padded rows.
        shared: columns of a prefix that all rows share, of which only the first row's are computed.
    """

    tokens: Tensor
    shape: tuple[int, int]
    shared: int = 0

    def packed(self, x: Tensor) -> Tensor:
        """(B, T) -> (1, N)."""
        return x.flatten()[self.tokens].unsqueeze(0)

    def places(self, at: Tensor) -> Tensor:
        """Where tokens are in that row, by their flat indices; padding is anywhere."""
        return torch.searchsorted(self.tokens, self.own(at)).clamp(max=len(self.tokens) - 1)

    def own(self, at: Tensor) -> Tensor:
        """The flat indices of the tokens that are computed for these."""
        if not self.shared:
            return at
        columns = at % self.shape[1]
        return torch.where(columns < self.shared, columns, at)

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
        is_kept = positions >= shared
        is_kept[:shared] = True  # the first row's
        # Of each whole text's tokens, how many of those that are kept come before it.
        spread = torch.where(positions < shared, positions, is_kept.cumsum(0) - 1)
        kept = is_kept.nonzero().squeeze(-1)
        packed = packed._replace(spread=spread, kept=kept)
        tokens, positions = tokens[kept], positions[kept]
    layout = AttentionLayout(positions.unsqueeze(0), length, is_causal=True, packed=packed)
    return Packing(tokens, (batch, length), shared), layout


def shared_prefix_len(ids: Tensor, mask: Tensor | None) -> int:
    """Columns of the prefix that all rows share; 0 where computing it once does not pay.

    Args:
        ids: (B, T).
        mask: bool (B, T), true at real tokens; None where all are.
    """
    alike = (ids == ids[:1]).all(0)
    if mask is not None:
        if not is_right_padded(mask):
            return 0
        alike &= mask.all(0)
    shared = int(alike.cumprod(0).sum())
    n_tokens = ids.numel() if mask is None else int(mask.sum())
    return shared if shared * (len(ids) - 1) > SHARING_PAYS * n_tokens else 0
