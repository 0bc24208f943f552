"""Register GPU implementations of the model's operations, where Triton works; no gradients.

Triton comes with torch's CUDA builds. It is imported at the first operation on a GPU and compiles
each kernel on first use, for which it needs a C compiler; otherwise the plain equations of the
model are used.
"""

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minllama.kernels.dispatch import register
from minllama.kernels.gpu.support import OLDEST, on, warn
from minllama.kernels.quantized_matrix import QuantizedMatrix


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernels work on a device; logs why if they should but do not."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    is_old = torch.cuda.get_device_capability(device) < OLDEST
    if is_old or importlib.util.find_spec("triton") is None:
        return False
    try:
        one = torch.ones(1, device=device)
        swiglu(one, one)
    except torch.OutOfMemoryError:
        raise  # which may pass
    except Exception as error:  # of a compiler, a driver or a library, each with its own classes
        warn("not using GPU kernels", error)
        return False
    return True


def serves(x: Tensor) -> bool:
    """Whether the operations below support this tensor: they have no gradients."""
    return x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad) and works(x.device)


def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """SiLU(u) * v, in u's dtype: (..., F) -> (..., F)."""
    with on(u.device):
        y: Tensor = _operations().swiglu(u, v)
        return y


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of channels: (B, T, H, C), complex64 ([B or 1,] T, 1, C / 2) -> (B, T, H, C)."""
    with on(x.device):
        y: Tensor = _operations().rotate(x, rotation)
        return y


def quantized_matmul(weight: QuantizedMatrix, x: Tensor) -> Tensor:
    """Compute x W^T with a quantized weight: (..., in) -> (..., out), in x's dtype."""
    with on(x.device):
        y: Tensor = _operations().quantized_matmul(weight, x)
        return y


def dequantize(weight: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """Dequantize a weight to a matrix (out, in)."""
    with on(weight.scales.device):
        y: Tensor = _operations().dequantize(weight, dtype)
        return y


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in one kernel of torch; autocast would leave it in float32."""
    return F.rms_norm(x, weight.shape, weight, eps).type_as(x)


def _operations() -> Any:
    from minllama.kernels.gpu import ops  # which needs Triton

    return ops


register("rms_norm", lambda x, weight, eps: x.is_cuda and x.dtype == weight.dtype, _rms_norm)
register("swiglu", lambda u, v: serves(u) and serves(v), swiglu)
register("apply_rotary_embedding", lambda x, rotation: serves(x), rotate)
