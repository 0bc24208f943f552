"""A sample of a tensor's values: fast to read, and enough to tell one model from another.

Of a whole tensor and of one that is read by rows it is the same. Runs that are resumed are compared
by it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

N_VALUES = 16  # at least, where a tensor has as many


def sample_of(tensor: Tensor) -> bytes:
    """Every n-th value in float32, as bytes."""
    flat = tensor.detach().flatten()
    return flat[:: _step(len(flat))].float().cpu().numpy().tobytes()


def sample_by_rows(
    read: Callable[[int, int], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> bytes:
    """`sample_of` of a tensor of which no more is read than the rows of the sample.

    Args:
        read: returns rows [start, stop).
        shape: of the tensor.
        dtype: that it is converted to when it is loaded.
    """
    n, width = math.prod(shape), math.prod(shape[1:])
    values = []
    for index in range(0, n, _step(n)):
        row, column = divmod(index, width)
        values.append(read(row, row + 1).flatten()[column : column + 1].to(dtype).float())
    return torch.cat(values).cpu().numpy().tobytes() if values else b""


def _step(n: int) -> int:
    return max(1, n // N_VALUES)
