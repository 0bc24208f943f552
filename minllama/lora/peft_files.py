"""Save and load adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

minllama's adapters load in PEFT on the transformers model, and vice versa. Rows of q and k are in
Hugging Face's order in the files (`minllama.checkpoints.huggingface`). The caller must check that
the base model is the right one.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minllama.atomic import atomic_folder
from minllama.checkpoints.huggingface import rotated_heads, to_half_split
from minllama.checkpoints.peft import (
    HEAD_KEY,
    KEYS,
    PICKLED_FILE,
    PREFIX,
    WEIGHTS_FILE,
    read_adapter,
    their_module_name,
)
from minllama.checkpoints.peft_config import CONFIG_FILE, describe, write_adapter_config
from minllama.errors import MinllamaError
from minllama.lora.inject import adapter_names, attach_adapter, llama_of, lora_layers
from minllama.lora.layer import LoRALayer
from minllama.lora.targets import linear_names
from minllama.model.config import LlamaConfig
from minllama.options import LoRAOptions
from minllama.quantization.modules import AnyLinear

FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE)


@dataclass(frozen=True)
class LoadedAdapter:
    """The contents of an adapter's files besides its matrices.

    Attributes:
        adapter_name: its name in the model.
        modules: the names of the LoRA layers, within the Llama.
        base_model_name: the base model in its config; None without one.
        head: (classes, D), float32, the head of a sequence classifier; None without one.
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
    """Write one adapter of a model as PEFT does; the folder is written atomically.

    Args:
        folder: the target; other files in an existing folder are kept.
        model: a Llama with adapters, or a module that contains one; merged or not.
        adapter_name: which of its adapters.
        base_model_name: the path or Hugging Face id that PEFT is to load the base from.
        head: (classes, D), without a bias: makes it an adapter of a sequence classifier (SEQ_CLS)
            that includes the head, as in PEFT; None for a language model (CAUSAL_LM).

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
    """Write an adapter's two files into an existing folder; see `save_adapter`."""
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
        f"{PREFIX}{their_module_name(name)}.{KEYS[parameter]}": _on_disk(
            _theirs(name, parameter, tensor, llama.config)
        )
        for name, adapter in adapters.items()
        for parameter, tensor in adapter.named_parameters()
    }
    if head is not None:
        tensors[HEAD_KEY] = _on_disk(head)
    config = describe(
        {their_module_name(name): adapter.options for name, adapter in adapters.items()},
        base_model_name=base_model_name,
        has_head=head is not None,
    )
    write_adapter_config(folder, config)
    # Not with the library's save_file, which raises its own errors on a full disk.
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str = "default"
) -> LoadedAdapter:
    """Load an adapter that PEFT or `save_adapter` wrote into a model.

    It becomes the active one; the Llama is frozen, and the adapter can be trained further. Every
    value comes from the file; on an error the model is unchanged.

    Args:
        model: a Llama, or a module that contains one.
        folder: that of adapter_config.json; weights as safetensors, or pickled (read by torch's
            restricted unpickler).
        adapter_name: its name in the model, which must be new.

    Returns:
        The adapter's metadata, and its head, which the caller may use.

    Raises:
        MinllamaError: a file is missing or damaged; it needs something that minllama does not
            implement; it does not fit the model (missing, unexpected and misshapen tensors are
            listed); the name is taken. The model is unchanged.
    """
    llama = llama_of(model)
    shapes: dict[str, tuple[int, int]] = {}
    for name in linear_names(llama):
        module = llama.get_submodule(name)
        assert isinstance(module, AnyLinear | LoRALayer)
        shapes[name] = (module.out_features, module.in_features)
    stored = read_adapter(Path(folder), shapes, llama.config)
    state = {
        name: {key: stored.parameter(name, key, llama.config) for key in _parameters(options)}
        for name, options in stored.options.items()
    }
    head = stored.head()
    # New adapters draw random numbers, soon overwritten: the caller's generator must not advance.
    with torch.random.fork_rng(devices=[]):
        adapters = attach_adapter(llama, adapter_name, stored.options)
    for name, adapter in adapters.items():
        for parameter, tensor in adapter.named_parameters():
            tensor.data.copy_(state[name][parameter])
    base = stored.config.base_model_name
    return LoadedAdapter(adapter_name, tuple(stored.options), base, head)


def _parameters(options: LoRAOptions) -> list[str]:
    return [name for name in KEYS if options.use_dora or name != "lora_magnitude_vector"]


def _theirs(module: str, parameter: str, tensor: Tensor, config: LlamaConfig) -> Tensor:
    """One of an adapter's parameters with its rows in Hugging Face's order."""
    n_heads = rotated_heads(f"{module}.", config)
    if n_heads is None or parameter == "lora_A":  # whose rows are not channels of q or k
        return tensor
    return to_half_split(tensor, n_heads)


def _on_disk(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
