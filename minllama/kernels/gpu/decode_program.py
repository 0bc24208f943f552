"""Launch the kernels of a decode step in order: one token per sequence through a Llama on a GPU.

Computes the forward pass of `minllama.model.llama`: with fused matmuls for one sequence and dense
weights; with separate matmuls for several sequences and for quantized weights. All addresses stay
the same from step to step, so that it can be captured in a CUDA graph. `minllama.engine.cuda_graph`
calls it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from minllama.kernels.gpu import launch, support
from minllama.kernels.quantized_matrix import QuantizedMatrix

# Elements of a weight that a program of one-row products reads at once, and the most columns.
TILE, MOST_COLUMNS, WIDE = 8192, 8192, 8192
# What begins while the kernel before it ends: products, which have weights to fetch.
STREAMING = ("project_query_key_value", "add_product", "gate", "project_vocabulary")
# Of the cache, what attention reads at once: slots, and bytes of their keys.
SLOTS, MOST_BYTES = 64, 16384
PROGRAMS = 512  # of attention, about: rows x key heads x parts of the slots
MOST_PARTS = 32


Weight: TypeAlias = Tensor | QuantizedMatrix  # a matrix (out, in)


class Shape(Protocol):
    """What a step needs of a config: its widths, in the names of `minllama.LlamaConfig`."""

    @property
    def dim(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...


class Layer(NamedTuple):
    """The weights of a layer.

    Attributes:
        attention_norm, ffn_norm: (D,).
        weights: of query, key, value, output, w1, w2, w3.
        biases: of the weights; None without.
    """

    attention_norm: Tensor
    ffn_norm: Tensor
    weights: tuple[Weight, ...]
    biases: tuple[Tensor | None, ...]

    def dense(self) -> list[Tensor]:
        """The weights, none of which is quantized."""
        weights = [weight for weight in self.weights if isinstance(weight, Tensor)]
        assert len(weights) == len(self.weights)
        return weights


class Model(NamedTuple):
    """The weights of a Llama; `embedding` and `head` may be the same."""

    config: Shape
    dtype: torch.dtype
    device: torch.device
    layers: list[Layer]
    embedding: Weight
    head: Weight
    norm: Tensor

    def takes_one_row(self, n: int) -> bool:
        """Whether to use the fused kernels: for one sequence and dense weights."""
        weights = [self.embedding, self.head, *(w for layer in self.layers for w in layer.weights)]
        return n == 1 and all(isinstance(weight, Tensor) for weight in weights)


@dataclass(frozen=True)
class Rows:
    """The buffers of a step for a number of sequences, always at the same addresses.

    Attributes:
        ids: (B,) the tokens.
        lengths: (B,) tokens of each sequence before the step, negative for unused ones; the step
            increments them.
        hidden: (B, D) after the last norm, in the model's dtype.
        logits: (B, V), float32 for one sequence of a dense model, else in the model's dtype.
        h: (B, D) float32, the residual stream.
        query, attended, gated: (B, H * C), the same, (B, F).
        partial, peak, total: of the parts of attention, float32; see `kernels.attend`.
    """

    ids: Tensor
    lengths: Tensor
    hidden: Tensor
    logits: Tensor
    h: Tensor
    query: Tensor
    attended: Tensor
    gated: Tensor
    partial: Tensor
    peak: Tensor
    total: Tensor

    @classmethod
    def of(cls, model: Model, n: int) -> "Rows":
        config, wide = model.config, torch.float32
        parts = support.power_of_two(max(1, PROGRAMS // (n * config.n_kv_heads)))
        parts, query_dim = min(MOST_PARTS, parts), config.n_heads * config.head_dim
        # In a step of one row kernels hand on what they have as they have it.
        between = wide if model.takes_one_row(n) else model.dtype

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(n, *shape, dtype=dtype, device=model.device)

        # They may be made in inference mode, and used outside of it.
        with torch.inference_mode(False):
            return cls(
                ids=zeros(dtype=torch.int64),
                lengths=zeros(dtype=torch.int64),
                hidden=zeros(config.dim, dtype=model.dtype),
                logits=zeros(config.vocab_size, dtype=between),
                h=zeros(config.dim, dtype=wide),
                query=zeros(query_dim, dtype=model.dtype),
                attended=zeros(query_dim, dtype=between),
                gated=zeros(config.hidden_dim, dtype=between),
                partial=zeros(config.n_heads, parts, config.head_dim, dtype=wide),
                peak=zeros(config.n_heads, parts, dtype=wide),
                total=zeros(config.n_heads, parts, dtype=wide),
            )


class DecodeProgram:
    """Launches every kernel of a step on the current stream.

    Args:
        model: the weights.
        places: addresses of each layer's keys, of each layer's values and of the rotations, and two
            strides of the cache, int64 on the device; see `kernels`.
        early: products start while the kernel before them still runs.
    """

    def __init__(self, model: Model, places: Tensor, *, early: bool) -> None:
        from minllama.kernels.gpu import decode_kernels as kernels

        self._model, self._config, self._places = model, model.config, places
        self._kernels, self._early = kernels, early

    def __call__(self, rows: Rows) -> None:
        config, n = self._config, len(rows.ids)
        if isinstance(self._model.embedding, Tensor):
            self._launch(
                "embed",
                (n,),
                *(rows.ids, self._model.embedding, rows.h, config.vocab_size),
                D=config.dim,
                BLOCK=support.power_of_two(config.dim),
            )
        else:
            rows.h.copy_(self._model.embedding.rows(rows.ids))
        if self._model.takes_one_row(n):
            self._one_row(rows)
        else:
            self._several_rows(rows)
        rows.lengths.add_(1)

    def _launch(self, name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """A kernel by name."""
        if self._early and name in STREAMING:
            # An option of NVIDIA's compiler, which others and the interpreter do not know.
            constants["launch_pdl"] = True
        getattr(self._kernels, name)[grid](*arguments, **constants, EARLY=self._early)

    def _attend(self, rows: Rows, layer: int, query: Tensor) -> None:
        config, n, parts = self._config, len(rows.ids), rows.peak.shape[-1]
        width = max(16, support.power_of_two(config.head_dim))
        self._launch(
            "attend",
            (n, config.n_kv_heads, parts),
            query,
            rows.attended if parts == 1 else rows.partial,
            rows.peak,
            rows.total,
            self._places,
            rows.lengths,
            layer,
            config.head_dim**-0.5,
            **self._heads(),
            SPLITS=parts,
            SLOTS=max(16, min(SLOTS, MOST_BYTES // (width * query.element_size()))),
            GROUP=max(16, support.power_of_two(config.n_heads // config.n_kv_heads)),
            BLOCK=width,
            PRECISION="ieee" if self._model.dtype == torch.float32 else "tf32",
        )
        if parts > 1:
            self._launch(
                "combine",
                (n * config.n_heads,),
                rows.partial,
                rows.peak,
                rows.total,
                rows.attended,
                C=config.head_dim,
                SPLITS=parts,
                BLOCK=support.power_of_two(config.head_dim),
            )

    def _heads(self) -> dict[str, int]:
        config = self._config
        return {
            "H": config.n_heads,
            "K": config.n_kv_heads,
            "C": config.head_dim,
            "LAYERS": config.n_layers,
        }

    def _one_row(self, rows: Rows) -> None:
        for number, layer in enumerate(self._model.layers):
            weights = layer.dense()
            self._project_query_key_value(rows, number)
            self._attend(rows, number, rows.query)
            self._add_product(rows.attended, weights[3], layer.biases[3], rows.h)
            self._gate(rows, layer)
            self._add_product(rows.gated, weights[5], layer.biases[5], rows.h)
        self._project_vocabulary(rows)

    def _project_query_key_value(self, rows: Rows, number: int) -> None:
        config, layer = self._config, self._model.layers[number]
        query, key, value = layer.dense()[:3]
        b_query, b_key, b_value = layer.biases[:3]
        n_rows = _rows(config.head_dim, config.dim)
        self._launch(
            "project_query_key_value",
            ((len(query) + 2 * len(key)) // n_rows,),
            rows.h,
            layer.attention_norm,
            *(query, key, value),
            *_biases(query, b_query, b_key, b_value),
            rows.query,
            self._places,
            rows.lengths,
            number,
            config.norm_eps,
            **self._of_dim(),
            **self._heads(),
            ROWS=n_rows,
            BIAS=b_query is not None,
            num_warps=_warps(config.dim),
        )

    def _gate(self, rows: Rows, layer: Layer) -> None:
        config, (w1, _, w3) = self._config, layer.dense()[4:]
        b1, b3 = layer.biases[4], layer.biases[6]
        n_rows = max(1, _rows(len(w1), config.dim) // 2)  # of each of two matrices
        self._launch(
            "gate",
            (len(w1) // n_rows,),
            rows.h,
            layer.ffn_norm,
            *(w1, w3),
            *_biases(w1, b1, b3),
            rows.gated,
            config.norm_eps,
            **self._of_dim(),
            ROWS=n_rows,
            BIAS=b1 is not None,
            num_warps=_warps(config.dim),
        )

    def _project_vocabulary(self, rows: Rows) -> None:
        config, h = self._config, rows.h
        self._launch(
            "add_and_normalize",
            (1,),
            h,
            h,
            self._model.norm,
            rows.hidden,
            config.norm_eps,
            D=config.dim,
            BLOCK=support.power_of_two(config.dim),
            ADD=False,
        )
        n_rows = _rows(config.vocab_size, config.dim)
        self._launch(
            "project_vocabulary",
            (config.vocab_size // n_rows,),
            *(h, self._model.norm, self._model.head, rows.logits, config.norm_eps),
            **self._of_dim(),
            ROWS=n_rows,
            num_warps=_warps(config.dim),
        )

    def _of_dim(self) -> dict[str, int]:
        return {"D": self._config.dim, "BLOCK": _columns(self._config.dim)}

    def _add_product(self, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor) -> None:
        out, n = weight.shape
        n_rows = _rows(out, n)
        self._launch(
            "add_product",
            (out // n_rows,),
            x,
            weight,
            *_biases(weight, bias),
            h,
            N=n,
            ROWS=n_rows,
            BLOCK=_columns(n),
            BIAS=bias is not None,
            num_warps=_warps(n),
        )

    def _several_rows(self, rows: Rows) -> None:
        config, n = self._config, len(rows.ids)
        h, eps = rows.h, config.norm_eps
        heads = config.n_heads + 2 * config.n_kv_heads

        def normalize(gain: Tensor, x: Tensor | None) -> Tensor:
            self._launch(
                "add_and_normalize",
                (n,),
                h,
                h if x is None else x,
                gain,
                rows.hidden,
                eps,
                D=config.dim,
                BLOCK=support.power_of_two(config.dim),
                ADD=x is not None,
            )
            return rows.hidden

        x: Tensor | None = None
        for number, layer in enumerate(self._model.layers):
            product = [
                functools.partial(_product, weight, bias)
                for weight, bias in zip(layer.weights, layer.biases, strict=True)
            ]
            normal = normalize(layer.attention_norm, x)
            query = product[0](normal)
            self._launch(
                "rope_and_cache",
                (n, heads),
                query,
                product[1](normal),
                product[2](normal),
                self._places,
                rows.lengths,
                number,
                **self._heads(),
                BLOCK=support.power_of_two(config.head_dim),
            )
            self._attend(rows, number, query)
            normal = normalize(layer.ffn_norm, product[3](rows.attended))
            total = n * config.hidden_dim
            self._launch(
                "swiglu",
                (-(-total // 1024),),
                product[4](normal),
                product[6](normal),
                rows.gated,
                total,
                BLOCK=1024,
            )
            x = product[5](rows.gated)
        rows.logits.copy_(_product(self._model.head, None, normalize(self._model.norm, x)))


def _product(weight: Weight, bias: Tensor | None, x: Tensor) -> Tensor:
    """W x + b for several sequences: (B, in) -> (B, out)."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    y = launch.quantized_matmul(weight, x)
    return y if bias is None else y + bias


def _biases(stand_in: Tensor, *biases: Tensor | None) -> Sequence[Tensor]:
    """A placeholder that the kernel does not read if there is no bias."""
    return [stand_in if bias is None else bias for bias in biases]


def _columns(n: int) -> int:
    """Columns of a weight that a program reads at once."""
    return min(MOST_COLUMNS, support.power_of_two(n))


def _rows(height: int, width: int) -> int:
    """Rows of a weight per program: a power of two that divides its height."""
    columns = _columns(width)
    most = max(4 if columns >= WIDE else 2, TILE // columns)
    return min(most, height & -height)


def _warps(width: int) -> int:
    """Warps per program, for one sequence."""
    return 8 if _columns(width) >= WIDE else 4
