"""What weights are loaded as: a dtype, a device, and dense or quantized, resolved in one place.

By what somebody asked for (`LoadOptions`), the file, the machine (`kernels.hardware`) and what the
model is for. Whoever opens a model asks `resolve_weight_format`, and hands on what it says.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from minllama.checkpoints.types import Checkpoint
from minllama.errors import MinllamaError, SlowDtypeWarning, warn_caller
from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import library
from minllama.kernels.hardware import (
    default_dtype,
    fast_bfloat16,
    fast_float16_on_cpu,
    usable_device,
)
from minllama.options.loading import LoadOptions
from minllama.quantization.modules import QuantizedLinear, check_quantize

# What a model is for: `generate` continues texts, `read` classifies them with weights that stay as
# they are (adapters and heads may be trained beside them), `train` changes all weights.
Purpose = Literal["generate", "read", "train"]
HALF_NAMES = {"bfloat16", "float16", "BF16", "F16"}


@dataclass(frozen=True)
class WeightFormat:
    """What weights are loaded as.

    Attributes:
        device: where they are.
        dtype: of dense weights, and of what is computed beside quantized ones.
        quantize: a word of `QUANTIZE`; None for dense weights.
        is_chosen: nobody asked for a dtype or a format, and the model is to generate: an engine may
            compute passes over many tokens in another dtype (`long_dtype`).
    """

    device: torch.device
    dtype: torch.dtype
    quantize: str | None = None
    is_chosen: bool = False


def resolve_weight_format(
    checkpoint: Checkpoint,
    options: LoadOptions,
    purpose: Purpose = "generate",
    *,
    trained_on: tuple[str, str | None] | None = None,
) -> WeightFormat:
    """What the weights of a checkpoint are to be loaded as.

    What somebody asked for is done. Weights that are trained are dense and float32, for their steps
    are such that half precision would round them away.

    Args:
        checkpoint: whose weights they are.
        options: what was asked for.
        purpose: what the model is for.
        trained_on: dtype and `quantize` of the base that a saved classifier was trained on, which
            then stand for what was not asked for, so that it gives the same numbers. But a dtype
            that this machine only emulates does not.

    Raises:
        MinllamaError: there is no such device, dtype or word here.
    """
    device = usable_device(options.device)
    dtype, quantize = options.dtype, options.quantize
    if trained_on is not None:
        is_slow = slow_dtype(trained_on[0], device) is not None
        if dtype is None and quantize is None and is_slow:
            quantize = "auto"
        elif quantize != "auto":
            dtype = dtype or (torch.float32 if is_slow else trained_on[0])
            quantize = trained_on[1] if quantize is None else quantize
    if quantize == "none" or purpose == "train":
        quantize = None
    is_auto = quantize == "auto"
    is_chosen = is_auto and dtype is None and purpose == "generate"
    if is_auto:
        quantize = None
        if dtype is None:
            fastest = _fastest_to_generate if purpose == "generate" else _fastest_to_read
            dtype, quantize = fastest(checkpoint, device)
    check_quantize(quantize)
    if dtype is None:
        dtype = _dtype_beside(quantize, device, purpose)
    return WeightFormat(device, _checked_dtype(dtype), quantize, is_chosen)


def _dtype_beside(quantize: str | None, device: torch.device, purpose: Purpose) -> torch.dtype:
    """The dtype of weights of which only that much is known."""
    if purpose == "train":
        return torch.float32
    if purpose == "read" or (quantize is not None and device.type != "cpu"):
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return torch.float32 if quantize is not None else default_dtype(device)


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise MinllamaError(
            f"dtype {dtype!r} is none that a model runs in; use float32 or bfloat16"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


def _fastest_to_generate(
    checkpoint: Checkpoint, device: torch.device
) -> tuple[torch.dtype | None, str | None]:
    """The dtype and the word of `QUANTIZE` that generate fastest here, at no loss that counts.

    On a CPU for which the package was compiled, weights run as they are stored: GGUF's blocks,
    bfloat16 where the machine is good at it, and else halves that are widened for float32
    arithmetic (`minllama.quantization.half`). Decoding computes in float32 on each.
    """
    if device.type != "cpu" or library() is None:
        return None, None
    if has_blocks(checkpoint):
        return torch.float32, "stored"
    stored = _formats_of_matrices(checkpoint)
    if stored == {"bfloat16"} and fast_bfloat16(device):
        return torch.bfloat16, None
    return (torch.float32, "stored") if stored & HALF_NAMES else (None, None)


def _fastest_to_read(
    checkpoint: Checkpoint, device: torch.device
) -> tuple[torch.dtype, str | None]:
    """The dtype and the word of `QUANTIZE` that read whole texts fastest, as classifiers do.

    Of weights that are not trained: bfloat16 where the hardware multiplies it, else GGUF's blocks
    where whole numbers are multiplied faster than float32, which takes a fifth of the memory too.
    """
    if fast_bfloat16(device):
        return torch.bfloat16, None
    is_cpu = device.type == "cpu" and library() is not None
    if is_cpu and ops.most_rows(torch.float32) == math.inf:
        return torch.float32, "stored" if has_blocks(checkpoint) else None
    return torch.float32, None


def long_dtype(model: nn.Module) -> torch.dtype | None:
    """What long passes through a quantized model on this CPU are fastest in; None for its own.

    bfloat16 where the hardware multiplies it: matrices are dequantized to it one by one. Decoding
    and short passes stay in float32, with integers. On the default model that costs 0.1% of
    perplexity and no accuracy; a fifth of the greedy tokens behind such a pass differ, as near ties
    fall otherwise (docs/benchmarks.md).
    """
    layers = getattr(model, "layers", ())
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    has_quantized = any(isinstance(m, QuantizedLinear) for m in model.modules())
    if linears or not has_quantized or library() is None or not fast_bfloat16("cpu"):
        return None
    return torch.bfloat16


def has_blocks(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has matrices in blocks, which can be computed with."""
    tensors = checkpoint.tensors.values()
    return any(tensor.blocks is not None for tensor in tensors if len(tensor.shape) == 2)


def _formats_of_matrices(checkpoint: Checkpoint) -> set[str]:
    return {tensor.stored_as for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2}


def slow_dtype(dtype: torch.dtype | str | None, device: torch.device | str | None) -> str | None:
    """What to say of a half precision that this machine only emulates; None where it is no such.

    It is not refused: weights take half the memory, and decoding reads them in half the time.
    """
    where = usable_device(device)
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    if dtype == "bfloat16" and where.type == "cuda" and not fast_bfloat16(where):
        return "this GPU only emulates bfloat16; float16 is faster"
    if where.type != "cpu":
        return None
    is_fast = {
        "bfloat16": fast_bfloat16(where),
        "float16": fast_float16_on_cpu(),
    }
    if dtype is None or is_fast.get(dtype, True):
        return None
    return f"this CPU only emulates {dtype}; float32 is faster for long passes and training"


def warn_if_slow(dtype: torch.dtype | str | None, device: torch.device | str | None) -> None:
    """Warn whoever calls minllama of a half precision that this machine only emulates."""
    if (slow := slow_dtype(dtype, device)) is not None:
        warn_caller(slow, SlowDtypeWarning)
