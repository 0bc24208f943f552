"""Unwrap state dicts that training programs nest or rename.

Lightning saves `{"state_dict": ..., "epoch": ...}`, DeepSpeed `{"module": ...}`; DDP prefixes names
with `module.`, torch.compile with `_orig_mod.`. Unambiguous wrappers are removed; all readers of
pickled checkpoints call it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from minllama.checkpoints.pickled import OtherTensor
from minllama.checkpoints.torch_file import dense_tensors, load_torch_file
from minllama.errors import CheckpointError

T = TypeVar("T")

STATE_DICTS = ("state_dict", "model_state_dict", "model", "module", "app")
_MAX_DEPTH = 3
_MAX_SHOWN = 5  # keys of a file in a message
# Modules that wrap others and hold no weights; they may occur anywhere in a name.
WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a file that `torch.save` wrote; these are memory-mapped.

    Raises:
        CheckpointError: as for `load_torch_file`, `inner_state_dict` and `dense_tensors`.
    """
    return dense_tensors(inner_state_dict(load_torch_file(path), path), path)


def inner_state_dict(values: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The names and tensors in what `torch.save` wrote to `path`, at any depth.

    Raises:
        CheckpointError: there are several state dicts in it, or one under an unknown name.
    """
    for _ in range(_MAX_DEPTH):
        if not values or any(isinstance(value, Tensor | OtherTensor) for value in values.values()):
            return values
        inner = {key: v for key, v in values.items() if isinstance(v, dict) and _has_tensors(v)}
        usual = [key for key in STATE_DICTS if key in inner]
        if len(usual) != 1:
            raise CheckpointError(f"{path}: {_unclear(values, list(inner))}")
        state_dict = inner[usual[0]]
        if not all(isinstance(key, str) for key in state_dict):
            raise CheckpointError(f"{path}: its {usual[0]!r} has keys that are not tensor names")
        values = state_dict
    return values


def without_wrappers(tensors: Mapping[str, T], *roots: str) -> dict[str, T]:
    """`tensors` without the prefixes of wrappers in their names.

    Args:
        tensors: by the names in a file.
        roots: possible names of a tensor in the model, most likely first. A prefix of the first
            one found is removed if all other names have it as well.
    """
    plain = {_without_segments(name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):  # with and without prefix: ambiguous
        return dict(tensors)
    for root in roots:
        matching = [name for name in plain if name == root or name.endswith(f".{root}")]
        if len(matching) == 1:
            front = matching[0].removesuffix(root)
            if all(name.startswith(front) for name in plain):
                return {name.removeprefix(front): tensor for name, tensor in plain.items()}
        if matching:
            break
    return plain


def _without_segments(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _has_tensors(values: Mapping[str, Any], depth: int = _MAX_DEPTH) -> bool:
    return any(
        isinstance(value, Tensor | OtherTensor)
        or (depth > 1 and isinstance(value, dict) and _has_tensors(value, depth - 1))
        for value in values.values()
    )


def _unclear(values: Mapping[str, Any], inner: list[str]) -> str:
    """A message about why `values` is not clearly a state dict, with the remedy."""
    way = "torch.save(torch.load(FILE)[KEY], FILE)"
    if inner:
        names = ", ".join(map(repr, inner[:_MAX_SHOWN]))
        return f"its tensors are in {names}; keep only the model's state dict: {way}"
    names = ", ".join(f"{key[:40]!r}" for key in list(values)[:_MAX_SHOWN])
    return f"it contains no tensors, only {names}; save the model's state_dict() with torch.save"
