"""The Llama: one Transformer, from token ids to hidden states and logits.

Reads like the papers: Touvron et al. 2023a (LLaMA) and 2023b (Llama 2), on Vaswani et al. 2017.
Knows nothing of formats, texts or training; tokens are chosen by `minllama.generation.decode`.

Shape letters, here and everywhere: B batch, T query positions, S cached positions, D model width,
H heads, K key/value heads, C head width, F hidden width, V vocabulary, R rank.
"""

import itertools
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minllama.engine.short_pass import runs_natively, short_pass
from minllama.engine.support import has_hooks
from minllama.generation.decode import generate_ids
from minllama.kernels.cpu import attention, ops
from minllama.kernels.cpu.linear import Linear
from minllama.kernels.gpu import support as gpu
from minllama.model.attention_layout import IMPLEMENTED as PACKED_FIELDS
from minllama.model.attention_layout import (
    Packing,
    View,
    shared_columns,
    view_of_continuation,
    view_of_packed,
    view_of_whole,
)
from minllama.model.config import LlamaConfig
from minllama.model.inputs import check_inputs, check_logits, row_lens, tokens_at, wanted_tokens
from minllama.model.kv_cache import KVCache
from minllama.model.pretrained import LlamaPreTrainedModel
from minllama.model.rope import RotaryEmbedding, apply_rotary_embedding
from minllama.quantization.modules import project, rows_of

__all__ = [
    "Attention",
    "FeedForward",
    "Llama",
    "LlamaLayer",
    "LlamaOutput",
    "LlamaPreTrainedModel",
    "RMSNorm",
    "load_pretrained",
]


class RMSNorm(nn.Module):
    """x / RMS(x) * weight (Zhang & Sennrich 2019, eq. 4), with eps inside the root.

    Computed in float32, whose square of a bfloat16 loses nothing, and returned in x's dtype.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if ops.serves(x):
            return ops.rms_norm(x, self.weight, self.eps)
        if x.is_cuda and x.dtype == self.weight.dtype:  # the same, in one kernel
            # Autocast would leave it in float32.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps).type_as(x)
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * self.weight).type_as(x)


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
        texts: attention.Texts | None = None,
    ) -> Tensor:
        """softmax(Q K^T / sqrt(C)) V (Vaswani et al. 2017, eq. 1), all heads at once.

        Args:
            query: (B, H, T, C).
            key, value: (B, K, S, C).
            mask: bool, broadcast to (B, H, T, S); True where a query may look.
            is_causal: query t sees keys 0..t; stands for a lower-triangular mask.
            texts: B = 1, and each text in the row sees itself alone; with `is_causal`.

        Returns:
            (B, H, T, C), the values weighted by the attention.
        """
        dropout = self.attention_dropout if self.training else 0.0
        if is_causal and not dropout and (texts is not None or attention.serves(query)):
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, H, C)
            return attention.causal_attention(query, key, value, texts).transpose(1, 2)
        assert texts is None, "texts of one row would see one another"
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        view: View,
        cache: KVCache | None,
        at: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or (1, M, D) at the tokens that are wanted.

        Args:
            x: normalised hidden states.
            rotation: what `RotaryEmbedding` gives for the positions of x.
            view: where x stands in its text, and which keys each query may see.
            cache: keeps the new keys and values and gives all of them; None: x is the whole text.
            at: (M,), numbers b * T + t of the tokens that are wanted; None for all.
        """
        query = self.compute_query(x).unflatten(-1, (self.n_heads, -1))  # (B, T, H, C)
        key = self.compute_key(x).unflatten(-1, (self.n_kv_heads, -1))  # (B, T, K, C)
        value = self.compute_value(x).unflatten(-1, (self.n_kv_heads, -1))  # (B, T, K, C)
        query = apply_rotary_embedding(query, rotation).transpose(1, 2)  # (B, H, T, C)
        key = apply_rotary_embedding(key, rotation).transpose(1, 2)  # (B, K, T, C)
        value = value.transpose(1, 2)  # (B, K, T, C)
        if cache is not None:
            key, value = cache.update(self.layer, key, value, view.positions)  # (B, K, S, C)
        attended = self.compute_query_key_value_scores(
            query, key, value, view.mask, is_causal=view.is_causal, texts=view.texts
        )
        attended = attended.transpose(1, 2).flatten(-2)  # (B, T, H * C)
        attended = tokens_at(attended, at)
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
        u, v = self.w1(x), self.w3(x)
        output: Tensor = self.dropout(self.w2(swiglu(u, v)))
        return output


def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """SiLU(u) * v: (..., F) -> (..., F)."""
    if ops.serves(u):
        return ops.swiglu(u, v)
    if gpu.serves(u) and gpu.serves(v):
        return gpu.swiglu(u, v)
    return F.silu(u) * v


class LlamaLayer(nn.Module):
    """One layer: attention and feed-forward, each normalised before and added to the residual."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        view: View,
        cache: KVCache | None,
        at: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D) or (1, M, D); the arguments are those of `Attention.forward`."""
        attended = self.attention(self.attention_norm(x), rotation, view, cache, *_given(at))
        h: Tensor = tokens_at(x, at) + attended
        output: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return output


class LlamaOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        hidden: after the last norm, before the vocabulary: of the tokens that logits were asked
            for, (B, D) or (B, N, D), and of all, (B, T, D), for all logits and for none.
        logits: (B, T, V), (B, V) or (B, N, V) by what was asked for, unnormalised, in the model's
            dtype or float32; None for none.
    """

    hidden: Tensor
    logits: Tensor | None


class Llama(LlamaPreTrainedModel):
    """A Llama language model (Touvron et al. 2023a, sec. 2.2)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
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
        """From token ids to hidden states and the logits that are asked for.

        Args:
            ids: (B, T), whole numbers in [0, V).
            attention_mask: (B, T), true at real tokens and false at padding, on either side; None
                where all are real. With a cache it covers the new tokens only, and padding is on
                the right. Or (B, T, T), true where token t may look at token t': all that is to be
                hidden is up to it, as in a tree of continuations; it needs positions, and rows of
                one length in a cache, all of which the new tokens see.
            positions: (B, T), positions in the text; None counts each row's real tokens from 0.
                With a cache only beside a (B, T, T) mask: its rows know how long they are.
            cache: holds the texts so far, of which `ids` are the continuation, and is advanced.
                Weights may be written to meanwhile, or others put in their place; but where a
                parameter is given other memory (`parameter.data = ...`), only a text that begins
                anew is sure to see it.
            logits: "all" positions, (B, T, V); "last" real one of each row, (B, V); those chosen
                by a tensor of column indices, (B, N) or (1, N) for all rows, (B, N, V); or None.

        Raises:
            MinllamaError: the text is longer than the context or the cache, or the arguments
                contradict one another.
        """
        check_inputs(ids, attention_mask)
        check_logits(logits, attention_mask)
        if cache is not None and positions is None:
            found = short_pass(self, ids, attention_mask, cache, logits)
            if found is not None:
                return LlamaOutput(*found)
        at = wanted_tokens(ids, attention_mask, logits)
        h = self.state_after(
            len(self.layers),
            ids,
            attention_mask,
            positions,
            cache,
            at=None if at is None else at.flatten(),
        )
        h = self.norm(h if at is None else h.view(*at.shape, -1))
        if cache is not None:
            cache.advance(row_lens(ids, attention_mask))
        return LlamaOutput(h, None if logits is None else self.compute_logits(h))

    def layer_states(
        self,
        ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Iterator[Tensor]:
        """The residual stream, layer after layer, each computed when it is asked for.

        Who needs the first n layers takes n + 1 states and leaves the rest uncomputed.

        Args:
            ids, attention_mask, positions, cache: as for `forward`. A cache is not advanced.

        Yields:
            (B, T, D): the embeddings, then what each layer leaves, before the last norm.

        Raises:
            MinllamaError: as `forward` does.
        """
        packing, view = self._view(ids, attention_mask, positions, cache)
        for h in self._run(ids if packing is None else packing.packed(ids), view, cache):
            h = h.to(self.dtype)
            yield h if packing is None else packing.padded(h)

    def state_after(
        self,
        n_layers: int,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        at: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after some layers; those above never run.

        Args:
            n_layers: how many.
            ids, attention_mask, positions, cache: as for `layer_states`.
            at: (M,), numbers b * T + t of the tokens that are wanted; None for all. What the last
                of these layers does token by token is computed for them alone.

        Returns:
            (B, T, D), or (M, D) at those tokens.

        Raises:
            MinllamaError: as `forward` does.
        """
        packing, view = self._view(ids, attention_mask, positions, cache)
        tokens = ids if packing is None else packing.packed(ids)
        place = at if packing is None or at is None else packing.places(at)
        in_layer = place if self._gathers(n_layers, place, tokens) else None
        h = next(
            itertools.islice(self._run(tokens, view, cache, n_layers, in_layer), n_layers, None)
        ).to(self.dtype)
        if at is None:
            return h if packing is None else packing.padded(h)
        h = (tokens_at(h, place) if in_layer is None else h).squeeze(0)  # (M, D)
        if packing is None:
            return h
        is_padding = packing.tokens[place] != packing.own(at)
        return h.masked_fill(is_padding.unsqueeze(-1), 0.0)

    def _gathers(self, n_layers: int, at: Tensor | None, tokens: Tensor) -> bool:
        """Whether the last of so many layers can be asked for some tokens alone."""
        if at is None or n_layers == 0 or at.numel() >= tokens.numel():
            return False
        layer = self.layers[n_layers - 1]
        is_own = type(layer) is LlamaLayer and type(layer.attention) is Attention
        return is_own and not has_hooks(self)  # hooks are told of (B, T, D)

    def _view(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Packing | None, View]:
        """How tokens are laid out for the layers: with a packing, as one row of the real ones."""
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
        check_inputs(ids, attention_mask)
        if cache is not None:
            cache.check_serves(self.config, self.dtype, self.device)
            return None, view_of_continuation(ids, attention_mask, positions, cache, self.config)
        packed = None if positions is not None else self._packed(ids, attention_mask)
        return packed or (None, view_of_whole(ids, attention_mask, positions, self.config))

    def _packed(self, ids: Tensor, mask: Tensor | None) -> tuple[Packing, View] | None:
        """Texts in one row, where that spares padding or a common beginning, and attention can."""
        if not self.config.has_defaults_beyond(PACKED_FIELDS):
            return None
        if not ops.serves(self.norm.weight):
            return None
        if mask is not None and (mask.dim() == 3 or not mask.any()):
            return None
        # Not in training: dropout of adapters is another for each token.
        shared = 0 if torch.is_grad_enabled() else shared_columns(ids, mask)
        if not shared and (mask is None or mask.all()):
            return None
        if has_hooks(self):  # which are told of (B, T, D)
            return None
        parts = (module for module in self.modules() if isinstance(module, Attention))
        if any(part.training and part.attention_dropout for part in parts):
            return None
        mask = torch.ones_like(ids).bool() if mask is None else mask
        if not attention.serves_packed(int(mask.sum(-1).max())):
            return None
        return view_of_packed(mask, self.config, shared)

    def _run(
        self,
        ids: Tensor,
        view: View,
        cache: KVCache | None,
        n_layers: int | None = None,
        at: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The states of `layer_states`; layer number `n_layers` gives the tokens `at` alone."""
        rotation = self.rope(view.positions, view.text_len)
        h = self.dropout(self.tok_embeddings(ids)).to(self.dtype_of_pass(ids.numel()))
        yield h
        for number, layer in enumerate(self.layers, 1):
            arguments = (h, rotation, view, cache, *_given(at if number == n_layers else None))
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                h = layer(*arguments)
            yield h

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        if self.output is None:
            return project(self.tok_embeddings, hidden)
        logits: Tensor = self.output(hidden)
        return logits

    def compute_token_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The logit of one token at each hidden state: (..., D) and (...) -> (...), float32.

        In float32 whatever the weights are: bfloat16's steps between logits of 16 to 32 are an
        eighth, which is more than often lies between two labels.
        """
        head = self.tok_embeddings if self.output is None else self.output
        return (hidden.float() * rows_of(head, ids).float()).sum(-1)

    @property
    def cache_dtype(self) -> torch.dtype:
        """What generation keeps keys and values in.

        The model's dtype; but float16 instead of float32 beside weights in fewer bits, as llama.cpp
        has it: half the memory, and half of what decoding a long text reads, for a rounding that is
        small beside theirs. Only where compiled code widens them on their way.
        """
        is_quantized = self.dtype == torch.float32 and self.quantize is not None
        return torch.float16 if is_quantized and runs_natively(self) else self.dtype

    def new_cache(
        self, batch_size: int, capacity: int, *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for this model: `batch_size` rows of up to `capacity` tokens.

        Args:
            dtype: None for the model's; `cache_dtype` is what generation takes.
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
        """Continue each row of token ids.

        Args:
            ids: (B, T), without padding.
            max_new_tokens: how many tokens to add.
            temperature: 0 takes the likeliest token; above, a sample from
                softmax(logits / temperature).
            seed: makes the sample repeatable.

        Returns:
            (B, T + max_new_tokens), the continuation included.

        Raises:
            MinllamaError: the result would be longer than the context, or an option is out of
                range. `minllama.generation.api` has stop strings, streaming, top-p and more.
        """
        return generate_ids(self, ids, max_new_tokens, temperature, seed)

    def has_own_layers(self) -> bool:
        """Whether it is made of what is in this file, and of nothing that only looks like it."""
        for name in ("compute_logits", "state_after"):
            if name in vars(self) or getattr(type(self), name) is not getattr(Llama, name):
                return False
        return type(self.norm) is RMSNorm and all(
            type(layer) is LlamaLayer
            and type(layer.attention) is Attention
            and type(layer.feed_forward) is FeedForward
            and type(layer.attention_norm) is RMSNorm
            and type(layer.ffn_norm) is RMSNorm
            for layer in self.layers
        )


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


def _given(at: Tensor | None) -> tuple[Tensor, ...]:
    """An argument that only who is asked for some tokens gets: others may not know of it."""
    return () if at is None else (at,)
