"""Quantized weights as kernels read them; `minllama.quantization` makes them."""

from typing import Protocol

import torch
from torch import Tensor


class QuantizedMatrix(Protocol):
    """A matrix (out, in) in tiles of 16 rows and blocks of 32 columns, each with a scale.

    Attributes:
        bits: of a quant, 4 or 8.
        in_features, out_features: columns and rows, without the padding of the last tile.
        quants: (out / 16, in / 32, 4 or 8, 16, 4) uint8.
        scales: (out / 16, in / 32, 16) float16.
        mins: likewise, or None.
        activation_bits: of the integers that compiled code multiplies them with, 16 or 8.
    """

    bits: int
    in_features: int
    out_features: int
    quants: Tensor
    scales: Tensor
    mins: Tensor | None
    activation_bits: int

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some of its rows, dequantized: (...) integers in [0, out) -> (..., in)."""
