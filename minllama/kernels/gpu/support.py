"""Kernels for GPUs, in Triton: what a decode step goes through, and what stands between products.

`walk` strings those of a step together, `minllama.engine.cuda_graph` runs it; `operations` has
those that whole texts go through. Triton comes with torch's CUDA builds. It is imported when
something is first computed on a GPU, and compiles each kernel when it is first used, for which it
needs a C compiler; elsewhere, and without, the plain equations of `minllama.model.llama` are
computed.
"""

import contextlib
import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

OLDEST = (8, 0)  # compute capability: Ampere, the first with bfloat16


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernels run on a device; where they might but do not, a warning says why."""
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
        warn("this GPU computes without kernels of its own", error)
        return False
    return True


def warn(what: str, error: Exception) -> None:
    """Say once what is slower from now on, and why."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(f"{what}, which is slower: {reason}", RuntimeWarning, stacklevel=3)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less: what Triton's blocks are."""
    return 1 << (n - 1).bit_length()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where kernels are launched on this device: Triton takes the current one."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def serves(x: Tensor) -> bool:
    """Whether the operations below take this tensor: they have no gradients."""
    return x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad) and works(x.device)


def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """SiLU(u) * v, in u's dtype: (..., F) -> (..., F)."""
    from minllama.kernels.gpu import ops

    with on(u.device):
        return ops.swiglu(u, v)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs of channels turned: (B, T, H, C), complex64 ([B or 1,] T, 1, C / 2) -> (B, T, H, C)."""
    from minllama.kernels.gpu import ops

    with on(x.device):
        return ops.rotate(x, rotation)


def product(weight: Any, x: Tensor) -> Tensor:
    """Give x W^T with a weight in blocks: (..., in) -> (..., out), in x's dtype."""
    from minllama.kernels.gpu import ops

    with on(x.device):
        return ops.product(weight, x)


def take_apart(weight: Any, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) of a weight in blocks."""
    from minllama.kernels.gpu import ops

    with on(weight.scales.device):
        return ops.take_apart(weight, dtype)
