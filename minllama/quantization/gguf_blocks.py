"""Decode ggml's block formats: raw bytes to (quants, scales, mins) to float32; encode Q8_0.

A block is a run of values along a row that share a scale: value = scale * quant + min. Q4_0, Q4_1
and Q8_0 are decoded here, vectorized; other formats go through the `gguf` package, which is the
reference for all of them.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Blocks that are unpacked at a time: intermediate results then stay in the cache.
CHUNK_BLOCKS = 65536


@dataclass(frozen=True)
class GGMLType:
    """One of ggml's storage formats.

    Attributes:
        id: its number in files.
        name: `Q4_1`.
        block_len: values per block, all of one row.
        block_bytes: bytes per block.
    """

    id: int
    name: str
    block_len: int
    block_bytes: int

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """The size in bytes of a tensor of that shape, whose rows are complete blocks."""
        return math.prod(shape) // self.block_len * self.block_bytes

    @property
    def words(self) -> str:
        """The type for display: torch's name if it has one, such as `float16`, else ggml's."""
        return str(DTYPES[self]).removeprefix("torch.") if self in DTYPES else self.name


F32 = GGMLType(0, "F32", 1, 4)
F16 = GGMLType(1, "F16", 1, 2)
Q4_0 = GGMLType(2, "Q4_0", 32, 2 + 16)
Q4_1 = GGMLType(3, "Q4_1", 32, 2 + 2 + 16)
Q8_0 = GGMLType(8, "Q8_0", 32, 2 + 32)
Q4_K = GGMLType(12, "Q4_K", 256, 2 + 2 + 12 + 128)
Q5_K = GGMLType(13, "Q5_K", 256, 2 + 2 + 12 + 32 + 128)
BF16 = GGMLType(30, "BF16", 1, 2)

# Kept as they are: views of the file, in their own dtype.
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_COMMON = {stored.id: stored for stored in (F32, F16, Q4_0, Q4_1, Q8_0, BF16)}


@dataclass(frozen=True)
class Blocks:
    """n dequantized blocks: value[i, j] = scales[i] * quants[i, j] + mins[i].

    Attributes:
        quants: (n, block_len), int8 or uint8.
        scales: (n, 1), float16.
        mins: (n, 1), float16; `None` if the format has none.
    """

    quants: Tensor
    scales: Tensor
    mins: Tensor | None


@functools.cache
def ggml_type(type_id: int) -> GGMLType | None:
    """The type with that id; `None` if the `gguf` package has none."""
    if type_id in _COMMON:
        return _COMMON[type_id]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # slow to import, seldom needed

    try:
        quantization = GGMLQuantizationType(type_id)
    except ValueError:
        return None
    return GGMLType(type_id, quantization.name, *GGML_QUANT_SIZES[quantization])


@functools.cache
def can_dequantize(stored: GGMLType) -> bool:
    """Whether tensors of this type can be dequantized."""
    if stored.id in _COMMON:
        return True
    try:
        _dequantize_with_gguf(torch.zeros(1, stored.block_bytes, dtype=torch.uint8), stored)
    except NotImplementedError:
        return False
    return True


def decode_blocks(raw: Tensor, stored: GGMLType) -> Blocks:
    """Unpack blocks.

    Args:
        raw: (n, block_bytes) uint8, blocks as stored in the file.
        stored: Q4_0, Q4_1 or Q8_0.
    """
    assert stored in (Q4_0, Q4_1, Q8_0)
    scales = _as_float16(raw[:, 0:2])
    if stored == Q8_0:
        return Blocks(raw[:, 2:].view(torch.int8), scales, None)
    nibbles = raw[:, -16:]
    # The low nibbles are the block's first 16 values, the high nibbles its last 16.
    quants = torch.cat([nibbles & 15, nibbles >> 4], dim=1)
    if stored == Q4_1:
        return Blocks(quants, scales, _as_float16(raw[:, 2:4]))
    return Blocks(quants.view(torch.int8) - 8, scales, None)


def decode_super_blocks(raw: Tensor, stored: GGMLType) -> Blocks:
    """Unpack super-blocks into their eight blocks each.

    A block's scale and min are 6-bit integers times factors of the super-block. Here these products
    are rounded to float16, so values differ from `dequantize`'s by up to 1/2048 of their block's
    scale times quant, and of its min.

    Args:
        raw: (n, block_bytes) uint8, super-blocks as stored in the file.
        stored: Q4_K or Q5_K.

    Returns:
        8 n blocks of 32 values.
    """
    assert stored in (Q4_K, Q5_K)
    factors = raw[:, :4].contiguous().view(torch.float16).float()  # (n, 2)
    # Six bits of the first four scales, of the first four mins, and four of the others: scales low,
    # mins high. The missing two bits are the top bits of the first ones.
    scales, mins, others = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = torch.cat([scales & 63, (others & 15) | (scales >> 6 << 4)], dim=1)  # (n, 8)
    mins = torch.cat([mins & 63, (others >> 4) | (mins >> 6 << 4)], dim=1)
    # A byte has a value of one block in its low half, and one of the next in its high half.
    packed = raw[:, -128:].unflatten(1, (4, 1, 32))
    quants = torch.cat([packed & 15, packed >> 4], dim=2)  # (n, 4, 2, 32)
    if stored == Q5_K:  # bit b of byte i is the fifth one of value i of block b
        of_block = torch.arange(8, dtype=torch.uint8).view(1, 4, 2, 1)
        quants = quants | (raw[:, 16:48].unflatten(1, (1, 1, 32)) >> of_block & 1) << 4
    return Blocks(
        quants.reshape(-1, 32),
        (factors[:, :1] * scales).half().view(-1, 1),
        (-factors[:, 1:] * mins).half().view(-1, 1),
    )


def dequantize(raw: Tensor, stored: GGMLType, shape: tuple[int, ...]) -> Tensor:
    """The values of one tensor: float32 from quantized blocks, else a view in the stored dtype.

    Equals `gguf.quants.dequantize` bit for bit.

    Args:
        raw: (n_bytes,) uint8, the tensor's bytes.
        stored: their type.
        shape: of the result.
    """
    if stored in DTYPES:
        return view_as(raw, DTYPES[stored]).view(shape)
    raw = raw.view(-1, stored.block_bytes)
    if stored.id not in _COMMON:
        return _dequantize_with_gguf(raw, stored).view(shape)
    values = torch.empty(len(raw), stored.block_len, dtype=torch.float32)
    for start in range(0, len(raw), CHUNK_BLOCKS):
        blocks = decode_blocks(raw[start : start + CHUNK_BLOCKS], stored)
        chunk = values[start : start + CHUNK_BLOCKS]
        torch.mul(blocks.quants, blocks.scales.float(), out=chunk)
        if blocks.mins is not None:
            chunk += blocks.mins.float()
    return values.view(shape)


def quantize_q8_0(values: Tensor) -> Tensor:
    """Q8_0 blocks of a tensor; equals `gguf.quants.quantize` bit for bit.

    Args:
        values: (..., n) float32 with n a multiple of 32.

    Returns:
        (..., n / 32 * 34) uint8.
    """
    blocks = values.reshape(-1, Q8_0.block_len)
    raw = torch.empty(len(blocks), Q8_0.block_bytes, dtype=torch.uint8)
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        chunk = blocks[start : start + CHUNK_BLOCKS]
        scales = chunk.abs().amax(dim=1, keepdim=True) / 127
        scaled = chunk * torch.where(scales == 0, 0.0, 1 / scales)
        # Ties round away from zero, as in C's roundf; torch.round rounds them to even.
        size = scaled.abs()
        whole = size.floor()
        rounded = (whole + (2 * (size - whole)).floor()).copysign(scaled)
        rows = raw[start : start + CHUNK_BLOCKS]
        rows[:, :2] = scales.half().view(torch.uint8)
        rows[:, 2:] = rounded.to(torch.int8).view(torch.uint8)
    return raw.view(*values.shape[:-1], -1)


def view_as(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (n,) as values of `dtype`, without a copy if their alignment allows."""
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)


def _as_float16(raw: Tensor) -> Tensor:
    """(n, 2) bytes -> (n, 1) float16."""
    return raw.contiguous().view(torch.float16)


def _dequantize_with_gguf(raw: Tensor, stored: GGMLType) -> Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as reference

    # Of damaged scales, infinity times zero: what is not finite, the loader reports.
    with np.errstate(all="ignore"):
        return torch.from_numpy(reference(raw.numpy(), GGMLQuantizationType(stored.id)))
