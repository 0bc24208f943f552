"""Matmuls with weights quantized to 8 and 4 bits, and dequantization.

A weight has the layout of `minllama.quantization.modules.QuantizedWeight`: tiles of 16 rows, so
that neighboring programs read neighboring words.
"""

import triton
import triton.language as tl


@triton.jit
def _levels(words, number: tl.constexpr, BITS: tl.constexpr):
    """Column `number` of each word of a tile, as float32.

    In 8 bits a word has four columns in order; in 4 bits the low halves of its bytes, then the high
    ones.
    """
    shift: tl.constexpr = 8 * number if BITS == 8 else 8 * (number % 4) + 4 * (number // 4)
    mask: tl.constexpr = 255 if BITS == 8 else 15
    return ((words >> shift) & mask).to(tl.float32)


@triton.jit
def _scale_and_min(scales, mins, at, inside, BITS: tl.constexpr, MINS: tl.constexpr):
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    if MINS:
        low = tl.load(mins + at, mask=inside, other=0.0).to(tl.float32)
    else:
        low = scale * (-128.0 if BITS == 8 else -8.0)
    return scale, low


@triton.jit
def block_matmul(
    quants,
    scales,
    mins,
    x,
    y,
    n_out,
    BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BITS: tl.constexpr,
    MINS: tl.constexpr,
):
    """Multiply a tile's 16 rows with each row of x: (rows, 32 BLOCKS) -> (rows, n_out).

    Args:
        quants: (tiles, BLOCKS, 32 / columns of a word, 16) int32, as in `QuantizedWeight`.
        scales, mins: (tiles, BLOCKS, 16) float16; mins are not read unless MINS.
        AT_ONCE: blocks per iteration.
    """
    columns: tl.constexpr = 4 if BITS == 8 else 8  # of a word
    words: tl.constexpr = 32 // columns  # of a block's row
    tile, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_tile = tl.arange(0, 16)
    found = tl.zeros((16,), tl.float32)
    for start in tl.range(0, BLOCKS, AT_ONCE):  # unrolled, it would compile for minutes
        blocks = start + tl.arange(0, AT_ONCE)
        pieces = start * words + tl.arange(0, AT_ONCE * words)
        there = pieces < BLOCKS * words
        at = (tile * BLOCKS * words + pieces)[:, None] * 16 + of_tile[None, :]
        packed = tl.load(quants + at, mask=there[:, None], other=0)
        at = (tile * BLOCKS + blocks)[:, None] * 16 + of_tile[None, :]
        scale, low = _scale_and_min(scales, mins, at, (blocks < BLOCKS)[:, None], BITS, MINS)
        sums = tl.zeros((AT_ONCE * words, 16), tl.float32)
        total = tl.zeros((AT_ONCE * words,), tl.float32)
        for number in tl.static_range(0, columns):
            where = x + row * BLOCKS * 32 + pieces * columns + number
            value = tl.load(where, mask=there, other=0.0).to(tl.float32)
            sums += _levels(packed, number, BITS) * value[:, None]
            total += value
        of_block = tl.sum(tl.reshape(sums, (AT_ONCE, words, 16)), axis=1)
        total = tl.sum(tl.reshape(total, (AT_ONCE, words)), axis=1)
        found += tl.sum(of_block * scale + low * total[:, None], axis=0)
    out = tile * 16 + of_tile
    tl.store(y + row * n_out + out, found.to(y.dtype.element_ty), mask=out < n_out)


@triton.jit
def dequantize(
    quants,
    scales,
    mins,
    y,
    n_out,
    BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BITS: tl.constexpr,
    MINS: tl.constexpr,
):
    """Dequantize some blocks of a tile's 16 rows: y is (n_out, 32 BLOCKS)."""
    columns: tl.constexpr = 4 if BITS == 8 else 8
    words: tl.constexpr = 32 // columns
    tile = tl.program_id(0).to(tl.int64)
    pieces = tl.program_id(1) * AT_ONCE * words + tl.arange(0, AT_ONCE * words)
    of_tile = tl.arange(0, 16)
    out = tile * 16 + of_tile
    there = pieces[:, None] < BLOCKS * words
    at = (tile * BLOCKS * words + pieces)[:, None] * 16 + of_tile[None, :]
    packed = tl.load(quants + at, mask=there, other=0)
    at = (tile * BLOCKS + pieces // words)[:, None] * 16 + of_tile[None, :]
    scale, low = _scale_and_min(scales, mins, at, there, BITS, MINS)
    inside = there & (out[None, :] < n_out)
    where = y + out[None, :] * (BLOCKS * 32) + pieces[:, None] * columns
    for number in tl.static_range(0, columns):
        value = _levels(packed, number, BITS) * scale + low
        tl.store(where + number, value.to(y.dtype.element_ty), mask=inside)
