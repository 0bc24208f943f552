"""Load and check a checkpoint's tensors as a module's parameters, without a second copy in memory.

Takes a `Checkpoint` of any format, whose tensors are `LazyTensor`s; chooses dtype, device and
weight format. `Llama.from_checkpoint` calls it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.sample import sample_by_rows
from minllama.checkpoints.state_dict import differences, listed, tensor_shapes
from minllama.checkpoints.types import Checkpoint, LazyTensor
from minllama.checkpoints.weight_format import (
    WeightFormat,
    long_dtype,
    resolve_weight_format,
    warn_if_slow,
)
from minllama.errors import CheckpointError
from minllama.kernels.cpu.library import library
from minllama.kernels.cpu.linear import HALF_DTYPES
from minllama.model.pretrained import LlamaPreTrainedModel
from minllama.options.loading import LoadOptions
from minllama.quantization.half import replace_by_upcast
from minllama.quantization.modules import (
    Parts,
    check_quantize,
    dense_state,
    quantized,
    replace_by_quantized,
    set_activations,
)

ModelT = TypeVar("ModelT", bound=LlamaPreTrainedModel)


def load_model(
    kind: type[ModelT],
    source: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
    activations: str = "int16",
    base: str | os.PathLike[str] | None = None,
    **config_changes: Any,
) -> ModelT:
    """Load a model of a class; see `LlamaPreTrainedModel.from_pretrained`."""
    warn_if_slow(dtype, device)
    checkpoint = open_checkpoint(source, base=base)
    options = LoadOptions(dtype=dtype, device=device, quantize=quantize, activations=activations)
    return _load(kind, checkpoint, options, config_changes)


def load_checkpoint(
    kind: type[ModelT],
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantize: str | None = None,
    activations: str = "int16",
    **config_changes: Any,
) -> ModelT:
    """Load a model of a class from an open checkpoint; see `from_pretrained`."""
    options = LoadOptions(dtype=dtype, device=device, quantize=quantize, activations=activations)
    return _load(kind, checkpoint, options, config_changes)


def _load(
    kind: type[ModelT], checkpoint: Checkpoint, options: LoadOptions, changes: dict[str, Any]
) -> ModelT:
    if options.quantize != "auto":
        check_quantize(options.quantize)
    return load_with(kind, checkpoint, resolve_weight_format(checkpoint, options), **changes)


def load_with(
    kind: type[ModelT], checkpoint: Checkpoint, weights: WeightFormat, **config_changes: Any
) -> ModelT:
    """Load a model of a class from an open checkpoint, in a weight format that is resolved."""
    model = _without_weights(kind, checkpoint, config_changes)
    model.quantize = load_weights(model, checkpoint, weights)
    model.activations = weights.activations
    set_activations(model, weights.activations)
    if weights.is_chosen:
        model.long_dtype = long_dtype(model)
    model.source = checkpoint.source
    return model.eval()


def _without_weights(
    kind: type[ModelT], checkpoint: Checkpoint, config_changes: dict[str, Any]
) -> ModelT:
    """The model of an open checkpoint on the meta device."""
    # Checked before a module is built: a file may claim thousands of layers.
    check_shapes(checkpoint, tensor_shapes(checkpoint.config))
    # No memory and no random numbers: the weights are assigned.
    with torch.device("meta"), without_initial_values():
        return kind(checkpoint.config.replace(**config_changes))


@dataclass(frozen=True)
class LoadedRows:
    """Some rows of a parameter.

    Attributes:
        values: (n, ...), in memory of their own.
        shape: of the whole parameter.
        sample: of all rows; see `minllama.checkpoints.sample`.
    """

    values: Tensor
    shape: tuple[int, ...]
    sample: bytes


def load_rows(
    kind: type[ModelT],
    checkpoint: Checkpoint,
    weights: WeightFormat,
    rows_of: Callable[[int], tuple[int, int]],
    **config_changes: Any,
) -> tuple[ModelT, dict[str, LoadedRows]]:
    """Load some rows of each parameter of a model, whose own parameters have none.

    Other rows are not read, but for a few of a sample; of a format without rows one tensor at a
    time is read whole.

    Args:
        kind: class of the model.
        checkpoint: to load.
        weights: a dense format.
        rows_of: from a tensor's number of rows to the first one to load, and the one after the
            last.
        config_changes: as for `load_with`.

    Raises:
        CheckpointError: as for `load_weights`, of the rows that are loaded.
    """
    assert weights.quantize is None, "blocks are not divided"
    model = _without_weights(kind, checkpoint, config_changes)
    check_shapes(checkpoint, {n: tuple(p.shape) for n, p in model.named_parameters()})
    loaded: dict[str, LoadedRows] = {}
    for name, parameter in list(model.named_parameters()):
        loaded[name] = _loaded_rows(name, checkpoint, weights, rows_of)
        owner, _, attribute = name.rpartition(".")
        none = torch.empty(0, dtype=weights.dtype, device=weights.device)
        empty = nn.Parameter(none, requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), attribute, empty)
    model.source = checkpoint.source
    return model.eval(), loaded


def _loaded_rows(
    name: str,
    checkpoint: Checkpoint,
    weights: WeightFormat,
    rows_of: Callable[[int], tuple[int, int]],
) -> LoadedRows:
    tensor = checkpoint.tensors[name]
    read, (start, stop) = tensor.row_reader(), rows_of(tensor.shape[0])
    values = torch.empty(
        (stop - start, *tensor.shape[1:]), dtype=weights.dtype, device=weights.device
    )
    if values.numel():
        stored = read(start, stop)
        values.copy_(stored)
        _check_finite(name, stored, values, checkpoint)
    return LoadedRows(values, tensor.shape, sample_by_rows(read, tensor.shape, weights.dtype))


def save_model(model: LlamaPreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write a Hugging Face folder; see `LlamaPreTrainedModel.save_pretrained`."""
    write_huggingface(folder, model.config, dense_state(model))


class without_initial_values(TorchFunctionMode):
    """Build modules without initial values, since their tensors are assigned later.

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


def load_weights(module: nn.Module, checkpoint: Checkpoint, weights: WeightFormat) -> str | None:
    """Load the weights of `checkpoint` into `module`, which was built on the meta device.

    Matrices of the right dtype stay memory-mapped if the format allows; others are converted one at
    a time. A file of which none stays mapped is closed.

    Args:
        module: receives the weights.
        checkpoint: to load.
        weights: the format that they get. Quantized modules take the place of the linear layers and
            embeddings of the same names.

    Returns:
        The one of `QUANTIZE` that was applied; None for dense weights.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshapen (all are listed, with both
            shapes) or have NaN or infinite values; or it is not a language model.
    """
    device, dtype, quantize = weights.device, weights.dtype, weights.quantize
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_shapes(checkpoint, expected)
    state, parts, half_precision = {}, {}, []
    for name in expected:
        tensor = checkpoint.tensors[name]
        made = None if quantize is None else _quantized(name, tensor, quantize, checkpoint)
        if made is not None:
            parts[name.removesuffix(".weight")] = made
            continue
        stored = tensor.load()
        if stored.dim() == 1:  # else a few norms keep the whole file mapped after a conversion
            stored = stored.clone()
        if quantize == "stored" and _stays_half_precision(stored, tensor, dtype, device):
            state[name] = stored
            half_precision.append(name.removesuffix(".weight"))
            _check_finite(name, stored, stored, checkpoint)
            continue
        # A conversion allocates a new tensor; otherwise this may still be the mapped file.
        state[name] = stored.to(device=device, dtype=dtype)
        _check_finite(name, stored, state[name], checkpoint)
    # Names and shapes are checked already; what is quantized is not in the state.
    module.load_state_dict(state, assign=True, strict=quantize is None)
    for name, made in parts.items():
        replace_by_quantized(module, name, made.to(device), dtype)
    for name in half_precision:
        replace_by_upcast(module, name)
    return quantize if parts or half_precision else None


def _quantized(
    name: str, tensor: LazyTensor, quantize: str, checkpoint: Checkpoint
) -> Parts | None:
    """A matrix in quantized blocks with checked scales; None if it stays dense."""
    made = quantized(name, tensor, quantize)
    if made is not None:
        for values in (made.scales, made.mins):
            if values is not None:
                _check_finite(name, values, values, checkpoint)
    return made


def _stays_half_precision(
    stored: Tensor, tensor: LazyTensor, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a matrix stays in half precision, to be upcast when it is used."""
    is_half = stored.dtype in HALF_DTYPES and len(tensor.shape) == 2
    return is_half and dtype == torch.float32 and device.type == "cpu" and library() is not None


def check_shapes(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """Compare a checkpoint's tensors with the names and shapes that a module has.

    Raises:
        CheckpointError: lists every difference; or it is not a language model.
    """
    checkpoint.check_language_model()
    actual = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if problems := differences(actual, expected):
        raise CheckpointError(
            f"{checkpoint.path}: its tensors disagree with its config: {listed(problems)}; "
            "the file is incomplete, or its config is from another model"
        )


def _check_finite(name: str, stored: Tensor, tensor: Tensor, checkpoint: Checkpoint) -> None:
    # One pass without a temporary, unlike a sum in half precision. NaN becomes both extremes.
    is_mps = tensor.device.type == "mps"  # which supports only these two
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
