"""Resolve the format that weights are loaded in: device, dtype, and dense or quantized.

Depends on the options (`LoadOptions`), the file, the machine (`kernels.hardware`) and the purpose
of the model. Everything that loads a model calls `resolve_weight_format`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from minllama.checkpoints.types import Checkpoint
from minllama.errors import MinllamaError, OptionError, SlowDtypeWarning, warn_caller
from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import library
from minllama.kernels.hardware import (
    default_dtype,
    fast_bfloat16,
    fast_float16_on_cpu,
    usable_device,
)
from minllama.options.loading import LoadOptions
from minllama.quantization.modules import QuantizedLinear, check_activations, check_quantize

# The purpose of a model: `generate` continues texts, `read` classifies them with frozen weights
# (adapters and heads may be trained), `train` changes all weights.
Purpose = Literal["generate", "read", "train"]
INT8 = "int8"  # of `ACTIVATIONS`
HALF_PRECISION_NAMES = {"bfloat16", "float16", "BF16", "F16"}


@dataclass(frozen=True)
class WeightFormat:
    """The format that weights are loaded in.

    Attributes:
        device: of the weights.
        dtype: of dense weights, and of computation with quantized ones.
        quantize: one of `QUANTIZE`; None for dense weights.
        is_chosen: neither dtype nor format was requested, and the model is to generate: an engine
            may compute long forward passes in another dtype (`long_dtype`).
        activations: one of `ACTIVATIONS`, beside quantized weights.
    """

    device: torch.device
    dtype: torch.dtype
    quantize: str | None = None
    is_chosen: bool = False
    activations: str = "int16"


def resolve_weight_format(
    checkpoint: Checkpoint,
    options: LoadOptions,
    purpose: Purpose = "generate",
    *,
    trained_on: tuple[str, str | None] | None = None,
) -> WeightFormat:
    """Choose the format in which a checkpoint's weights are loaded.

    Requested options take precedence. Trained weights are dense and float32, since half precision
    would lose small steps.

    Args:
        checkpoint: of the weights.
        options: as given.
        purpose: of the model.
        trained_on: dtype and `quantize` of the base that a saved classifier was trained on: the
            defaults, so that results are equal, except for a dtype that this machine only
            emulates.

    Raises:
        MinllamaError: the device, dtype or weight format is not available.
    """
    device = usable_device(options.device)
    check_activations(options.activations)
    if options.activations == INT8:
        return _beside_int8(checkpoint, options, device, trained_on and trained_on[1])
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
        dtype = _default_dtype_for(quantize, device, purpose)
    return WeightFormat(device, _checked_dtype(dtype), quantize, is_chosen)


def _beside_int8(
    checkpoint: Checkpoint, options: LoadOptions, device: torch.device, trained_on: str | None
) -> WeightFormat:
    """The weight format for activations of 8 bits: quantized, and computed in float32 on a CPU.

    Raises:
        OptionError: it would have no activations of 8 bits.
    """
    if device.type != "cpu" or library() is None:
        where = "without a C++ compiler" if device.type == "cpu" else f"not for {device.type}"
        raise OptionError(
            f"activations int8 are for minllama's compiled code for CPUs, {where}; use int16"
        )
    if options.dtype is not None and _checked_dtype(options.dtype) != torch.float32:
        raise OptionError("activations int8 compute in float32; omit the dtype, or use int16")
    quantize = options.quantize or trained_on or "auto"
    if quantize == "auto" and has_blocks(checkpoint):
        quantize = "stored"
    if quantize in ("auto", "none") or (quantize == "stored" and not has_blocks(checkpoint)):
        raise OptionError(
            f"activations int8 need quantized weights, and those of {checkpoint.path} are not; "
            "use quantize int8 or int4, or activations int16"
        )
    check_quantize(quantize)
    return WeightFormat(device, torch.float32, quantize, activations=INT8)


def _default_dtype_for(quantize: str | None, device: torch.device, purpose: Purpose) -> torch.dtype:
    """The default dtype for this weight format, device and purpose."""
    if purpose == "train":
        return torch.float32
    if purpose == "read" or (quantize is not None and device.type != "cpu"):
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return torch.float32 if quantize is not None else default_dtype(device)


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise MinllamaError(f"dtype {dtype!r} is not supported; use float32 or bfloat16")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _fastest_to_generate(
    checkpoint: Checkpoint, device: torch.device
) -> tuple[torch.dtype | None, str | None]:
    """The dtype and weight format that generate fastest here, without notable loss.

    With compiled code for the CPU, weights are used as stored: GGUF's quantized blocks, bfloat16 if
    the machine is fast at it, else half precision that is upcast for float32 arithmetic
    (`minllama.quantization.half`). Decoding always computes in float32.
    """
    if device.type != "cpu" or library() is None:
        return None, None
    if has_blocks(checkpoint):
        return torch.float32, "stored"
    stored = _formats_of_matrices(checkpoint)
    if stored == {"bfloat16"} and fast_bfloat16(device):
        return torch.bfloat16, None
    return (torch.float32, "stored") if stored & HALF_PRECISION_NAMES else (None, None)


def _fastest_to_read(
    checkpoint: Checkpoint, device: torch.device
) -> tuple[torch.dtype, str | None]:
    """The dtype and weight format that process whole texts fastest, as classifiers do.

    For frozen weights: bfloat16 if the hardware multiplies it, else GGUF's quantized blocks if
    integers are multiplied faster than float32, which also needs only a fifth of the memory.
    """
    if fast_bfloat16(device):
        return torch.bfloat16, None
    is_cpu = device.type == "cpu" and library() is not None
    if is_cpu and ops.most_rows(torch.float32) == math.inf:
        return torch.float32, "stored" if has_blocks(checkpoint) else None
    return torch.float32, None


def long_dtype(model: nn.Module) -> torch.dtype | None:
    """The fastest dtype for long forward passes of a quantized model on this CPU; None for its own.

    bfloat16 if the hardware multiplies it: weights are dequantized to it as they are read. Decoding
    and short passes stay in float32, with integers. On the default model that costs 0.1% of
    perplexity and no accuracy; a fifth of the greedy tokens after such a pass differ because of
    near ties (docs/benchmarks.md).
    """
    layers = getattr(model, "layers", ())
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    has_quantized = any(isinstance(m, QuantizedLinear) for m in model.modules())
    if linears or not has_quantized or library() is None or not fast_bfloat16("cpu"):
        return None
    return torch.bfloat16


def has_blocks(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has quantized matrices that can be used directly."""
    tensors = checkpoint.tensors.values()
    return any(tensor.blocks is not None for tensor in tensors if len(tensor.shape) == 2)


def _formats_of_matrices(checkpoint: Checkpoint) -> set[str]:
    return {tensor.stored_as for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2}


def slow_dtype(dtype: torch.dtype | str | None, device: torch.device | str | None) -> str | None:
    """The warning about a half precision that this machine only emulates; None otherwise.

    It is not refused: weights need half the memory, and decoding reads them in half the time.
    """
    usable = usable_device(device)
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    if dtype == "bfloat16" and usable.type == "cuda" and not fast_bfloat16(usable):
        return "this GPU only emulates bfloat16; float16 is faster"
    if usable.type != "cpu":
        return None
    is_fast = {
        "bfloat16": fast_bfloat16(usable),
        "float16": fast_float16_on_cpu(),
    }
    if dtype is None or is_fast.get(dtype, True):
        return None
    return f"this CPU only emulates {dtype}; float32 is faster for prefill and training"


def warn_if_slow(dtype: torch.dtype | str | None, device: torch.device | str | None) -> None:
    """Warn the caller about a half precision that this machine only emulates."""
    if (slow := slow_dtype(dtype, device)) is not None:
        warn_caller(slow, SlowDtypeWarning)
