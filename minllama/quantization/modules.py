"""Weights quantized to 8 and 4 bits: integers with a scale for each 32 values of a row.

Made from any weight, or directly from GGUF's blocks: Q4_0, Q4_1 and Q8_0 keep their values bit for
bit, Q4_K and Q5_K except for the last bits of their scales. `minllama.kernels` has the fast
matmuls.

value = scale * quant + min, where quant is unsigned (Dettmers et al. 2022 and ggml call it
block-wise or group-wise quantization). Without mins, min = -8 * scale in 4 bits and -128 * scale in
8 bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minllama.errors import MinllamaError, OptionError
from minllama.kernels.cpu import ops
from minllama.kernels.cpu.linear import matmul as linear_matmul
from minllama.kernels.gpu import launch as gpu
from minllama.model.llama import Embedding, Linear
from minllama.options import ACTIVATIONS, QUANTIZE
from minllama.quantization.gguf_blocks import (
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_K,
    Q8_0,
    GGMLType,
    decode_blocks,
    decode_super_blocks,
)
from minllama.quantization.half import UpcastEmbedding, UpcastLinear

BLOCK = 32  # columns that share a scale
TILE_ROWS = 16  # rows that are stored together, as vector instructions read them
ZERO_POINT = {4: 8, 8: 128}
# Below, scales are subnormal in float16, and too imprecise.
SMALLEST = 2.0**-10
BITS = {Q4_0: 4, Q4_1: 4, Q4_K: 4, Q5_K: 8, Q8_0: 8}  # in which a file's blocks are stored
SLICE = 4096  # rows that are quantized at a time: intermediate results are five times as large


class QuantizedWeight(nn.Module):
    """A matrix (out, in), quantized in blocks of 32 columns.

    Rows are stored in tiles of 16, the last one padded, so that one vector instruction reads the
    same four columns of 16 rows. Byte [p, b, i, r, j] of `quants` has column 32 b + 4 i + j of row
    16 p + r in 8 bits (i < 8); in 4 bits (i < 4) its low half has column 32 b + 8 i + j, and its
    high half the one four columns later.

    Args:
        quants: (out / 16, in / 32, 4 or 8, 16, 4) uint8.
        scales: (out / 16, in / 32, 16) float16.
        mins: likewise, or None.
        out_features: rows, without the padding of the last tile.

    Attributes:
        activation_bits: of the integers that compiled code multiplies them with; see
            `set_activations`.
    """

    quants: Tensor
    scales: Tensor
    mins: Tensor | None

    def __init__(
        self, quants: Tensor, scales: Tensor, mins: Tensor | None, out_features: int
    ) -> None:
        super().__init__()
        self.bits = 8 if quants.shape[2] == 8 else 4
        self.activation_bits = 16
        self.out_features, self.in_features = out_features, quants.shape[1] * BLOCK
        self.register_buffer("quants", quants)
        self.register_buffer("scales", scales)
        self.register_buffer("mins", mins)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix: (out, in)."""
        return self._rows(self.quants, self.scales, self.mins, dtype)[: self.out_features]

    def transposed(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix transposed for a matmul of many rows: (in, out)."""
        if ops.serves(self.scales) and dtype in ops.DTYPES:
            return ops.dequantize_transposed(self, dtype)
        if gpu.works(self.scales.device):
            return gpu.dequantize(self, dtype).t()
        return self.dequantize(dtype).t()

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some of its rows: (...) integers in [0, out) -> (..., in)."""
        tiles, of_tile = (ids // TILE_ROWS).flatten(), (ids % TILE_ROWS).flatten()
        quants = self.quants[tiles, :, :, of_tile].unsqueeze(3)  # (n, in / 32, 4 or 8, 1, 4)
        scales = self.scales[tiles, :, of_tile].unsqueeze(-1)
        mins = None if self.mins is None else self.mins[tiles, :, of_tile].unsqueeze(-1)
        return self._rows(quants, scales, mins, dtype).view(*ids.shape, self.in_features)

    def matmul(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype; gradients flow to x."""
        y: Tensor = _Matmul.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def is_made_of(self, parts: "Parts | None") -> bool:
        """Whether it has these parts, bit for bit."""
        if parts is None or (parts.mins is None) != (self.mins is None):
            return False
        ours = Parts(self.quants, self.scales, self.mins, self.out_features)
        pairs = zip(ours, parts.to(self.quants.device), strict=True)
        return all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in pairs
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `model.to(bfloat16)` sets the dtype of computation; what is stored stays.
        stored = self.scales, self.mins
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.quants.device
        self.scales = stored[0].to(device)
        self.mins = None if stored[1] is None else stored[1].to(device)
        return self

    def _rows(
        self, quants: Tensor, scales: Tensor, mins: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """(p, b, i, r, j), (p, b, r) and (p, b, r) -> (p * r, b * 32)."""
        if self.bits == 4:
            quants = torch.stack((quants & 15, quants >> 4), dim=3)  # (p, b, i, 2, r, j)
            quants = quants.permute(0, 4, 1, 2, 3, 5)
        else:
            quants = quants.permute(0, 3, 1, 2, 4)
        p, r, b = quants.shape[:3]
        values = quants.reshape(p, r, b, BLOCK).float()
        wide = scales.float().transpose(1, 2).unsqueeze(-1)  # (p, r, b, 1)
        low = -ZERO_POINT[self.bits] * wide
        if mins is not None:
            low = mins.float().transpose(1, 2).unsqueeze(-1)
        return values.mul_(wide).add_(low).to(dtype).view(p * r, b * BLOCK)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits"


class _Matmul(torch.autograd.Function):
    """x W^T; the weight is dequantized again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        rows = x.numel() // weight.in_features
        if ops.has_half_matmul(x, weight.in_features, is_quantized=True):
            return ops.half_matmul(weight, x)
        if ops.serves(x) and rows <= ops.most_rows(x.dtype):
            return ops.quantized_matmul(weight, x).to(x.dtype)
        if gpu.serves(x):
            return gpu.quantized_matmul(weight, x)
        return linear_matmul(x, weight.transposed(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return linear_matmul(gradient, ctx.weight.transposed(gradient.dtype).t()), None


class QuantizedLinear(QuantizedWeight):
    """y = W x + b (`nn.Linear`) with a quantized W that is not trained."""

    def __init__(
        self,
        quants: Tensor,
        scales: Tensor,
        mins: Tensor | None,
        out_features: int,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(quants, scales, mins, out_features)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantizedEmbedding(QuantizedWeight):
    """Rows of a quantized matrix by index (`nn.Embedding`).

    Attributes:
        dtype: of the result; it follows the model's.
    """

    def __init__(
        self,
        quants: Tensor,
        scales: Tensor,
        mins: Tensor | None,
        out_features: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(quants, scales, mins, out_features)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., in)."""
        # Rows are in tiles, whose indices would wrap around and reach into padding. Elsewhere
        # than on a CPU, checking ids would wait for them.
        if ids.is_cpu and ids.numel():
            check_ids(ids, self.out_features)
        return self.rows(ids, self.dtype)

    def as_linear(self, x: Tensor) -> Tensor:
        """X W^T: (..., in) -> (..., out)."""
        return self.matmul(x)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.quants.device)).dtype
        return super()._apply(fn, recurse)


def check_ids(ids: Tensor, n: int) -> None:
    """Refuse ids outside 0 to n - 1; there must be at least one id."""
    if ids.min() < 0 or ids.max() >= n:
        raise MinllamaError(f"token ids must be from 0 to {n - 1}")


def rows_of(module: nn.Module, ids: Tensor) -> Tensor:
    """Rows of the matrix of a linear layer or an embedding: (...) -> (..., in)."""
    if isinstance(module, QuantizedWeight):
        return module.rows(ids)
    assert isinstance(module.weight, Tensor)
    return module.weight[ids]


AnyLinear = nn.Linear | QuantizedLinear


def dense_weight(module: AnyLinear) -> Tensor:
    """The weight of a linear layer to compute with: (out, in), float32, detached."""
    if isinstance(module, QuantizedLinear):
        return module.dequantize()
    return module.weight.detach().float()


def stored_tensor(module: AnyLinear) -> Tensor:
    """The weight of a linear layer: a matrix, or the integers of its quantized blocks."""
    return module.quants if isinstance(module, QuantizedLinear) else module.weight


def check_trainable(module: AnyLinear) -> None:
    """Refuse a weight that an adapter cannot be merged into.

    Raises:
        MinllamaError: it is quantized.
    """
    if isinstance(module, QuantizedLinear):
        raise MinllamaError(
            "merging an adapter into quantized weights would round them again; load the model "
            "without quantize, then load the adapter and merge it"
        )


class Parts(NamedTuple):
    """The constructor arguments of a `QuantizedWeight`, in order."""

    quants: Tensor
    scales: Tensor
    mins: Tensor | None
    out_features: int

    def to(self, device: torch.device) -> "Parts":
        mins = None if self.mins is None else self.mins.to(device)
        return Parts(self.quants.to(device), self.scales.to(device), mins, self.out_features)


def replace_by_quantized(model: nn.Module, name: str, parts: Parts, dtype: torch.dtype) -> None:
    """Replace a linear layer or embedding by a quantized module; the bias stays."""
    old = model.get_submodule(name)
    new: QuantizedWeight
    if isinstance(old, nn.Embedding):
        new = QuantizedEmbedding(*parts, dtype=dtype)
    else:
        assert isinstance(old, nn.Linear)
        new = QuantizedLinear(*parts, bias=old.bias)
    model.set_submodule(name, new)


def replace_by_dense(model: nn.Module) -> bool:
    """Replace each quantized module by a plain linear layer or embedding in float32.

    Also modules that keep half-precision weights and compute in float32. Results stay the same
    except for the rounding of activations.

    Returns:
        Whether there were any.
    """
    compact = QuantizedWeight, UpcastLinear, UpcastEmbedding
    replaced = {
        name: module for name, module in model.named_modules() if isinstance(module, compact)
    }
    for name, old in replaced.items():
        weight = (
            old.dequantize() if isinstance(old, QuantizedWeight) else old.weight.detach().float()
        )
        out_features, in_features = weight.shape
        new: nn.Linear | nn.Embedding
        if isinstance(old, QuantizedEmbedding | UpcastEmbedding):
            new = Embedding(out_features, in_features, _weight=weight)
        else:
            bias: Any = old.bias
            new = Linear(in_features, out_features, bias=bias is not None, device="meta")
            new.weight = nn.Parameter(weight)
            if bias is not None:
                new.bias = nn.Parameter(bias.detach().float())
        model.set_submodule(name, new.requires_grad_(False).train(old.training))
    if replaced:
        model.long_dtype = None  # type: ignore[assignment]  # a Llama's; dense matrices have no other
    return bool(replaced)


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """A model's quantized matrices, by the names that these had as parameters."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
    }


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The dequantized state of a quantized model, in float32; of others the unchanged state."""
    state, quantized = dict(model.state_dict()), quantized_weights(model)
    for name, weight in quantized.items():
        for part in ("quants", "scales", "mins"):
            state.pop(f"{name.removesuffix('weight')}{part}", None)
        state[name] = weight.dequantize()
    return {name: x.float() for name, x in state.items()} if quantized else state


def set_activations(model: nn.Module, activations: str) -> None:
    """Choose the integers that a model's quantized weights are multiplied with on a CPU.

    Args:
        model: with quantized weights; engines that are open keep what they have.
        activations: one of `ACTIVATIONS`: int16 is off by 2^-15 of the largest of 32 activations,
            int8 by 2^-8, for half the products or less.

    Raises:
        OptionError: there is no such form.
    """
    check_activations(activations)
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.activation_bits = int(activations.removeprefix("int"))


def check_activations(activations: str) -> None:
    """Raise OptionError for anything but one of `ACTIVATIONS`."""
    if activations not in ACTIVATIONS:
        raise OptionError(
            f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}"
        )


def check_quantize(quantize: str | None) -> None:
    """Raise OptionError for anything but None or one of `QUANTIZE`."""
    if quantize is not None and quantize not in QUANTIZE:
        raise OptionError(
            f"quantize must be one of {', '.join(QUANTIZE)}, or None, not {quantize!r}"
        )


class StoredMatrix(Protocol):
    """A matrix that is still in a file; `minllama.checkpoints.types.LazyTensor` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def load(self) -> Callable[[], Tensor]: ...

    @property
    def blocks(self) -> Callable[[], tuple[GGMLType, Tensor]] | None: ...


def quantized(name: str, tensor: StoredMatrix, weight_format: str) -> Parts | None:
    """A checkpoint's matrix quantized to 8 or 4 bits; None if it stays dense.

    A GGUF file's blocks of at most the requested bits stay unchanged. With `stored`, other types
    (such as Q6_K) are converted to 8 bits, which loses little. The vocabulary's matrices get 8 bits
    if others get 4, since rare tokens are distinguished by nothing else and rows are read
    individually. A matrix of tiny values stays dense.

    Args:
        name: its name in our model.
        tensor: (out, in).
        weight_format: `int8`, `int4`, or `stored` for GGUF's blocks only.
    """
    if len(tensor.shape) != 2 or tensor.shape[1] % BLOCK:
        return None
    bits = 4 if weight_format == "int4" and name.startswith("layers.") else 8
    if tensor.blocks is not None:
        stored, raw = tensor.blocks()
        if BITS.get(stored, 99) <= bits:
            return _from_blocks(raw, stored, tensor.shape)
    elif weight_format == "stored":
        return None
    values = tensor.load()
    low, high = (float(end) for end in values.aminmax())
    if 0 < max(high, -low) < SMALLEST:
        return None
    return quantize(values, bits)


def _from_blocks(raw: Tensor, stored: GGMLType, shape: tuple[int, ...]) -> Parts:
    raw = raw.view(-1, stored.block_bytes)
    is_super = stored in (Q4_K, Q5_K)
    if not is_super and ops.can_pack(raw):
        parts = ops.pack(raw, shape[0], BITS[stored], has_mins=stored == Q4_1)
        return Parts(*parts, shape[0])
    blocks = (decode_super_blocks if is_super else decode_blocks)(raw, stored)
    quants = blocks.quants.view(torch.uint8)
    if blocks.mins is None:  # signed: shifted to unsigned, with the intended wrap-around
        quants = quants + ZERO_POINT[BITS[stored]]
    out, n = shape[0], shape[1] // BLOCK
    mins = None if blocks.mins is None else blocks.mins.view(out, n)
    return packed(quants.view(out, n, BLOCK), blocks.scales.view(out, n), mins, BITS[stored])


def quantize(values: Tensor, bits: int) -> Parts:
    """The matrix (out, in) in blocks of 32: symmetric in 8 bits, with scale and min in 4.

    In 4 bits, the least-squares scale and min for the rounded values replace those of the largest
    and smallest value if that reduces the error.
    """
    slices = [_quantized_slice(part, bits) for part in values.detach().split(SLICE)]
    quants, scales, mins, _ = zip(*slices, strict=True)
    return Parts(
        torch.cat(quants),
        torch.cat(scales),
        None if mins[0] is None else torch.cat(mins),
        values.shape[0],
    )


def _quantized_slice(values: Tensor, bits: int) -> Parts:
    out, n = values.shape[0], values.shape[1] // BLOCK
    blocks = values.reshape(out, n, BLOCK).float()
    if bits == 8:
        scales = (blocks.abs().amax(-1) / 127).half()
        quants = _rounded(blocks, scales, -128 * scales.float(), 255)
        return packed(quants, scales, None, 8)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    first = ((high - low) / 15).half(), low.half()
    quants = _rounded(blocks, *first, 15)
    second = _least_squares(blocks, quants)
    better = _rounded(blocks, *second, 15)
    is_better = _error(blocks, better, *second) < _error(blocks, quants, *first)  # (out, n)
    scales, mins = (torch.where(is_better, b, a) for a, b in zip(first, second, strict=True))
    return packed(torch.where(is_better.unsqueeze(-1), better, quants), scales, mins, 4)


def packed(quants: Tensor, scales: Tensor, mins: Tensor | None, bits: int) -> Parts:
    """Rearrange rows of blocks into tiles.

    Args:
        quants: (out, n, 32) uint8, columns in order.
        scales: (out, n) float16.
        mins: likewise, or None.
        bits: 4 or 8.
    """
    out, n = scales.shape
    missing = -out % TILE_ROWS
    if missing:
        quants, scales = F.pad(quants, (0, 0, 0, 0, 0, missing)), F.pad(scales, (0, 0, 0, missing))
        mins = None if mins is None else F.pad(mins, (0, 0, 0, missing))
    if bits == 4:
        pairs = quants.view(-1, n, 4, 2, 4)
        quants = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4  # (out, n, 4, 4)
    quants = quants.view(-1, TILE_ROWS, n, quants.numel() // (len(quants) * n * 4), 4)
    quants = quants.permute(0, 2, 3, 1, 4).contiguous()
    by_tile = [
        None if part is None else part.view(-1, TILE_ROWS, n).transpose(1, 2).contiguous()
        for part in (scales, mins)
    ]
    assert by_tile[0] is not None
    return Parts(quants, by_tile[0], by_tile[1], out)


def _rounded(blocks: Tensor, scales: Tensor, mins: Tensor, most: int) -> Tensor:
    wide = scales.float().unsqueeze(-1)
    steps = (blocks - mins.float().unsqueeze(-1)) * torch.where(wide == 0, 0.0, 1 / wide)
    return steps.round_().clamp_(0, most).to(torch.uint8)


def _least_squares(blocks: Tensor, quants: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and min with the least squared error for given quants: simple regression."""
    q = quants.float()
    q_mean, x_mean = q.mean(-1, keepdim=True), blocks.mean(-1, keepdim=True)
    spread = (q - q_mean).square().sum(-1)
    slope = ((q - q_mean) * (blocks - x_mean)).sum(-1)
    scales = torch.where(spread == 0, 0.0, slope / spread)
    mins = x_mean.squeeze(-1) - scales * q_mean.squeeze(-1)
    return scales.half(), mins.half()


def _error(blocks: Tensor, quants: Tensor, scales: Tensor, mins: Tensor) -> Tensor:
    values = torch.addcmul(mins.float().unsqueeze(-1), quants.float(), scales.float().unsqueeze(-1))
    return (values - blocks).square_().sum(-1)
