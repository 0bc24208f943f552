"""Memory of a method on one GPU, or one process of a CPU, from the shape of a model.

Letters are those of `minllama.model.llama`: D model width, F hidden width, H heads, K key/value
heads, C head width, R rank. A layer keeps for the backward pass, for each token: the input and the
output of both norms (4 D), rotated queries and the attention's output (2 H C), keys and values
(2 K C), both factors of SwiGLU and their product (3 F; 4 F on a GPU, where torch keeps SiLU too),
and float32 statistics; LoRA also R numbers for each of seven matrices. Attention weights are never
kept: on a GPU that is true of its fused kernels.
"""

import math
from dataclasses import dataclass
from typing import Literal

from minllama.model.config import LlamaConfig
from minllama.options.planning import PlanOptions
from minllama.planning.parameters import (
    DTYPE_BYTES,
    QUANTIZED_BYTES,
    all_parameters,
    layer_matrices,
    layer_parameters,
    other_parameters,
    trained_parameters,
)
from minllama.training.run import MAX_TOKENS, MAX_TOKENS_IF_MUCH_IS_TRAINED

Sharding = Literal["replicated", "sharded"]
SHARDINGS: tuple[Sharding, ...] = ("replicated", "sharded")
FLOAT32, BFLOAT16 = 4, 2
GATHERED_LAYERS = 2  # of a sharded model: the one that is computed, and the next


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        weights: of the model, as they are stored there.
        gradients: of what is trained, in float32; twice where processes add theirs up in buckets.
        optimizer: AdamW's two moments, in float32.
        activations: kept for the backward pass, with weights that autocast has converted.
        working: intermediate results of the layer that is computed, its gathered weights where the
            model is sharded, and the optimizer's.
        are_together: gradients exist while activations grow: there are several micro-batches.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    update: float
    are_together: bool

    @property
    def peak(self) -> float:
        """The most bytes at any time of a step.

        The backward pass frees activations as it adds gradients, both in proportion, so that one of
        the ends is the peak.
        """
        if self.are_together:
            passes = self.activations + self.gradients
        else:
            passes = max(self.activations, self.gradients)
        update = self.gradients + self.update
        return self.weights + self.optimizer + max(passes + self.working, update)


@dataclass(frozen=True)
class _Work:
    """What a process computes: its method, dtypes and tokens."""

    config: LlamaConfig
    method: str
    options: PlanOptions

    @property
    def is_trained(self) -> bool:
        return self.method != "frozen"

    @property
    def is_cpu(self) -> bool:
        return self.options.device == "cpu"

    @property
    def autocast(self) -> bool:
        """Float32 weights are multiplied in bfloat16."""
        is_float32 = self.method == "full" or (
            self.method == "lora"
            and self.options.dtype == "float32"
            and self.options.quantize == "none"
        )
        return is_float32 and not self.options.no_autocast

    @property
    def stored_bytes(self) -> float:
        """Of a weight."""
        if self.method == "full":
            return FLOAT32
        return QUANTIZED_BYTES.get(self.options.quantize, DTYPE_BYTES[self.options.dtype])

    @property
    def wide(self) -> int:
        """Bytes of an element of the residual stream."""
        return FLOAT32 if self.method == "full" else DTYPE_BYTES[self.options.dtype]

    @property
    def narrow(self) -> int:
        """Bytes of an element of what matrices give."""
        return BFLOAT16 if self.autocast else self.wide

    def tokens(self, n_texts: int) -> int:
        """Tokens of a forward pass: on a CPU, a batch is computed in parts."""
        tokens = n_texts * self.options.seq_len
        if not self.is_trained:
            return tokens
        limits = MAX_TOKENS_IF_MUCH_IS_TRAINED if self.method == "full" else MAX_TOKENS
        most = limits.get(self.options.device, math.inf)
        return int(max(self.options.seq_len, min(tokens, most)))


def plan_memory(
    config: LlamaConfig,
    method: str,
    sharding: Sharding,
    options: PlanOptions,
    *,
    batch_size: int | None = None,
) -> Memory:
    """The memory of each GPU from the second step on.

    Args:
        config: of the model.
        method: one of PLANNED_METHODS.
        sharding: each GPU has all weights (`replicated`), or its part of them (`sharded`).
        options: the work and the hardware.
        batch_size: None for that of the options.
    """
    work = _Work(config, method, options)
    n_texts = options.batch_size if batch_size is None else batch_size
    tokens = work.tokens(n_texts)
    parts = options.gpus if sharding == "sharded" else 1
    of_layer, beside = trained_parameters(config, method, options.r)
    trained = config.n_layers * of_layer + beside
    adapters = FLOAT32 * trained if method == "lora" else 0
    is_sharded = parts > 1
    buckets = 2 if sharding == "replicated" and options.gpus > 1 else 1
    gathered = _gathered(work, of_layer) if is_sharded else 0.0
    return Memory(
        weights=(work.stored_bytes * all_parameters(config) + adapters) / parts,
        gradients=buckets * FLOAT32 * trained / parts,
        optimizer=2 * FLOAT32 * trained / parts,
        activations=_activations(work, tokens, is_sharded=is_sharded),
        working=_working(work, tokens) + gathered,
        # On a GPU the denominators of all parameters exist at once.
        update=0.0 if work.is_cpu else FLOAT32 * trained / parts,
        are_together=tokens < n_texts * options.seq_len,
    )


def most_texts(
    config: LlamaConfig, method: str, sharding: Sharding, options: PlanOptions, memory: float
) -> int:
    """The largest batch of a GPU that fits into so many bytes; 0 if not even one text does."""

    def fits(n_texts: int) -> bool:
        return plan_memory(config, method, sharding, options, batch_size=n_texts).peak <= memory

    if not fits(1):
        return 0
    enough, too_many = 1, 2
    while too_many < 10**6 and fits(too_many):
        enough, too_many = too_many, 2 * too_many
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        enough, too_many = (middle, too_many) if fits(middle) else (enough, middle)
    return enough


def kept_per_token(config: LlamaConfig, method: str, options: PlanOptions) -> float:
    """Bytes that a layer keeps of each token for the backward pass."""
    return _kept(_Work(config, method, options))


def _kept(work: _Work) -> float:
    config, wide, narrow = work.config, work.wide, work.narrow
    dim, query_dim = config.dim, config.n_heads * config.head_dim
    key_dim, hidden_dim = config.n_kv_heads * config.head_dim, config.hidden_dim
    # Autocast converts a norm's output for each matrix that reads it: three and two of them. An
    # adapter keeps the output itself.
    converts = work.autocast and work.method == "full"
    norms = 2 * dim * wide + (5 * dim * narrow if converts else 2 * dim * wide)
    attention = narrow * (2 * query_dim + 2 * key_dim)
    swiglu = narrow * hidden_dim * (3 if work.is_cpu else 4)
    statistics = FLOAT32 * (config.n_heads + 2)
    low = 7 * work.options.r * (FLOAT32 if work.is_cpu else narrow) if work.method == "lora" else 0
    return norms + attention + swiglu + statistics + low


def _activations(work: _Work, tokens: int, *, is_sharded: bool) -> float:
    if not work.is_trained:
        return 0.0
    config, layers = work.config, work.config.n_layers
    converted = BFLOAT16 * layers * layer_matrices(config) if work.autocast else 0
    if is_sharded:
        converted = 0  # weights are gathered in bfloat16
    if work.options.gradient_checkpointing:
        return tokens * (layers * config.dim * work.wide + _kept(work)) + converted
    return tokens * layers * _kept(work) + converted


def _working(work: _Work, tokens: int) -> float:
    """Intermediate results: three of the feed-forward, and some of the residual stream."""
    config = work.config
    residuals = 2 if work.is_trained else 3
    working: float = tokens * (
        3 * config.hidden_dim * work.narrow + residuals * config.dim * work.wide
    )
    if work.stored_bytes < BFLOAT16:  # a quantized matrix is dequantized to be multiplied
        working += config.hidden_dim * config.dim * work.narrow
    return working


def _gathered(work: _Work, trained_in_layer: int) -> float:
    """Weights that a sharded model gathers, and the gradients of a layer before they are spread."""
    config = work.config
    width = BFLOAT16 if work.autocast else work.stored_bytes
    weights = GATHERED_LAYERS * layer_parameters(config) + other_parameters(config)
    return width * weights + (FLOAT32 + BFLOAT16) * trained_in_layer
