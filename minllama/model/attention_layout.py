"""Where the tokens of a forward pass stand, and which keys each of them may see.

Knows nothing of weights: a `View` follows from masks, positions and what a cache already holds.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minllama.errors import ContextError, MinllamaError
from minllama.kernels.cpu.attention import Texts
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache

# Share of a batch's tokens that need not be computed, above which they are not: each layer takes
# queries, keys and values apart for it.
SHARING_PAYS = 0.03
# The fields of LlamaConfig that texts in one row follow: a token sees all before it in its text.
IMPLEMENTED = frozenset(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"),
        *("max_seq_len", "norm_eps", "rope_theta", "rope_scaling", "dropout"),
        *("tie_embeddings", "attention_bias", "ffn_bias"),
    )
)


class View(NamedTuple):
    """Where the tokens of one forward pass stand, and which keys each of them may see.

    Attributes:
        positions: (B, T) or (1, T), whole numbers from 0.
        text_len: a number above all positions.
        mask: bool, broadcast to (B, H, T, S), True where a query may look; None for everywhere.
        is_causal: query t sees keys 0..t of S = T; takes the place of a mask.
        texts: the only row holds several, each of which sees itself alone; with `is_causal`.
    """

    positions: Tensor
    text_len: int
    mask: Tensor | None = None
    is_causal: bool = False
    texts: Texts | None = None


class Packing(NamedTuple):
    """Where the real tokens of padded rows are, which are computed with in one row of their own.

    Attributes:
        tokens: (N,), their numbers b * T + t.
        shape: (B, T) of the padded rows.
        shared: columns that all rows have alike, of which only the first row's are computed.
    """

    tokens: Tensor
    shape: tuple[int, int]
    shared: int = 0

    def packed(self, x: Tensor) -> Tensor:
        """(B, T) -> (1, N)."""
        return x.flatten()[self.tokens].unsqueeze(0)

    def places(self, at: Tensor) -> Tensor:
        """Where tokens are in that row, by their numbers b * T + t; padding is anywhere."""
        return torch.searchsorted(self.tokens, self.own(at)).clamp(max=len(self.tokens) - 1)

    def own(self, at: Tensor) -> Tensor:
        """The numbers of the tokens that are computed for those with these numbers."""
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


def view_of_packed(mask: Tensor, config: LlamaConfig, shared: int = 0) -> tuple[Packing, View]:
    """The real tokens of padded texts, and their view: none of a batch's padding is computed.

    Args:
        mask: bool (B, T), true at real tokens, padding on either side.
        shared: columns that all rows have alike, as `shared_columns` finds them.

    Raises:
        ContextError: a row is longer than the context.
    """
    batch, length = mask.shape
    check_context(length, config)
    lengths = mask.sum(-1)  # (B,)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    tokens = mask.flatten().nonzero().squeeze(-1)
    positions = (mask.long().cumsum(-1) - 1).flatten()[tokens]
    texts = Texts(starts, int(lengths.max()))
    if shared:
        is_kept = positions >= shared
        is_kept[:shared] = True  # the first row's
        # Of each whole text's tokens, how many of those that are kept come before it.
        spread = torch.where(positions < shared, positions, is_kept.cumsum(0) - 1)
        kept = is_kept.nonzero().squeeze(-1)
        texts = texts._replace(spread=spread, kept=kept)
        tokens, positions = tokens[kept], positions[kept]
    view = View(positions.unsqueeze(0), length, is_causal=True, texts=texts)
    return Packing(tokens, (batch, length), shared), view


def shared_columns(ids: Tensor, mask: Tensor | None) -> int:
    """How many columns all rows begin with alike, where it pays to compute them once.

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


def view_of_whole(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, config: LlamaConfig
) -> View:
    """The view of texts that are read from their start.

    Args:
        ids: (B, T).
        mask: bool (B, T), true at real tokens; or (B, T, T), true where a token may look, which
            then says all: nothing is hidden besides.
        positions: (B, T); None counts each row's real tokens, which a (B, T, T) mask cannot tell.

    Raises:
        MinllamaError: the texts are longer than the context, or positions are out of it.
    """
    if mask is not None and mask.dim() == 3:
        if positions is None:
            raise MinllamaError("an attention_mask of shape (B, T, T) needs positions beside it")
        return View(positions, _checked_text_len(positions, config), mask.unsqueeze(1))
    text_len = ids.shape[1]
    check_context(text_len, config)
    columns = torch.arange(text_len, device=ids.device)
    if mask is None or (config.causal and is_right_padded(mask)):
        # Padding behind the text is what no earlier token may look at anyway.
        default, allowed = columns.unsqueeze(0), None
    else:
        default = (mask.long().cumsum(-1) - 1).clamp(min=0)
        allowed = mask[:, None, None, :]  # (B, 1, 1, T)
        if config.causal:
            allowed = allowed & (columns <= columns[:, None])  # (B, 1, T, T)
        # Padding looks at itself: a softmax over nothing is NaN.
        allowed = allowed | (columns == columns[:, None])
    is_causal = config.causal and allowed is None
    if positions is None:
        return View(default, text_len, allowed, is_causal)
    return View(positions, _checked_text_len(positions, config), allowed, is_causal)


def view_of_continuation(
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: KVCache,
    config: LlamaConfig,
) -> View:
    """The view of tokens that continue what a cache holds, which makes room for them.

    Args:
        ids: (B, T), the new tokens.
        mask: bool (B, T), true at real tokens, padding on the right; or (B, T, T), true where a
            new token may look among the new ones. All of them see all that the cache holds.
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
            "with a cache, positions and an attention_mask of shape (B, T, T) belong together; "
            "without them its rows know how long they are"
        )
    if mask is not None and not is_free and not is_right_padded(mask):
        raise MinllamaError("with a cache, padding must be on the right of each row")
    cache.reserve(new_len)
    if mask is not None and positions is not None:
        if not cache.is_uniform:
            raise MinllamaError("an attention_mask of shape (B, T, T) needs rows of one length")
        seen = mask.new_ones(batch, new_len, cache.max_len)
        allowed = torch.cat((seen, mask), dim=-1).unsqueeze(1)  # (B, 1, T, S)
        return View(positions, _checked_text_len(positions, config), allowed)
    text_len = cache.max_len + new_len
    check_context(text_len, config)
    columns = torch.arange(new_len, device=ids.device)
    if cache.is_uniform:
        positions = columns.unsqueeze(0) + cache.max_len  # (1, T)
    else:
        positions = columns + torch.tensor(cache.lengths, device=ids.device).unsqueeze(-1)
    if cache.max_len == 0:
        return View(positions, text_len, is_causal=True)
    if cache.is_uniform and new_len == 1:
        return View(positions, text_len)
    # A slot's index is its position, so one comparison hides the future, the free slots of
    # shorter rows, and their padding.
    slots = torch.arange(text_len, device=ids.device)
    return View(positions, text_len, mask=(slots <= positions.unsqueeze(-1)).unsqueeze(1))


def check_continuation(ids: Tensor, cache: KVCache, config: LlamaConfig) -> None:
    """Refuse tokens (B, T), all real, that cannot continue what a cache holds."""
    _check_rows(ids, cache, config)
    cache.reserve(ids.shape[1])
    check_context(cache.max_len + ids.shape[1], config)


def _check_rows(ids: Tensor, cache: KVCache, config: LlamaConfig) -> None:
    if not config.causal:
        raise MinllamaError("a cache needs causal attention: an encoder's past sees its future")
    if len(ids) != cache.batch_size:
        raise MinllamaError(f"{len(ids)} rows of ids for a cache of {cache.batch_size} rows")


def check_context(text_len: int, config: LlamaConfig) -> None:
    """Refuse a text that is longer than the context with a ContextError."""
    if text_len > config.context_len:
        raise ContextError(
            f"the text has {text_len} tokens and the model's context {config.context_len}"
        )


def is_right_padded(mask: Tensor) -> bool:
    """Whether each row's real tokens come first."""
    return bool((mask[:, :-1] >= mask[:, 1:]).all())


def _checked_text_len(positions: Tensor, config: LlamaConfig) -> int:
    first, last = positions.min().item(), positions.max().item()
    if first < 0 or last >= config.context_len:
        raise MinllamaError(
            f"positions must be from 0 to {config.context_len - 1}, not {first} to {last}"
        )
    return int(last) + 1
