"""The engine for GPUs: a decode step of all sequences in one replay of a captured graph.

The forward pass of `minllama.model.llama`, on the same weights and the same cache, by
`minllama.kernels.gpu.decode_program`. Launched one by one its kernels would take longer than they
run, so after the first step they are captured in a CUDA graph, one for each number of rows, and
replayed. Graphs fix addresses, not shapes: what changes from step to step (tokens, lengths, where
the cache is) is in memory that the kernels read.
"""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minllama.engine.base import Engine
from minllama.engine.support import is_supported, layers_of, linear_modules
from minllama.kernels.gpu import launch, support
from minllama.kernels.gpu.decode_program import DecodeProgram, Layer, Model, Rows, Weight
from minllama.model.attention_layout import check_continuation
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Embedding, Linear, Llama, LlamaLayer, LlamaOutput
from minllama.quantization.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight

KINDS = (torch.float32, torch.bfloat16, torch.float16)
MOST_ROWS = 128
# The LlamaConfig fields that the kernels, or their launcher, implement.
IMPLEMENTED = frozenset(
    (
        *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"),
        *("max_seq_len", "norm_eps", "rope_theta", "rope_scaling"),
        *("tie_embeddings", "attention_bias", "ffn_bias"),
        "dropout",  # by leaving training to the modules: `is_supported`
    )
)
NO_ROW = -(2**40)  # the length of a row that only pads a graph's number of rows


def can_run(llama: Llama) -> bool:
    """Whether the graph step computes what this Llama's modules do.

    Plain layers in the model's dtype and quantized ones, on a GPU that Triton compiles for, of
    a model that `is_supported` accepts.
    """
    return launch.works(llama.device) and computes(llama)


def computes(llama: Llama) -> bool:
    """Whether the kernels support this Llama, on any device."""
    dtype, device = llama.dtype, llama.device
    if dtype not in KINDS or not supports_config(llama.config):
        return False

    def is_dense(x: Any, shape: tuple[int, ...]) -> bool:
        is_ours = isinstance(x, Tensor) and x.dtype == dtype and x.device == device
        is_aligned = is_ours and x.is_contiguous() and x.data_ptr() % 16 == 0
        return is_aligned and tuple(x.shape) == shape

    def is_matrix(module: nn.Module, shape: tuple[int, int]) -> bool:
        bias = getattr(module, "bias", None)
        if bias is not None and not is_dense(bias, shape[:1]):
            return False
        if type(module) in (QuantizedLinear, QuantizedEmbedding):
            assert isinstance(module, QuantizedWeight)
            is_on_device = module.quants.device == device
            return is_on_device and (module.out_features, module.in_features) == shape
        return type(module) in (nn.Linear, Linear, nn.Embedding, Embedding) and is_dense(
            module.weight, shape
        )

    def has_equal_biases(layer: LlamaLayer) -> bool:
        """Whether the matrices of one kernel either all have biases or all lack them."""
        query, key, value, _, w1, _, w3 = (module.bias is None for module in linear_modules(layer))
        return query == key == value and w1 == w3

    return is_supported(llama, IMPLEMENTED, is_matrix, is_dense) and all(
        map(has_equal_biases, layers_of(llama))
    )


def supports_config(config: LlamaConfig) -> bool:
    """Whether the kernels implement all settings of a config."""
    scaling = config.rope_scaling
    # With dynamic scaling each text has its own table of rotations.
    return scaling is None or scaling.kind != "dynamic"


def is_step(ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether a pass (B, T) suits the graph step: one token in each of up to 128 rows."""
    return attention_mask is None and ids.shape[1] == 1 and len(ids) <= MOST_ROWS


_Key = tuple[int, ...]
_steps: "weakref.WeakKeyDictionary[Llama, tuple[_Key, dict[int, GraphStep]]]" = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


def step_of(llama: Llama) -> "GraphStep":
    """The step of a model that `can_run`, on the current stream: one for all its caches.

    It belongs to the current tensors: if one was replaced, a new step is made.
    """
    stream = _stream_of(llama.device)
    addresses = tuple(x.data_ptr() for x in (*llama.parameters(), *llama.buffers()))
    with _lock:
        known, steps = _steps.get(llama, (addresses, {}))
        if known != addresses:
            steps = {}
        _steps[llama] = addresses, steps
        step: GraphStep = steps.get(stream) or steps.setdefault(stream, GraphStep(llama))
        return step


@dataclass
class _State:
    """The steps for one number of rows.

    Attributes:
        graph: once it is captured.
        expected: the rows' lengths, unless something other than the step changed them.
    """

    rows: Rows
    runs: int = 0
    graph: Any = None
    expected: list[int] = field(default_factory=list)


class GraphStep:
    """Decode steps of one Llama: one token in each row.

    Args:
        llama: a `minllama.Llama` that the kernels compute. Its tensors are read by address:
            a replaced tensor is not noticed.
        captures: graphs; else each kernel is launched by itself.
        early: kernels start while the one before still runs; None where the GPU can.
    """

    def __init__(self, llama: Llama, *, captures: bool = True, early: bool | None = None) -> None:
        self._rope, self._captures = llama.rope, captures
        self._model = _described(llama)
        if early is None:
            early = torch.cuda.get_device_capability(llama.device) >= (9, 0)
        with torch.inference_mode(False):
            n_pointers = 2 * llama.config.n_layers + 3
            self._pointers = torch.zeros(n_pointers, dtype=torch.int64, device=llama.device)
        self._written_pointers: list[int] = []  # the contents of `_pointers`
        self._table: Tensor | None = None  # referenced by a pointer; the caller owns the caches
        # Graphs contain their addresses, so they must outlive the modules.
        self._referenced = [x.detach() for x in (*llama.parameters(), *llama.buffers())]
        self._program, self._early = DecodeProgram(self._model, self._pointers, early=early), early
        self._works = True
        self._pool: Any = None  # a memory pool for all graphs, whose replays never overlap
        self._stream = _stream_of(llama.device)
        self._states: dict[int, _State] = {}
        self._busy = threading.Lock()

    def is_of_this_stream(self) -> bool:
        """Whether it was made for the current stream, on which its steps are ordered."""
        return _stream_of(self._model.device) == self._stream

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor] | None:
        """Read a token of each row after those in the cache, which is not advanced.

        Args:
            ids: (B, 1) token ids; B at most MOST_ROWS.
            cache: in the model's dtype, with room for them.

        Returns:
            Hidden states after the last norm, (B, 1, D), and logits, (B, 1, V); None where the
            kernels cannot be compiled for this model, as a warning has reported.
        """
        batch = len(ids)
        with self._busy, support.on(self._model.device):
            if not self._works:
                return None
            state = self._state_of(batch)
            rows = state.rows
            rows.ids[:batch].copy_(ids.flatten())
            lengths = cache.lengths + [NO_ROW] * (len(rows.ids) - batch)
            if state.expected != lengths:
                rows.lengths.copy_(torch.tensor(lengths))
            self._point_to(cache)
            state.expected = []  # until the step succeeds
            if not self._run(state):
                return None
            state.runs += 1
            state.expected = [length + (length != NO_ROW) for length in lengths]
            return rows.hidden[:batch, None].clone(), rows.logits[:batch, None].clone()

    def _run(self, state: _State) -> bool:
        """Launch the kernels, or replay them; returns whether that succeeded.

        What a graph records must have been compiled before, so the first run is launched.
        """
        if state.graph is None and state.runs and self._captures:
            try:
                state.graph = self._captured(state.rows)
            except Exception as error:
                self._captures = False
                support.warn("steps on this GPU are not captured", error)
        if state.graph is not None:
            state.graph.replay()
        elif state.runs:
            self._program(state.rows)
        else:
            self._works = self._first_run(state.rows)
        return self._works

    def _first_run(self, rows: Rows) -> bool:
        """Compile and launch; only the last kernel advances the step, so a retry is safe."""
        for early in (True, False) if self._early else (False,):
            try:
                if early != self._early:
                    self._program, self._early = (
                        DecodeProgram(self._model, self._pointers, early=early),
                        early,
                    )
                self._program(rows)
                return True
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of a compiler or a driver
                problem = error
        support.warn("steps on this GPU are the modules'", problem)
        return False

    def _captured(self, rows: Rows) -> Any:
        """A CUDA graph of the kernels."""
        device, graph = self._model.device, torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        pool, stream = self._pool
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            torch.cuda.current_blas_handle()  # which cannot be created during a capture
            # Work that other threads submit to the GPU meanwhile must not affect this capture.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._program(rows)
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return graph

    def _state_of(self, batch: int) -> _State:
        n = support.power_of_two(batch)
        if n not in self._states:
            self._states[n] = _State(Rows.of(self._model, n))
        return self._states[n]

    def _point_to(self, cache: KVCache) -> None:
        """Tell the kernels where the cache and the rotations are."""
        table, keys = self._rope.table(cache.max_len + 1, self._model.device), cache.keys[0]
        pointers = [*(x.data_ptr() for x in (*cache.keys, *cache.values)), table.data_ptr()]
        pointers += [keys.stride(0), keys.stride(1)]
        if pointers != self._written_pointers:
            self._pointers.copy_(torch.tensor(pointers))
            self._written_pointers, self._table = pointers, table


def _stream_of(device: torch.device) -> int:
    """The current stream's handle."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _described(llama: Llama) -> Model:
    """A Llama's tensors, as the decode program names them."""
    layers = []
    for layer in layers_of(llama):
        modules = linear_modules(layer)
        biases = (getattr(module, "bias", None) for module in modules)
        layers.append(
            Layer(
                layer.attention_norm.weight.detach(),
                layer.ffn_norm.weight.detach(),
                tuple(map(_weight, modules)),
                tuple(None if bias is None else bias.detach() for bias in biases),
            )
        )
    embedding = _weight(llama.tok_embeddings)
    return Model(
        config=llama.config,
        dtype=llama.dtype,
        device=llama.device,
        layers=layers,
        embedding=embedding,
        head=embedding if llama.output is None else _weight(llama.output),
        norm=llama.norm.weight.detach(),
    )


def _weight(module: nn.Module) -> Weight:
    """The matrix of a module: a tensor (out, in), or a `QuantizedWeight`."""
    if isinstance(module, QuantizedWeight):
        return module
    assert isinstance(module, nn.Linear | nn.Embedding)
    return module.weight.detach()


class CudaGraphEngine(Engine):
    """Decode steps of up to 128 sequences as one graph on a GPU; the modules do the rest.

    Args:
        llama: a model that it `runs`: kernels read tensors by their address.
    """

    backend = "cuda_graph"
    runs = staticmethod(can_run)

    def __init__(self, llama: Llama) -> None:
        super().__init__(llama)
        self._step = step_of(llama)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache,
        *,
        attention_mask: Tensor | None = None,
        logits: Literal["all", "last"] | None = "last",
    ) -> LlamaOutput:
        """Read tokens that continue what a cache holds; see `Engine.forward`."""
        has_model_dtype = cache.max_len > 0 and cache.keys[0].dtype == self.llama.dtype
        if has_model_dtype and is_step(ids, attention_mask):
            if not self._step.is_of_this_stream():
                self._step = step_of(self.llama)
            check_continuation(ids, cache, self.config)
            found = self._step(ids, cache)
            if found is not None:
                hidden, every = found
                cache.advance([1] * len(ids))
                if logits == "last":
                    return LlamaOutput(hidden.squeeze(1), every.squeeze(1))
                return LlamaOutput(hidden, None if logits is None else every)
        return super().forward(ids, cache, attention_mask=attention_mask, logits=logits)
