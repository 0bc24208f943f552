"""The engine for CPUs: forward passes over a cache in calls of compiled code.

The forward pass of `minllama.model.llama`, on the same weights and the same cache, without an
interpreter between its products; `kernels/cpu/src/bindings.cpp` computes it. Passes of which
torch's products are faster run the modules: long ones in half precision on CPUs that multiply it
without matrix instructions (AMX), and without vector instructions.
"""

import ctypes
import math
import operator
import time
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from minllama.engine.base import Engine, TokenTree
from minllama.engine.support import is_supported, layers_of, linear_modules
from minllama.kernels.cpu.library import best_level, call, library
from minllama.kernels.cpu.ops import AMX_COLUMNS, floats
from minllama.kernels.cpu.structs import (
    KINDS,
    Layer,
    Linear,
    Model,
    Step,
    Values,
    dense_linear,
    quantized_linear,
)
from minllama.kernels.cpu.team import Team
from minllama.kernels.dispatch import is_plain
from minllama.kernels.hardware import AVX512, amx_from, choice, has_amx, sums_from
from minllama.model import llama as modules
from minllama.model.attention_layout import (
    check_context,
    check_continuation,
    check_inputs,
    layout_of,
    row_lens,
    selected_positions,
)
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama, LlamaLayer, LlamaOutput
from minllama.quantization.half import UpcastEmbedding, UpcastLinear
from minllama.quantization.modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    check_ids,
)

_TEAM = Team()  # of all models of this process, which share its cores
PIECE = 512  # tokens of a longer pass that are read together: what is kept of each takes 25 KB
# The LlamaConfig fields that kernels/cpu/src/bindings.cpp, or its caller, implements.
IMPLEMENTED = frozenset(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"),
        *("max_seq_len", "norm_eps", "rope_theta", "rope_scaling"),
        *("tie_embeddings", "attention_bias", "ffn_bias"),
        "dropout",  # by leaving training to the modules: `is_supported`
    )
)
SUPPORTED_MODULES = (
    *(nn.Linear, modules.Linear, nn.Embedding, modules.Embedding),
    *(QuantizedLinear, QuantizedEmbedding),
    *(UpcastLinear, UpcastEmbedding),
)


def can_run(llama: Llama) -> bool:
    """Whether the native step computes what this Llama's modules do.

    Plain and quantized layers on a CPU, without adapters, that `is_supported` accepts.
    """
    if library() is None or llama.device.type != "cpu" or llama.dtype not in KINDS:
        return False
    if len(_activation_bits(llama)) > 1:
        return False
    return is_supported(llama, IMPLEMENTED, _is_as_described, _is_dense)


def _activation_bits(llama: Llama) -> set[int]:
    return {m.activation_bits for m in llama.modules() if isinstance(m, QuantizedWeight)}


def _is_as_described(module: nn.Module, shape: tuple[int, int]) -> bool:
    """Whether the module's type is supported, with a matrix of this shape."""
    if type(module) not in SUPPORTED_MODULES:
        return False
    bias = getattr(module, "bias", None)
    if bias is not None and not _is_dense(bias, shape[:1]):
        return False
    if isinstance(module, QuantizedWeight):
        return (module.out_features, module.in_features) == shape
    return _is_dense(module.weight, shape)


def _is_dense(x: Any, shape: tuple[int, ...]) -> bool:
    return is_plain(x) and x.dtype in KINDS and x.is_cpu and tuple(x.shape) == shape


def _is_quantized(llama: Llama) -> bool:
    matrices = (matrix for layer in layers_of(llama) for matrix in linear_modules(layer))
    return all(isinstance(matrix, QuantizedWeight) for matrix in matrices)


def _amx_from(llama: Llama) -> int:
    """From how many tokens of a pass on products are of bfloat16, by matrix instructions."""
    widths = llama.config.dim, llama.config.n_heads * llama.config.head_dim, llama.config.hidden_dim
    if (llama.long_dtype or llama.dtype) != torch.bfloat16 or any(n % AMX_COLUMNS for n in widths):
        return 0
    return amx_from(best_level(), is_quantized=_is_quantized(llama))


def most_tokens(llama: Llama, *, of_one_each: bool) -> float:
    """The most tokens of a pass that suits the native step.

    Args:
        llama: that it runs.
        of_one_each: whether the pass has one token of each row.
    """
    if _is_quantized(llama):
        name = "quantized pass"
    else:
        name = "dense step" if of_one_each else "dense pass"
    dtype = llama.long_dtype or llama.dtype
    if has_amx(dtype) and not _amx_from(llama):  # of unusual widths
        name = "quantized"
    return choice(name, best_level(), dtype).limit


class NativeStep:
    """Forward passes of one Llama through the library.

    Args:
        llama: a `minllama.Llama` that `can_run`. Its tensors are read by address: a
            replaced tensor is not noticed.
        level: index into `hardware.LEVELS`; None for the best that there is.

    Attributes:
        most_tokens: of a pass for it, each of which attends to all before it.
        most_rows: of one token each, that are a pass for it.
    """

    def __init__(self, llama: Llama, level: int | None = None) -> None:
        self._level = level
        self.most_tokens = most_tokens(llama, of_one_each=False)
        self.most_rows = most_tokens(llama, of_one_each=True)
        self._referenced: list[Tensor] = []  # what the structs point to
        self._vocab_size = llama.config.vocab_size
        self._dtype = llama.dtype
        self._model = self._describe(llama)

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        rotation: Tensor,
        cache: KVCache,
        logits_of: Tensor,
        mask: Tensor | None = None,
        tree: TokenTree | None = None,
        *,
        only_logits: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Read tokens that continue what the cache holds, which is written to but not advanced.

        Args:
            ids: (B, T) token ids.
            positions: (B, T) or (1, T), in their rows; each token attends to all up to itself.
            rotation: complex64 (B, T, 1, C / 2) or (1, T, 1, C / 2), of those positions.
            cache: with room for them.
            logits_of: (M,), flat indices b * T + t of the tokens whose logits are selected.
            mask: (B, T), true at the tokens to read, among them those of `logits_of`; None for all.
            tree: where tokens are written and what they attend to, if not as positions say.
            only_logits: whether other tokens than those of `logits_of` are not computed behind the
                last attention, since nobody reads them.

        Returns:
            Hidden states after the last norm, (B, T, D), in the model's dtype, zero where nothing
            is read or computed; and logits (M, V), float32.
        """
        batch, length = ids.shape
        check_ids(ids, self._vocab_size)
        read, counts = torch.arange(batch * length, device="cpu"), [length] * batch
        if mask is not None:
            mask = mask.bool()
            read, counts = read[mask.flatten()], mask.sum(-1).tolist()
        hidden = floats(batch * length, self._model.dim)
        if len(read) < len(hidden) or only_logits:
            hidden.zero_()
        logits = floats(len(logits_of), self._vocab_size)
        places = torch.searchsorted(read, logits_of.long())
        inputs = _Inputs(
            ids.long(),
            (positions if tree is None else tree.slots).expand(batch, -1),
            torch.view_as_real(rotation).expand(batch, -1, -1, -1, -1),
            tree,
            only_logits,
        )
        for piece in read.split(_pieces(counts)):
            is_selected = (places >= 0) & (places < len(piece))
            states, found = self._read(inputs, piece, places[is_selected], cache)
            hidden[piece], logits[is_selected] = states, found
            places = places - len(piece)
        return hidden.view(batch, length, -1).to(self._dtype), logits

    def _read(
        self, inputs: "_Inputs", piece: Tensor, logits_of: Tensor, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """Read N of the tokens at once: hidden states (N, D), and logits (M, V) of some of them."""
        length = inputs.ids.shape[1]
        rows, columns = piece // length, piece % length
        ids, slots = inputs.ids[rows, columns], inputs.slots[rows, columns]
        angles = inputs.angles[rows, columns].contiguous()
        hidden = floats(len(piece), self._model.dim)
        if inputs.only_logits:
            hidden.zero_()
        logits_of = logits_of.contiguous()
        logits = floats(len(logits_of), self._vocab_size)
        step = Step(
            n_tokens=len(piece),
            ids=ids.data_ptr(),
            rows=rows.data_ptr(),
            slots=slots.data_ptr(),
            rotation=angles.data_ptr(),
            hidden=hidden.data_ptr(),
            n_logits=len(logits_of),
            logits_of=logits_of.data_ptr(),
            only_logits=inputs.only_logits,
            logits=logits.data_ptr(),
        )
        if inputs.tree is not None:
            seen, ancestors = inputs.tree.seen[rows, columns], inputs.tree.ancestors[rows, columns]
            step.seen, step.ancestors = seen.data_ptr(), ancestors.data_ptr()
            step.n_ancestors = ancestors.shape[1]
        # Looked up each time: several caches share a step, perhaps in several threads.
        self._run(step, cache, _addresses(cache.keys), _addresses(cache.values))
        return hidden, logits

    def next_logits(self, ids: Tensor, cache: KVCache, table: Tensor) -> tuple[Tensor, Tensor]:
        """Read one more token of each row, which is written to the cache but not counted there.

        Args:
            ids: (B, 1) token ids.
            cache: with room for them, and with the tensors that it had in the pass before, or new
                ones.
            table: complex64 (L, C / 2), the rotations of all positions up to theirs.

        Returns:
            Hidden states after the last norm, (B, D), in the model's dtype, and logits (B, V),
            float32.

        Raises:
            MinllamaError: the vocabulary has no such id.
        """
        tokens: list[int] = ids.flatten().tolist()
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            check_ids(ids, self._vocab_size)
        n = len(tokens)
        int64_array = ctypes.c_int64 * n
        new, rows, slots = int64_array(*tokens), int64_array(*range(n)), int64_array(*cache.lengths)
        rotations = table[cache.lengths] if n > 1 else table[cache.lengths[0]]
        hidden, logits = floats(n, self._model.dim), floats(n, self._vocab_size)
        step = Step(
            n_tokens=n,
            ids=ctypes.addressof(new),
            rows=ctypes.addressof(rows),
            slots=ctypes.addressof(slots),
            rotation=rotations.data_ptr(),
            hidden=hidden.data_ptr(),
            n_logits=n,
            logits_of=ctypes.addressof(rows),
            logits=logits.data_ptr(),
        )
        self._run(step, cache, *_cached_addresses(cache))
        return hidden.to(self._dtype), logits

    def _run(self, step: Step, cache: KVCache, keys: Any, values: Any) -> None:
        """A step over keys and values at these addresses, which are the cache's."""
        first_keys = cache.keys[0]
        step.keys, step.values = ctypes.addressof(keys), ctypes.addressof(values)
        step.cache_kind = KINDS[first_keys.dtype]
        step.row_stride, step.head_stride = first_keys.stride(0), first_keys.stride(1)
        lost = ctypes.c_double()
        step.lost = ctypes.addressof(lost)
        began = time.perf_counter()
        threads = _TEAM.size(torch.get_num_threads(), began)
        call("step", self._model, step, level=self._level, threads=threads)
        _TEAM.ran(threads, began, time.perf_counter(), lost.value)

    def _describe(self, llama: Llama) -> Model:
        config = llama.config
        self._layers = (Layer * config.n_layers)(*map(self._layer, layers_of(llama)))
        embedding = self._linear(llama.tok_embeddings)
        return Model(
            dim=config.dim,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            hidden_dim=config.hidden_dim,
            activation_bits=min(_activation_bits(llama), default=16),
            sums_from=sums_from(best_level()) if _is_quantized(llama) else 0,
            amx_from=_amx_from(llama),
            norm_eps=config.norm_eps,
            embedding=embedding,
            output=embedding if llama.output is None else self._linear(llama.output),
            norm=self._values(llama.norm.weight),
            layers=self._layers,
        )

    def _layer(self, layer: LlamaLayer) -> Layer:
        query, key, value, output, w1, w2, w3 = map(self._linear, linear_modules(layer))
        attention_norm = self._values(layer.attention_norm.weight)
        ffn_norm = self._values(layer.ffn_norm.weight)
        return Layer(attention_norm, query, key, value, output, ffn_norm, w1, w2, w3)

    def _linear(self, module: nn.Module) -> Linear:
        bias = self._values(getattr(module, "bias", None))
        if isinstance(module, QuantizedWeight):
            self._referenced += [module.quants, module.scales]
            self._referenced += [] if module.mins is None else [module.mins]
            described = quantized_linear(module)
            described.bias = bias
            return described
        assert isinstance(module, nn.Linear | nn.Embedding)
        weight = module.weight.detach().contiguous()
        self._referenced.append(weight)
        described = dense_linear(weight)
        described.bias = bias
        return described

    def _values(self, tensor: Tensor | None) -> Values:
        if tensor is None:
            return Values()
        tensor = tensor.detach().contiguous()
        self._referenced.append(tensor)
        return Values(tensor.data_ptr(), KINDS[tensor.dtype])


class _Inputs(NamedTuple):
    """Tokens of a pass: ids and slots (B, T), rotations (B, T, 1, C / 2, 2)."""

    ids: Tensor
    slots: Tensor
    angles: Tensor
    tree: TokenTree | None
    only_logits: bool


def _pieces(counts: list[int]) -> list[int]:
    """How many tokens are read together, of rows that have these numbers of them.

    A row is split only if it is longer than a piece, and then counted from its start: what is read
    with it must not change its bits.
    """
    pieces, n = [], 0
    for count in counts:
        if n and n + count > PIECE:
            pieces.append(n)
            n = 0
        whole, rest = divmod(count, PIECE)
        pieces += [PIECE] * whole
        n += rest
    return [*pieces, n] if n else pieces


def _cached_addresses(cache: KVCache) -> tuple[Any, Any]:
    """The addresses of a cache's keys and of its values.

    Looked up again only if the cache's tensors were replaced.
    """
    cached: tuple[tuple[Tensor, ...], tuple[Any, Any]] | None = cache.engine_state
    if cached is None or not all(map(operator.is_, cached[0], chain(cache.keys, cache.values))):
        addresses = _addresses(cache.keys), _addresses(cache.values)
        cached = cache.engine_state = (*cache.keys, *cache.values), addresses
    return cached[1]


def _addresses(tensors: list[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


class CpuEngine(Engine):
    """Passes in compiled code, where it is faster than the modules.

    Values do not depend on the company that a sequence has in a decode step; in a pass of another
    length or kind they may differ in their last bits.

    Args:
        llama: a model that it `runs`: compiled code reads tensors by their address.
    """

    backend = "cpu"
    runs = staticmethod(can_run)

    def __init__(self, llama: Llama) -> None:
        super().__init__(llama)
        if llama.dtype == torch.float32 and llama.quantize is not None:
            # As in llama.cpp: half the memory, and half of what decoding a long text reads, for a
            # rounding that is small compared with that of the weights.
            self.cache_dtype = torch.float16
        # Products of AVX-512 over quantized weights are the same for one token and for several;
        # others are added up in another order.
        is_every_pass = most_tokens(llama, of_one_each=False) == math.inf and not _amx_from(llama)
        is_exact = best_level() == AVX512 and _is_quantized(llama)
        self.is_batch_invariant = is_exact and is_every_pass

    @cached_property
    def _step(self) -> NativeStep:
        # At the first use: its buffers for logits are 25 MB, which scoring texts does without.
        return NativeStep(self.llama)

    def tree_logits(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        tree: TokenTree,
        cache: KVCache,
        logits_of: Tensor,
    ) -> Tensor:
        """See `Engine.tree_logits`."""
        self.snapshot.check()
        cache.check_serves(self.config, self.llama.dtype, self.device)
        check_inputs(ids, mask, self.config.vocab_size)
        check_context(int(positions.max()) + 1, self.config)
        cache.reserve(ids.shape[1])
        rotation = self.llama.rope(positions, int(positions.max()) + 1)
        _, logits = self._step(
            ids, positions, rotation, cache, logits_of, mask, tree, only_logits=True
        )
        return logits

    def forward(
        self,
        ids: Tensor,
        cache: KVCache,
        *,
        attention_mask: Tensor | None = None,
        logits: Literal["all", "last"] | None = "last",
    ) -> LlamaOutput:
        """Read tokens that continue what a cache holds; see `Engine.forward`."""
        # Little Python: a processor that has just read all weights finds none of it in its caches,
        # and ten lines take 0.1 ms.
        is_step = logits == "last" and attention_mask is None and ids.shape[1] == 1
        if is_step and cache.max_len and len(ids) <= self._step.most_rows:
            check_continuation(ids, cache, self.config)
            table = self.llama.rope.fixed_table(cache.max_len + 1, ids.device)
            if table is not None:
                output = self._step.next_logits(ids, cache, table)
                cache.advance([1] * len(ids))
                return LlamaOutput(*output)
        most = self._step.most_rows if ids.shape[1] == 1 else self._step.most_tokens
        is_tree = attention_mask is not None and attention_mask.dim() == 3
        if is_tree or ids.numel() > most:
            return super().forward(ids, cache, attention_mask=attention_mask, logits=logits)
        self._check_model(ids, cache, logits)
        return self._short_pass(ids, cache, attention_mask, logits)

    def _short_pass(
        self,
        ids: Tensor,
        cache: KVCache,
        attention_mask: Tensor | None,
        logits: Literal["all", "last"] | None,
    ) -> LlamaOutput:
        llama = self.llama
        cache.check_serves(llama.config, llama.dtype, llama.device)
        layout = layout_of(ids, attention_mask, None, cache, llama.config)
        selected = selected_positions(ids, attention_mask, logits)
        every = torch.arange(0 if logits is None else ids.numel(), device=ids.device)
        rotation = llama.rope(layout.positions, layout.text_len)
        logits_of = every if selected is None else selected.flatten()
        # Who asks for all logits gets those of padding, too.
        mask = None if logits == "all" else attention_mask
        hidden, found = self._step(
            ids,
            layout.positions,
            rotation,
            cache,
            logits_of,
            mask,
            only_logits=selected is not None,
        )
        cache.advance(row_lens(ids, attention_mask))
        if selected is not None:
            hidden = hidden.flatten(0, 1)[selected]
        return LlamaOutput(hidden, None if logits is None else found.view(*hidden.shape[:-1], -1))
