"""The Llama: one Transformer, from token ids to hidden states and logits.

Reads like the papers: Touvron et al. 2023a (LLaMA) and 2023b (Llama 2), on Vaswani et al. 2017.
Called by hand it runs the modules below, one after the other: the plain and exact reference. An
engine (`minllama.engine`) computes the same sooner; it is what generation and classifiers call.

Shape letters, here and everywhere: B batch, T query positions, S cached positions, D model width,
H heads, K key/value heads, C head width, F hidden width, V vocabulary, R rank.
"""

import os
import random
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minllama.kernels.dispatch import accelerated
from minllama.model.attention_layout import (
    AttentionLayout,
    PackedSequences,
    check_finite,
    check_generation,
    check_logits,
    layout_of,
    row_lens,
    selected_positions,
)
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache
from minllama.model.pretrained import LlamaPreTrainedModel
from minllama.model.rope import RotaryEmbedding, apply_rotary_embedding

__all__ = [
    "Attention",
    "Embedding",
    "FeedForward",
    "Linear",
    "Llama",
    "LlamaLayer",
    "LlamaOutput",
    "LlamaPreTrainedModel",
    "RMSNorm",
    "load_pretrained",
]


@accelerated
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X / RMS(x) * weight (Zhang & Sennrich 2019, eq. 4), in float32: (..., D) -> (..., D)."""
    h = x.float()  # whose square of a bfloat16 loses nothing
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight).type_as(x)


@accelerated
def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """SiLU(u) * v (Shazeer 2020, eq. 6): (..., F) -> (..., F)."""
    return F.silu(u) * v


@accelerated
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b: (..., in), (out, in), (out,) -> (..., out)."""
    return F.linear(x, weight, bias)


@accelerated
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    packed: PackedSequences | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(Q K^T / sqrt(C)) V (Vaswani et al. 2017, eq. 1), all heads at once.

    Args:
        query: (B, H, T, C).
        key, value: (B, K, S, C); each of the K heads serves H / K query heads.
        mask: bool, broadcast to (B, H, T, S); true where a query may attend.
        is_causal: query t attends to keys 0..t, as with a lower-triangular mask.
        packed: B = 1, and each sequence in the row attends only to itself; with `is_causal`.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, T, C), the values weighted by the attention.
    """
    if packed is not None:
        mask, is_causal = packed.mask(), False
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal, enable_gqa=is_grouped
    )


class RMSNorm(nn.Module):
    """Root mean square normalization, see `rms_norm`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """y = W x + b, see `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """Rows of a matrix (V, D), which is also the output matrix if they are tied."""

    def as_linear(self, x: Tensor) -> Tensor:
        """X W^T: (..., D) -> (..., V)."""
        return linear(x, self.weight)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions.

    Each of the K key/value heads serves H / K query heads; K = H is multi-head attention, K = 1
    multi-query attention.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.attention_dropout = config.dropout
        query_dim, key_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.compute_query = Linear(config.dim, query_dim, bias=config.attention_bias)
        self.compute_key = Linear(config.dim, key_dim, bias=config.attention_bias)
        self.compute_value = Linear(config.dim, key_dim, bias=config.attention_bias)
        self.compute_output = Linear(query_dim, config.dim, bias=config.attention_bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def compute_query_key_value_scores(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """See `attention`; with dropout in training. Returns (B, H, T, C)."""
        dropout = self.attention_dropout if self.training else 0.0
        return attention(query, key, value, mask, is_causal, packed, dropout)

    def attend(
        self, x: Tensor, rotation: Tensor, layout: AttentionLayout, cache: KVCache | None
    ) -> Tensor:
        """All but the output projection: (B, T, D) -> (B, T, H * C)."""
        query = self.compute_query(x).unflatten(-1, (self.n_heads, -1))  # (B, T, H, C)
        key = self.compute_key(x).unflatten(-1, (self.n_kv_heads, -1))  # (B, T, K, C)
        value = self.compute_value(x).unflatten(-1, (self.n_kv_heads, -1))  # (B, T, K, C)
        query = apply_rotary_embedding(query, rotation).transpose(1, 2)  # (B, H, T, C)
        key = apply_rotary_embedding(key, rotation).transpose(1, 2)  # (B, K, T, C)
        value = value.transpose(1, 2)  # (B, K, T, C)
        if cache is not None:
            key, value = cache.update(self.layer, key, value, layout.positions)  # (B, K, S, C)
        attended = self.compute_query_key_value_scores(
            query, key, value, layout.mask, is_causal=layout.is_causal, packed=layout.packed
        )
        return attended.transpose(1, 2).flatten(-2)  # (B, T, H * C)

    def forward(
        self, x: Tensor, rotation: Tensor, layout: AttentionLayout, cache: KVCache | None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            x: normalized hidden states.
            rotation: result of `RotaryEmbedding` for the positions of x.
            layout: positions of x, and which keys each query may attend to.
            cache: stores the new keys and values and returns all of them; None if x is complete.
        """
        attended = self.attend(x, rotation, layout, cache)
        output: Tensor = self.resid_dropout(self.compute_output(attended))
        return output


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): W2 (SiLU(W1 x) * W3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim, bias=config.ffn_bias)
        self.w2 = Linear(config.hidden_dim, config.dim, bias=config.ffn_bias)
        self.w3 = Linear(config.dim, config.hidden_dim, bias=config.ffn_bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), through (B, T, F)."""
        output: Tensor = self.dropout(self.w2(swiglu(self.w1(x), self.w3(x))))
        return output


class LlamaLayer(nn.Module):
    """One layer: attention and feed-forward, each normalized before and added to the residual."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, rotation: Tensor, layout: AttentionLayout, cache: KVCache | None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); the arguments are those of `Attention.forward`."""
        h: Tensor = x + self.attention(self.attention_norm(x), rotation, layout, cache)
        output: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return output


class LlamaOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        hidden: hidden states after the last norm: of the selected positions, (B, D) or (B, N, D),
            or of all, (B, T, D), for all logits and for none.
        logits: (B, T, V), (B, V) or (B, N, V) depending on the selection, unnormalized, in the
            model's dtype or float32; None for none.
    """

    hidden: Tensor
    logits: Tensor | None


class Llama(LlamaPreTrainedModel):
    """A Llama language model (Touvron et al. 2023a, sec. 2.2)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # Tied: there is no second matrix, neither here nor in a state dict.
        self.output = (
            None if config.tie_embeddings else Linear(config.dim, config.vocab_size, bias=False)
        )
        self.rope = RotaryEmbedding(config)
        # Keep only what layers pass on, and compute their insides again in the backward pass
        # (Chen et al. 2016): one more forward pass, and memory for one layer instead of all.
        self.gradient_checkpointing = False
        self.init_weights()

    def forward(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        logits: Literal["all", "last"] | Tensor | None = "all",
    ) -> LlamaOutput:
        """From token ids to hidden states and the logits that are selected.

        Args:
            ids: (B, T), integers in [0, V).
            attention_mask: (B, T), true at real tokens and false at padding, on either side; None
                if all are real. With a cache it covers the new tokens only, and padding is on the
                right. Or (B, T, T), true where token t may attend to token t', as for a tree of
                continuations; that replaces causal masking and needs positions, and a cache with
                sequences of equal length, to which all new tokens attend.
            positions: (B, T), positions in the text; None counts each sequence's real tokens from
                0. With a cache, only together with a (B, T, T) mask.
            cache: the sequences so far, which `ids` continue; it is advanced.
            logits: "all" positions, (B, T, V); the "last" real one of each sequence, (B, V);
                positions selected by a tensor of indices, (B, N) or (1, N) for all sequences, (B,
                N, V); or None.

        Raises:
            MinllamaError: the text is longer than the context or the cache, or the arguments
                contradict one another.
        """
        check_logits(logits, attention_mask)
        if cache is not None:
            cache.check_serves(self.config, self.dtype, self.device)
        layout = layout_of(ids, attention_mask, positions, cache, self.config)
        selected = selected_positions(ids, attention_mask, logits)
        rotation = self.rope(layout.positions, layout.text_len)
        h = self.dropout(self.tok_embeddings(ids))  # (B, T, D)
        for layer in self.layers:
            h = self.run_layer(layer, h, rotation, layout, cache)
        if cache is not None:
            cache.advance(row_lens(ids, attention_mask))
        h = self.norm(h if selected is None else h.flatten(0, 1)[selected])
        return LlamaOutput(h, None if logits is None else self.compute_logits(h))

    def run_layer(self, layer: Callable[..., Tensor], h: Tensor, *arguments: Any) -> Tensor:
        """One layer, (B, T, D) -> (B, T, D), with or without gradient checkpointing."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            h = checkpoint(layer, h, *arguments, use_reentrant=False)
        else:
            h = layer(h, *arguments)
        return h

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        head = self.tok_embeddings.as_linear if self.output is None else self.output
        logits: Tensor = head(hidden)
        return logits

    def new_cache(
        self, batch_size: int, capacity: int, *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for this model: `batch_size` sequences of up to `capacity` tokens.

        Args:
            dtype: None for the model's.
        """
        dtype = dtype or self.dtype
        return KVCache(self.config, batch_size, capacity, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        *,
        seed: int | None = None,
    ) -> Tensor:
        """Continue each sequence of token ids, token by token, by calling the modules.

        `minllama.generate` returns the same tokens; it runs on an engine, which is several times
        faster, and has stop strings, streaming, top-p and more.

        Args:
            ids: (B, T), without padding.
            max_new_tokens: how many tokens to add.
            temperature: 0 for the most likely token (greedy); else sample from softmax(logits /
                temperature).
            seed: for repeatable samples; each sequence has its own random stream.

        Returns:
            (B, T + max_new_tokens), the continuation included.

        Raises:
            MinllamaError: the result would be longer than the context, or an option is out of
                range.
        """
        check_generation(ids, max_new_tokens, temperature, self.config)
        seed = random.SystemRandom().getrandbits(64) if seed is None else seed
        streams = [random.Random(f"{seed}/{row}/0") for row in range(len(ids))]
        cache = self.new_cache(len(ids), ids.shape[1] + max_new_tokens)
        new = ids
        for _ in range(max_new_tokens):
            logits = self(new, cache=cache, logits="last").logits  # (B, V)
            draws = [stream.random() for stream in streams] if temperature else []
            new = choose_tokens(logits.float(), temperature, draws).unsqueeze(-1).to(ids)
            ids = torch.cat((ids, new), dim=1)
        return ids


def choose_tokens(logits: Tensor, temperature: float, draws: list[float]) -> Tensor:
    """The next token of each sequence: the most likely, or one drawn by inverse transform sampling.

    Args:
        logits: (B, V).
        temperature: 0 for the most likely.
        draws: one number in [0, 1) per sequence.

    Returns:
        (B,) token ids.
    """
    check_finite(logits)
    if temperature == 0:
        return logits.argmax(-1)
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp().double()
    sums = weights.cumsum(-1)  # (B, V)
    aims = torch.tensor(draws, dtype=torch.float64, device=sums.device).unsqueeze(-1) * sums[:, -1:]
    return (sums > aims).int().argmax(-1)  # the first of equal ones


def load_pretrained(
    source: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
    **config_changes: Any,
) -> Llama:
    """Load a Llama from a file, a folder or a Hugging Face id; see `Llama.from_pretrained`."""
    return Llama.from_pretrained(
        source, dtype=dtype, device=device, quantize=quantize, **config_changes
    )
