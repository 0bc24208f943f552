"""Load a checkpoint's tensors into a module's parameters, checked, without a second copy in memory.

Takes a `Checkpoint` of any format, whose tensors are `LazyTensor`s; chooses dtype, device and
weight format. `Llama.from_checkpoint` calls it.
"""

import math
import os
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.state_dict import differences, listed, tensor_shapes
from minllama.checkpoints.types import Checkpoint, LazyTensor
from minllama.errors import CheckpointError, MinllamaError, SlowDtypeWarning, warn_caller
from minllama.kernels.cpu import ops
from minllama.kernels.cpu.library import library
from minllama.kernels.cpu.linear import HALVES
from minllama.kernels.hardware import (
    default_device,
    default_dtype,
    fast_bfloat16,
    fast_float16_on_cpu,
)
from minllama.model.pretrained import LlamaPreTrainedModel
from minllama.quantization.half import replace_by_widened
from minllama.quantization.modules import (
    QuantizedLinear,
    check_quantize,
    quantized,
    replace_by_quantized,
    state_in_numbers,
)

ModelT = TypeVar("ModelT", bound=LlamaPreTrainedModel)

HALF_NAMES = {"bfloat16", "float16", "BF16", "F16"}


def load_model(
    kind: type[ModelT],
    source: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
    base: str | os.PathLike[str] | None = None,
    **config_changes: Any,
) -> ModelT:
    """Load a model of a class; see `LlamaPreTrainedModel.from_pretrained`."""
    warn_if_slow(dtype, device)
    checkpoint = open_checkpoint(source, base=base)
    return load_checkpoint(
        kind, checkpoint, dtype=dtype, device=device, quantize=quantize, **config_changes
    )


def load_checkpoint(
    kind: type[ModelT],
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
    **config_changes: Any,
) -> ModelT:
    """Load a model of a class from an open checkpoint; see `from_pretrained`."""
    # Before a module is built: a file may claim thousands of layers and name a tensor in each.
    check_shapes(checkpoint, tensor_shapes(checkpoint.config))
    # No memory and no random numbers: the weights are assigned.
    with torch.device("meta"), without_initial_values():
        model = kind(checkpoint.config.replace(**config_changes))
    model.quantize = load_weights(model, checkpoint, dtype=dtype, device=device, quantize=quantize)
    if quantize == "auto" and dtype is None:
        model.long_dtype = long_dtype(model)
    model.source = checkpoint.source
    return model.eval()


def save_model(model: LlamaPreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write a Hugging Face folder; see `LlamaPreTrainedModel.save_pretrained`."""
    write_huggingface(folder, model.config, state_in_numbers(model))


def slow_dtype(dtype: str | None, device: torch.device | str | None) -> str | None:
    """The warning about a half precision that this machine only emulates; None otherwise.

    It is not refused: weights need half the memory, and decoding reads them in half the time.
    """
    where = usable_device(device)
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
    return f"this CPU only emulates {dtype}; float32 is faster for prefill and training"


def warn_if_slow(dtype: torch.dtype | str | None, device: torch.device | str | None) -> None:
    """Warn the caller about a half precision that this machine only emulates."""
    asked = None if dtype is None else str(dtype).removeprefix("torch.")
    if (slow := slow_dtype(asked, device)) is not None:
        warn_caller(slow, SlowDtypeWarning)


class without_initial_values(TorchFunctionMode):
    """Modules that are built within are not filled with initial values: theirs are to be assigned.

    On the meta device initialization has no effect, but would import torch's reference operators,
    which takes 0.7 seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def best_form(
    checkpoint: Checkpoint, device: torch.device | str
) -> tuple[torch.dtype | None, str | None]:
    """The dtype and weight format that generate fastest here, without notable loss.

    With compiled code for the CPU, weights are used as stored: GGUF's quantized blocks, bfloat16 if
    the machine is fast at it, else half precision that is upcast for float32 arithmetic
    (`minllama.quantization.half`). Decoding always computes in float32.
    """
    if torch.device(device).type != "cpu" or library() is None:
        return None, None
    if has_blocks(checkpoint):
        return torch.float32, "stored"
    stored = _forms_of_matrices(checkpoint)
    if stored == {"bfloat16"} and fast_bfloat16(device):
        return torch.bfloat16, None
    return (torch.float32, "stored") if stored & HALF_NAMES else (None, None)


def long_dtype(model: nn.Module) -> torch.dtype | None:
    """The fastest dtype for long forward passes through a quantized model on this CPU; None for its
    own.

    bfloat16 if the hardware multiplies it: matrices are dequantized to it one by one. Decoding and
    short passes stay in float32, with integers. On the default model that costs 0.1% of perplexity
    and no accuracy; a fifth of the greedy tokens after such a pass differ because of near ties
    (docs/benchmarks.md).
    """
    layers = getattr(model, "layers", ())
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    has_quantized = any(isinstance(m, QuantizedLinear) for m in model.modules())
    if linears or not has_quantized or library() is None or not fast_bfloat16("cpu"):
        return None
    return torch.bfloat16


def reading_form(
    checkpoint: Checkpoint, device: torch.device | str
) -> tuple[torch.dtype, str | None]:
    """The dtype and the word of `QUANTIZE` that read whole texts fastest, as classifiers do.

    For frozen weights: bfloat16 if the hardware multiplies it, else GGUF's quantized blocks if
    integers are multiplied faster than float32, which also needs only a fifth of the memory.
    """
    if fast_bfloat16(device):
        return torch.bfloat16, None
    is_cpu = torch.device(device).type == "cpu" and library() is not None
    if is_cpu and ops.most_rows(torch.float32) == math.inf:
        return torch.float32, "stored" if has_blocks(checkpoint) else None
    return torch.float32, None


def has_blocks(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has quantized matrices that can be used directly."""
    tensors = checkpoint.tensors.values()
    return any(tensor.blocks is not None for tensor in tensors if len(tensor.shape) == 2)


def _forms_of_matrices(checkpoint: Checkpoint) -> set[str]:
    return {tensor.stored_as for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2}


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
) -> str | None:
    """Load the weights of `checkpoint` into `module`, which was built on the meta device.

    Matrices of the right dtype stay memory-mapped if the format allows; others are converted one at
    a time. A file of which none stays mapped is closed.

    Args:
        module: receives the weights.
        checkpoint: to load.
        dtype: of the weights; None for the device's default.
        device: None for a GPU if there is one.
        quantize: one of `QUANTIZE`: quantized modules replace the linear layers and embeddings. Or
            "auto": `best_form`, if no dtype is given.

    Returns:
        The one of `QUANTIZE` that was applied; None for dense weights.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshapen (all are listed, with both
            shapes) or have NaN or infinite values; or it is not a language model.
    """
    device = usable_device(device)
    if quantize == "auto":
        best_dtype, quantize = best_form(checkpoint, device) if dtype is None else (dtype, None)
        dtype = dtype or best_dtype
    if dtype is None and quantize is not None and device.type != "cpu":
        dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    dtype = _usable_dtype(dtype, device)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_shapes(checkpoint, expected)
    check_quantize(quantize)
    state, parts, halves = {}, {}, []
    for name in expected:
        tensor = checkpoint.tensors[name]
        made = None if quantize is None else quantized(name, tensor, quantize)
        if made is not None:
            for numbers in (made.scales, made.mins):
                if numbers is not None:
                    _check_finite(name, numbers, numbers, checkpoint)
            parts[name.removesuffix(".weight")] = made
            continue
        stored = tensor.load()
        if stored.dim() == 1:  # a few norms would keep the whole file mapped, all else converted
            stored = stored.clone()
        if quantize == "stored" and _stays_half(stored, tensor, dtype, device):
            state[name] = stored
            halves.append(name.removesuffix(".weight"))
            _check_finite(name, stored, stored, checkpoint)
            continue
        # A conversion makes a tensor of our own; otherwise it may still be the file itself.
        state[name] = stored.to(device=device, dtype=dtype)
        _check_finite(name, stored, state[name], checkpoint)
    # Names and shapes are checked already; what is quantized is not in the state.
    module.load_state_dict(state, assign=True, strict=quantize is None)
    for name, made in parts.items():
        replace_by_quantized(module, name, made.to(device), dtype)
    for name in halves:
        replace_by_widened(module, name)
    return quantize if parts or halves else None


def _stays_half(
    stored: Tensor, tensor: LazyTensor, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a matrix stays in half precision, to be upcast when it is used."""
    is_half = stored.dtype in HALVES and len(tensor.shape) == 2
    return is_half and dtype == torch.float32 and device.type == "cpu" and library() is not None


def check_shapes(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """Compare a checkpoint's tensors with the names and shapes that a module has.

    Raises:
        CheckpointError: lists every difference; or it is not a language model.
    """
    checkpoint.check_language_model()
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if problems := differences(found, expected):
        raise CheckpointError(
            f"{checkpoint.path}: its tensors disagree with its config: {listed(problems)}; "
            "the file is incomplete, or its config is from another model"
        )


def _check_finite(name: str, stored: Tensor, tensor: Tensor, checkpoint: Checkpoint) -> None:
    # One pass and no temporary, where a sum of halves converts all of them first. NaN is both.
    is_mps = tensor.device.type == "mps"  # which has the two only
    extremes = (tensor.min(), tensor.max()) if is_mps else tensor.aminmax()
    if not all(map(torch.isfinite, extremes)):
        if bad := int((~torch.isfinite(stored)).sum()):
            raise CheckpointError(
                f"{checkpoint.path}: {name} has {bad} NaN or infinite values of "
                f"{tensor.numel()}; the file is damaged or its training diverged; download or "
                "train it again"
            )
        if bad := int((~torch.isfinite(tensor)).sum()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{checkpoint.path}: {kind} cannot represent {bad} values of {name}; "
                "use bfloat16 or float32"
            )


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device of that name; None for a GPU if there is one.

    Raises:
        MinllamaError: this machine or torch build does not have it.
    """
    if device is None:
        return default_device()
    try:
        torch.zeros((), device=device).item()  # the meta device has tensors without numbers
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either where CUDA is absent
        raise MinllamaError(
            f"device {str(device)!r} is not usable on this machine "
            f"({str(error).splitlines()[0][:120]}); use one that it has of cpu, cuda and mps"
        ) from error


def _usable_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return default_dtype(device)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise MinllamaError(f"dtype {dtype!r} is not supported; use float32 or bfloat16")
    assert isinstance(dtype, torch.dtype)
    return dtype
