"""What launching kernels on a GPU needs: the device, sizes, and a log message if it fails."""

import contextlib
import logging
from typing import Any

import torch

logger = logging.getLogger("minllama")
OLDEST = (8, 0)  # compute capability: Ampere, the first with bfloat16


def warn(what: str, error: Exception) -> None:
    """Log that something will be slower, and why; nobody needs to act."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    logger.warning("%s, which is slower: %s", what, reason)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not less, as Triton's block sizes must be."""
    return 1 << (n - 1).bit_length()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which kernels launch on this device: Triton uses the current one."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)
