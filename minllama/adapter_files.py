"""Adapters on disk, in PEFT's own files: adapter_config.json and adapter_model.safetensors.

An adapter of ours loads in PEFT on the transformers model, and the other way round. Rows of q and k
are in Hugging Face's order there (`minllama.checkpoints.huggingface`). Knows nothing of what an
adapter was trained for; whether the base is the right one is for the caller to check.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minllama.adapter_config import (
    CONFIG_FILE,
    HEAD,
    AdapterConfig,
    describe,
    read_adapter_config,
    write_adapter_config,
)
from minllama.atomic import atomic_folder
from minllama.checkpoints.base import LazyTensor, lazy
from minllama.checkpoints.huggingface import (
    read_safetensors,
    rotated_heads,
    to_half_split,
    to_interleaved,
)
from minllama.checkpoints.layout import differences, listed, naming
from minllama.config import LlamaConfig
from minllama.errors import CheckpointError, MinllamaError
from minllama.llama import Llama
from minllama.lora.layer import AnyLinear, LoRALayer
from minllama.lora.model import adapter_names, attach_adapter, llama_of, lora_layers
from minllama.lora.targets import linear_names, their_module_name
from minllama.options import LoRAOptions

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE)
_PREFIX = "base_model.model."
# Parameter of an adapter -> its key's end.
_KEYS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
_HEAD_KEY = f"{_PREFIX}{HEAD}.weight"


@dataclass(frozen=True)
class LoadedAdapter:
    """What came with an adapter's matrices.

    Attributes:
        adapter_name: what it is called in the model.
        modules: the names of the LoRA layers, within the Llama.
        base_model_name: what it was trained on; None where the file does not say.
        head: (classes, D), float32, the head of a sequence classifier; None where it has none.
    """

    adapter_name: str
    modules: tuple[str, ...]
    base_model_name: str | None
    head: Tensor | None


def save_adapter(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    adapter_name: str = "default",
    base_model_name: str | None = None,
    head: Tensor | None = None,
) -> None:
    """Write one adapter of a model as PEFT does; the folder appears whole or not at all.

    Args:
        folder: where to; other files in an existing folder are kept.
        model: a Llama with adapters, or a module that holds one; merged or not.
        adapter_name: which of its adapters.
        base_model_name: the path or Hugging Face id that PEFT is to load the base from.
        head: (classes, D), without a bias: the adapter is then one of a sequence classifier
            (SEQ_CLS) and carries the head, as PEFT does it; None for a language model (CAUSAL_LM).

    Raises:
        MinllamaError: there is no such adapter, or the folder cannot be written.
    """
    with atomic_folder(folder, replaces=lambda name: name in FILES) as staging:
        write_adapter(
            staging, model, adapter_name=adapter_name, base_model_name=base_model_name, head=head
        )


def write_adapter(
    folder: Path,
    model: nn.Module,
    *,
    adapter_name: str = "default",
    base_model_name: str | None = None,
    head: Tensor | None = None,
) -> None:
    """Write an adapter's two files into a folder that is there; see `save_adapter`."""
    from safetensors.torch import save

    llama = llama_of(model)
    adapters = {
        name: layer.adapter(adapter_name)
        for name, layer in lora_layers(llama).items()
        if adapter_name in layer.adapters
    }
    if not adapters:
        known = ", ".join(adapter_names(llama)) or "none"
        raise MinllamaError(f"there is no adapter {adapter_name!r} to save; there are {known}")
    tensors = {
        f"{_PREFIX}{their_module_name(name)}.{_KEYS[parameter]}": _on_disk(
            _theirs(name, parameter, tensor, llama.config)
        )
        for name, adapter in adapters.items()
        for parameter, tensor in adapter.named_parameters()
    }
    if head is not None:
        tensors[_HEAD_KEY] = _on_disk(head)
    config = describe(
        {their_module_name(name): adapter.options for name, adapter in adapters.items()},
        base_model_name=base_model_name,
        has_head=head is not None,
    )
    write_adapter_config(folder, config)
    # Not by the library's save_file, whose errors of a full disk are of its own kind.
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str = "default"
) -> LoadedAdapter:
    """Put an adapter that PEFT or `save_adapter` wrote beside the weights of a model.

    It is then the active one; the Llama is frozen, the adapter can be trained on. Nothing is drawn
    at random: each number is the file's, or the model stays as it was.

    Args:
        model: a Llama, or a module that holds one.
        folder: that of adapter_config.json; weights as safetensors, or pickled (read by torch's
            restricted unpickler).
        adapter_name: what to call it; a new name.

    Returns:
        What it adapts, and the head that came with it, which is the caller's to use.

    Raises:
        MinllamaError: a file is missing or damaged; it asks for what minllama does not compute; it
            does not fit the model (each missing, unexpected and misshapen tensor is listed); the
            name is taken. The model is as it was.
    """
    folder = Path(folder)
    llama = llama_of(model)
    config = read_adapter_config(folder)
    path, stored = _stored_tensors(folder)
    theirs = _adapted_modules(config, stored, llama)
    with naming(folder / CONFIG_FILE):
        options = {ours: config.options_of(module) for ours, module in theirs.items()}
    _check_shapes(path, stored, _expected(options, llama, stored if config.has_head else None))
    state = {name: _finite(path, name, tensor.load()) for name, tensor in stored.items()}
    # Fresh adapters draw numbers, which are overwritten: a caller's seed must not notice.
    with torch.random.fork_rng(devices=[]):
        adapters = attach_adapter(llama, adapter_name, options)
    for ours, adapter in adapters.items():
        for parameter, tensor in adapter.named_parameters():
            value = state[f"{_PREFIX}{theirs[ours]}.{_KEYS[parameter]}"]
            tensor.data.copy_(_ours(ours, parameter, value, llama.config))
    return LoadedAdapter(adapter_name, tuple(options), config.base_model_name, state.get(_HEAD_KEY))


def _stored_tensors(folder: Path) -> tuple[Path, dict[str, LazyTensor]]:
    """The weights file, and its tensors under the keys that PEFT's LlamaForCausalLM has."""
    from minllama.checkpoints.torch_file import dense_tensors, load_torch_file

    path = folder / WEIGHTS_FILE
    if path.exists():
        stored = dict(read_safetensors(path))
    elif (path := folder / PICKLED_FILE).exists():
        tensors = dense_tensors(load_torch_file(path), path)
        stored = {name: lazy(tensor) for name, tensor in tensors.items()}
    else:
        raise CheckpointError(
            f"{folder}: there is neither {WEIGHTS_FILE} nor {PICKLED_FILE}; fetch it again"
        )
    bare = f"{_PREFIX}layers."  # of a LlamaModel without a head
    return path, {
        name.replace(bare, f"{_PREFIX}model.layers.", 1) if name.startswith(bare) else name: tensor
        for name, tensor in stored.items()
    }


def _adapted_modules(
    config: AdapterConfig, stored: dict[str, LazyTensor], llama: Llama
) -> dict[str, str]:
    """Our name -> theirs of each linear layer that the adapter is said to be in."""
    modules = {ours: their_module_name(ours) for ours in linear_names(llama)}
    if config.targets is not None:
        return {ours: theirs for ours, theirs in modules.items() if config.adapts(theirs)}
    named = {name.partition(".lora_")[0] for name in stored}
    return {ours: theirs for ours, theirs in modules.items() if f"{_PREFIX}{theirs}" in named}


def _expected(
    options: dict[str, LoRAOptions], llama: Llama, with_head: dict[str, LazyTensor] | None
) -> dict[str, tuple[int, ...]]:
    """Key -> shape of each tensor of an adapter with these modules."""
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, of_module in options.items():
        module = llama.get_submodule(ours)
        assert isinstance(module, AnyLinear | LoRALayer)
        key = f"{_PREFIX}{their_module_name(ours)}"
        shapes[f"{key}.{_KEYS['lora_A']}"] = (of_module.r, module.in_features)
        shapes[f"{key}.{_KEYS['lora_B']}"] = (module.out_features, of_module.r)
        if of_module.use_dora:
            shapes[f"{key}.{_KEYS['lora_magnitude_vector']}"] = (module.out_features,)
    if with_head is not None:
        found = with_head[_HEAD_KEY].shape if _HEAD_KEY in with_head else ()
        shapes[_HEAD_KEY] = (found[0] if found else 1, llama.config.dim)  # any number of classes
    return shapes


def _check_shapes(
    path: Path, stored: dict[str, LazyTensor], expected: dict[str, tuple[int, ...]]
) -> None:
    found = {name: tensor.shape for name, tensor in stored.items()}
    if vocabulary := [name for name in found if "embed_tokens" in name or "lm_head" in name]:
        raise CheckpointError(
            f"{path}: it adapts the vocabulary ({vocabulary[0]}), and only the layers' linear "
            "layers can be adapted; merge it into its base with PEFT and load the result"
        )
    if problems := differences(found, expected):
        raise CheckpointError(
            f"{path}: it does not fit this model: {listed(problems)}; load the base model that "
            f"its {CONFIG_FILE} names, or fetch the adapter again"
        )
    if not found:
        raise CheckpointError(f"{path}: it holds no tensors; fetch it again")


def _finite(path: Path, name: str, stored: Tensor) -> Tensor:
    """A tensor as float32; an error where it holds what is no number."""
    tensor = stored.float()
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise CheckpointError(
            f"{path}: {name} holds {bad} NaN or infinite of {tensor.numel()} numbers; the file is "
            "damaged or its training diverged; fetch or train it again"
        )
    return tensor


def _theirs(module: str, parameter: str, tensor: Tensor, config: LlamaConfig) -> Tensor:
    """One of an adapter's parameters with its rows in Hugging Face's order."""
    n_heads = rotated_heads(f"{module}.", config)
    if n_heads is None or parameter == "lora_A":  # whose rows are not channels of q or k
        return tensor
    return to_half_split(tensor, n_heads)


def _ours(module: str, parameter: str, tensor: Tensor, config: LlamaConfig) -> Tensor:
    """The inverse of `_theirs`."""
    n_heads = rotated_heads(f"{module}.", config)
    if n_heads is None or parameter == "lora_A":
        return tensor
    return to_interleaved(tensor, n_heads)


def _on_disk(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
