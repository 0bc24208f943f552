"""Select the linear layers to adapt: by minllama's or Hugging Face's names, or by pattern."""

import re
from collections.abc import Collection, Sequence

from minllama.checkpoints.peft import their_module_name
from minllama.errors import OptionError
from minllama.lora.layer import LoRALayer
from minllama.model.llama import Llama
from minllama.quantization.modules import AnyLinear

ALL_LINEAR = "all-linear"


def linear_names(llama: Llama) -> list[str]:
    """The names of the linear layers that can be adapted: all those of the layers."""
    names: list[str] = []
    for name, module in llama.layers.named_modules(prefix="layers"):
        inside = name.rpartition(".")[0] in names
        if isinstance(module, AnyLinear | LoRALayer) and not inside:
            names.append(name)
    return names


def has_name(ours: str, target: str) -> bool:
    """Whether `target` is a module's name or its last part, in either naming."""
    return any(
        name == target or name.endswith(f".{target}") for name in (ours, their_module_name(ours))
    )


def matching_modules(
    llama: Llama, targets: Sequence[str], layers_to_transform: int | Collection[int] | None
) -> list[str]:
    """The linear layers that `targets` name; see `add_lora_wrapper`."""
    names = linear_names(llama)
    by_target = {target: set(_matches(target, names)) for target in targets}
    chosen = set().union(*by_target.values())
    if layers_to_transform is not None:
        if isinstance(layers_to_transform, int):
            layers_to_transform = [layers_to_transform]
        last = llama.config.n_layers - 1
        for layer in layers_to_transform:
            if not 0 <= layer <= last:
                raise OptionError(f"layers_to_transform must be from 0 to {last}, not {layer}")
        chosen = {name for name in chosen if int(name.split(".")[1]) in layers_to_transform}
        if unmatched := [target for target, found in by_target.items() if not found & chosen]:
            layers = ", ".join(map(str, layers_to_transform)) or "none"
            raise OptionError(
                f"target_modules: {', '.join(unmatched)} matches nothing in the selected layers "
                f"({layers}); omit it, or select more layers"
            )
    return [name for name in names if name in chosen]


def _matches(target: str, names: list[str]) -> list[str]:
    if target == ALL_LINEAR:
        return names
    matches = [name for name in names if has_name(name, target)]
    if not matches:
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise OptionError(
                f"target_modules: {target!r} is neither a name nor a regular expression ({error})"
            ) from error
        matches = [
            name
            for name in names
            if pattern.fullmatch(name) or pattern.fullmatch(their_module_name(name))
        ]
    if not matches:
        ends = {name.rpartition(".")[2]: their_module_name(name) for name in names}
        known = [f"{ours} ({theirs.rpartition('.')[2]})" for ours, theirs in ends.items()]
        raise OptionError(
            f"target_modules: no linear layer is named {target!r}; there are {', '.join(known)}, "
            f"full names such as {names[0]}, and {ALL_LINEAR}"
        )
    return matches
