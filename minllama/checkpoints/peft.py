"""Read PEFT adapters, alone or merged lazily into their base checkpoint.

Rows of q and k are in Hugging Face's order in PEFT's files. An adapted matrix is W + scaling * B A
(Hu et al. 2021, eq. 3), with DoRA rescaled row by row (Liu et al. 2024, eq. 5), computed in float32
when the tensor is requested.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minllama.checkpoints.huggingface import (
    read_safetensors,
    rotated_heads,
    their_name,
    to_interleaved,
)
from minllama.checkpoints.peft_config import CONFIG_FILE, HEAD, AdapterConfig, read_adapter_config
from minllama.checkpoints.state_dict import differences, listed
from minllama.checkpoints.types import Checkpoint, LazyTensor, lazy
from minllama.checkpoints.wrapped import load_state_dict, without_wrappers
from minllama.errors import CheckpointError, CheckpointWarning, naming, warn_caller
from minllama.model.config import LlamaConfig
from minllama.options import LoRAOptions

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
HEAD_KEY = f"{PREFIX}{HEAD}.weight"
# Parameter of an adapter -> its key's end.
KEYS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "lora_magnitude_vector",
}
# A key with an adapter's name, which is removed: the first and last groups remain.
_NAMED_KEYS = (
    re.compile(r"(.+\.lora_[AB])\.([^.]+)(\.weight)"),
    re.compile(r"(.+\.lora_magnitude_vector)\.([^.]+)(?:\.weight)?()"),
)


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter on disk, checked against its model.

    Attributes:
        path: its weights file.
        config: its adapter_config.json.
        options: our name of each linear layer that it adapts -> rank, scale and kind.
        tensors: its tensors by the keys that PEFT's LlamaForCausalLM has.
    """

    path: Path
    config: AdapterConfig
    options: dict[str, LoRAOptions]
    tensors: dict[str, LazyTensor]

    def parameter(self, module: str, name: str, config: LlamaConfig) -> Tensor:
        """A parameter of a module's adapter, float32, with rows in minllama's order."""
        tensor = self._finite(f"{PREFIX}{their_module_name(module)}.{KEYS[name]}")
        n_heads = rotated_heads(f"{module}.", config)
        if n_heads is None or name == "lora_A":  # whose rows are not channels of q or k
            return tensor
        return to_interleaved(tensor, n_heads)

    def head(self) -> Tensor | None:
        """The head of a sequence classifier, (classes, D) float32; None without one."""
        return self._finite(HEAD_KEY) if HEAD_KEY in self.tensors else None

    def _finite(self, key: str) -> Tensor:
        tensor = self.tensors[key].load().float()
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise CheckpointError(
                f"{self.path}: {key} has {bad} NaN or infinite values of {tensor.numel()}; the "
                "file is damaged or its training diverged; download or train it again"
            )
        return tensor


def is_adapter(folder: Path) -> bool:
    """Whether `folder` is that of a PEFT adapter."""
    return (folder / CONFIG_FILE).is_file()


def their_module_name(ours: str) -> str:
    """Hugging Face's name of a module: `model.layers.0.self_attn.q_proj`."""
    return their_name(f"{ours}.weight").removesuffix(".weight")


def read_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], config: LlamaConfig
) -> StoredAdapter:
    """Read an adapter's config and the header of its weights.

    Args:
        folder: that of adapter_config.json; weights as safetensors, or pickled (read by torch's
            restricted unpickler).
        shapes: our name of each linear layer that can be adapted -> (outputs, inputs).
        config: of its model.

    Raises:
        CheckpointError: a file is missing or damaged; it needs something that minllama does not
            support; it does not fit the model (missing, unexpected and misshapen tensors are
            listed).
    """
    adapter_config = read_adapter_config(folder)
    path, stored = _stored_tensors(folder)
    bare = f"{PREFIX}layers."  # of a LlamaModel without a head, whose root is one level lower
    is_bare = any(name.startswith(bare) for name in stored)
    tensors = {
        name.replace(bare, f"{PREFIX}model.layers.", 1) if name.startswith(bare) else name: tensor
        for name, tensor in stored.items()
    }
    roots = {
        ours: their_module_name(ours).removeprefix("model." if is_bare else "") for ours in shapes
    }
    if adapter_config.targets is not None:
        adapted = [ours for ours, root in roots.items() if adapter_config.adapts(root)]
    else:
        named = {name.partition(".lora_")[0] for name in tensors}
        adapted = [ours for ours in roots if f"{PREFIX}{their_module_name(ours)}" in named]
    with naming(folder / CONFIG_FILE):
        found = adapter_config.options_of([roots[ours] for ours in adapted])
    options = dict(zip(adapted, found, strict=True))
    expected = _expected(options, shapes)
    if adapter_config.has_head:
        head = tensors[HEAD_KEY].shape if HEAD_KEY in tensors else ()
        expected[HEAD_KEY] = (head[0] if head else 1, config.dim)  # any number of classes
    _check_shapes(path, tensors, expected)
    return StoredAdapter(path, adapter_config, options, tensors)


def with_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """The base checkpoint with the adapter's updates added to its matrices.

    Raises:
        CheckpointError: as for `read_adapter`.
    """
    from minllama.tokenizer.load import find_vocabulary

    shapes = {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in base.tensors.items()
        if name.startswith("layers.") and name.endswith(".weight") and len(tensor.shape) == 2
    }
    adapter = read_adapter(folder, shapes, base.config)
    tensors = dict(base.tensors)
    for module in adapter.options:
        stored = tensors[f"{module}.weight"]
        load = partial(_merged, stored, module, adapter, base.config)
        # The sum is dense: the base's quantized blocks no longer apply.
        tensors[f"{module}.weight"] = dataclasses.replace(
            stored, load=load, blocks=None, load_rows=None
        )
    ignored = base.ignored
    if adapter.config.has_head:
        ignored = (*ignored, f"{HEAD}.weight")
        warn_caller(
            f"{folder}: an adapter of a sequence classifier; its head is ignored, and the model "
            "generates text",
            CheckpointWarning,
        )
    return dataclasses.replace(
        base,
        path=folder,
        format=f"PEFT adapter of {len(adapter.options)} matrices on {base.format}, {base.path}",
        tensors=tensors,
        read_vocabulary=lambda: find_vocabulary(folder) or base.vocabulary,
        ignored=ignored,
        tokenizer=None,
        base_path=base.path,
    )


def _merged(stored: LazyTensor, module: str, adapter: StoredAdapter, config: LlamaConfig) -> Tensor:
    weight = stored.load().float()
    options = adapter.options[module]
    low, high = (adapter.parameter(module, name, config) for name in ("lora_A", "lora_B"))
    merged = weight.addmm(high, low, alpha=options.scaling)  # not in place: it may be a mapped file
    if options.use_dora:
        magnitude = adapter.parameter(module, "lora_magnitude_vector", config)
        merged *= (magnitude / merged.norm(dim=1)).unsqueeze(1)
    return merged


def _stored_tensors(folder: Path) -> tuple[Path, dict[str, LazyTensor]]:
    """The weights file and its tensors, by the keys that it has."""
    path = folder / WEIGHTS_FILE
    if path.exists():
        return path, _saved_keys(dict(read_safetensors(path)))
    if (path := folder / PICKLED_FILE).exists():
        tensors = load_state_dict(path)
        return path, _saved_keys({name: lazy(tensor) for name, tensor in tensors.items()})
    raise CheckpointError(
        f"{folder}: neither {WEIGHTS_FILE} nor {PICKLED_FILE} found; download it again"
    )


def _saved_keys(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` by the keys that PEFT saves, if they have those of a model in training.

    Those have wrappers around the model, and an adapter's name: `lora_A.default.weight`.
    """
    plain = without_wrappers(tensors)
    fronts = {name.partition(PREFIX)[0] for name in plain}
    front = fronts.pop() if len(fronts) == 1 else ""
    keys, adapters = {}, set()
    for name in plain:
        match = next(filter(None, (pattern.fullmatch(name) for pattern in _NAMED_KEYS)), None)
        if match is not None:
            keys[name] = match[1] + match[3]
        if ".lora_" in name:
            adapters.add(match[2] if match else None)
    if len(adapters) != 1:  # of several adapters
        keys = {}
    return {keys.get(name, name).removeprefix(front): tensor for name, tensor in plain.items()}


def _expected(
    options: Mapping[str, LoRAOptions], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """Key -> shape of each tensor of an adapter with these modules."""
    expected: dict[str, tuple[int, ...]] = {}
    for ours, of_module in options.items():
        n_out, n_in = shapes[ours]
        key = f"{PREFIX}{their_module_name(ours)}"
        expected[f"{key}.{KEYS['lora_A']}"] = (of_module.r, n_in)
        expected[f"{key}.{KEYS['lora_B']}"] = (n_out, of_module.r)
        if of_module.use_dora:
            expected[f"{key}.{KEYS['lora_magnitude_vector']}"] = (n_out,)
    return expected


def _check_shapes(
    path: Path, stored: dict[str, LazyTensor], expected: dict[str, tuple[int, ...]]
) -> None:
    actual = {name: tensor.shape for name, tensor in stored.items()}
    if vocabulary := [name for name in actual if "embed_tokens" in name or "lm_head" in name]:
        raise CheckpointError(
            f"{path}: it adapts the vocabulary ({vocabulary[0]}), but only linear layers are "
            "supported; merge it into its base with PEFT and load the result"
        )
    if problems := differences(actual, expected):
        raise CheckpointError(
            f"{path}: does not fit this model: {listed(problems)}; load the base model that "
            f"{CONFIG_FILE} names, or fetch the adapter again"
        )
    if not actual:
        raise CheckpointError(f"{path}: contains no tensors; download it again")
