"""Add, switch, combine, merge and remove the adapters of a whole Llama.

`minllama.lora.layer` has the arithmetic, `minllama.lora.peft_files` the files.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from minllama.errors import MinllamaError
from minllama.lora.layer import LoRAAdapter, LoRALayer, check_adapter_name
from minllama.lora.targets import ALL_LINEAR, matching_modules
from minllama.model.llama import Llama
from minllama.model.mode import evaluating
from minllama.options import LoRAOptions
from minllama.quantization.modules import AnyLinear


def add_lora_wrapper(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    r: int = 8,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    layers_to_transform: int | Collection[int] | None = None,
    adapter_name: str = "default",
) -> list[str]:
    """Turn linear layers of a Llama into LoRA layers, and freeze everything else.

    Called again with another `adapter_name`, it adds a second adapter, which becomes the active and
    trained one. Other parts of a classifier, such as its head, are not changed.

    Args:
        model: a Llama, or a module that contains one.
        target_modules: "all-linear" (each projection of each layer, not the vocabulary's), or
            names: whole (`layers.0.attention.compute_query`) or the end of one (`compute_query`,
            `feed_forward.w1`), ours or Hugging Face's (`q_proj`); or regular expressions, which
            must match a whole name, ours or theirs.
        r, lora_alpha, lora_dropout, use_rslora, use_dora: see `LoRALayer`.
        layers_to_transform: indices of the layers to adapt, from 0; None for all.
        adapter_name: letters, digits, `_` and `-`.

    Returns:
        The names of the LoRA layers, within the Llama.

    Raises:
        MinllamaError: a target matches nothing (the message lists the names), an option is out of
            range, or the name is taken. The model is unchanged.
    """
    options = LoRAOptions(
        target_modules=target_modules,  # type: ignore[arg-type]  # a single string is accepted, too
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    llama = llama_of(model)
    names = matching_modules(llama, options.target_modules, layers_to_transform)
    attach_adapter(llama, adapter_name, dict.fromkeys(names, options))
    return names


def attach_adapter(
    llama: Llama, adapter_name: str, options: Mapping[str, LoRAOptions]
) -> dict[str, LoRAAdapter]:
    """Add a new adapter to linear layers of a frozen Llama, and make it the active one.

    Args:
        llama: the model to adapt.
        adapter_name: a new one.
        options: name of a linear layer -> the rank and scale that it gets.

    Returns:
        Name of the linear layer -> its adapter.

    Raises:
        MinllamaError: the name is invalid or taken, or adapters are merged; the model is unchanged.
    """
    check_adapter_name(adapter_name)
    if adapter_name in adapter_names(llama):
        raise MinllamaError(f"there is already an adapter {adapter_name!r}; choose another name")
    _check_unmerged(llama)
    llama.requires_grad_(False)
    for name, of_layer in options.items():
        module = llama.get_submodule(name)
        if isinstance(module, LoRALayer):
            module.add_adapter(adapter_name, of_layer)
        else:
            assert isinstance(module, AnyLinear)
            layer = LoRALayer(
                module,
                of_layer.r,
                of_layer.lora_alpha,
                of_layer.lora_dropout,
                use_rslora=of_layer.use_rslora,
                use_dora=of_layer.use_dora,
                adapter_name=adapter_name,
            )
            llama.set_submodule(name, layer)
    set_adapters(llama, adapter_name)
    layers = lora_layers(llama)
    return {name: layers[name].adapter(adapter_name) for name in options}


def remove_lora_wrapper(model: nn.Module, *, merge: bool = True) -> None:
    """Restore plain linear layers, which stay frozen.

    Args:
        model: a Llama, or a module that contains one.
        merge: merge the active adapters into the weights; False drops them and restores the
            original weights.

    Raises:
        MinllamaError: there are no adapters, or the merged weights are NaN or infinite.
    """
    llama = llama_of(model)
    layers = _layers_or_error(llama)
    if merge and not is_merged(llama):
        _check_mergeable(layers)
    for name, layer in layers.items():
        if merge and not layer.is_merged:
            layer.merge()
        elif layer.is_merged and not merge:
            layer.unmerge()
        # Each layer's old weight is freed before the next layer's new weight is allocated.
        llama.set_submodule(name, layer.base)


def merge_lora(
    model: nn.Module, sample: Tensor | Callable[[], Tensor] | None = None
) -> float | None:
    """Add the active adapters to the weights, until `unmerge_lora`; they then cost no matmuls.

    Computed in float32 and rounded once to the weights' dtype, which causes the drift. The original
    weights are kept, so that `unmerge_lora` is exact; `remove_lora_wrapper` frees them.

    Args:
        model: a Llama, or a module that contains one.
        sample: token ids (B, T), or a function that computes logits (such as a classifier's) with
            the model.

    Returns:
        The largest |logit after - logit before| on the sample, without dropout; None without a
            sample.

    Raises:
        MinllamaError: there are no adapters, they are already merged, or the merged weights would
            be NaN or infinite; the model is unchanged.
    """
    llama = llama_of(model)
    layers = _layers_or_error(llama)
    if is_merged(llama):
        raise MinllamaError("the adapters are already merged; undo it with unmerge_lora()")
    _check_mergeable(layers)
    with evaluating(model), torch.no_grad():
        before = _logits(llama, sample)
        for layer in layers.values():
            layer.merge()
        after = _logits(llama, sample)
        if before is None or after is None:
            return None
        return float((after - before).abs().max())


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: the original weights are restored bit for bit.

    Raises:
        MinllamaError: the adapters are not merged.
    """
    llama = llama_of(model)
    if not is_merged(llama):
        raise MinllamaError("the adapters are not merged, so there is nothing to undo")
    for layer in lora_layers(llama).values():
        layer.unmerge()


def set_adapters(model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float]) -> None:
    """Choose the active adapters: one, several, or several with weights.

    Args:
        model: a Llama, or a module that contains one.
        adapters: a name; names; or name -> weight, `{"a": 1.0, "b": 0.5}`. An empty list is the
            base alone. Which parameters are trained does not change.

    Raises:
        MinllamaError: a name is unknown (those that there are, are listed), a share is not a finite
            number, or the adapters are merged.
    """
    llama = llama_of(model)
    layers = _layers_or_error(llama)
    if isinstance(adapters, str):
        adapters = [adapters]
    shares = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    known = adapter_names(llama)
    for name, share in shares.items():
        if name not in known:
            raise MinllamaError(f"there is no adapter {name!r}; there are {', '.join(known)}")
        if not math.isfinite(share):
            raise MinllamaError(f"the weight of adapter {name!r} must be finite, not {share}")
    _check_unmerged(llama)
    for layer in layers.values():
        layer.active = {name: share for name, share in shares.items() if name in layer.adapters}


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base alone while the block runs; then the adapters that were active before.

    Args:
        model: a Llama, or a module that contains one; without adapters nothing changes.

    Raises:
        MinllamaError: the adapters are merged.
    """
    llama = llama_of(model)
    _check_unmerged(llama)
    layers = list(lora_layers(llama).values())
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = {}
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order in which they were added."""
    layers = lora_layers(model).values()
    return list(dict.fromkeys(name for layer in layers for name in layer.adapters))


def lora_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The parameters of one adapter, or of all."""
    return [
        parameter
        for layer in lora_layers(model).values()
        for name, adapter in layer.adapters.items()
        if adapter_name in (None, name)
        for parameter in adapter.parameters()
    ]


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Name within the Llama -> LoRALayer, in the order of the layers."""
    return {
        name: module
        for name, module in llama_of(model).named_modules()
        if isinstance(module, LoRALayer)
    }


def is_merged(model: nn.Module) -> bool:
    """Whether adapters are merged into the weights at the moment."""
    return any(layer.is_merged for layer in lora_layers(model).values())


def llama_of(model: nn.Module) -> Llama:
    """The Llama that `model` is or contains.

    Raises:
        MinllamaError: it contains none.
    """
    for module in model.modules():
        if isinstance(module, Llama):
            return module
    raise MinllamaError(f"a {type(model).__name__} contains no Llama; give a Llama or a classifier")


def _check_unmerged(llama: Llama) -> None:
    if is_merged(llama):
        raise MinllamaError("adapters are merged into the weights; call unmerge_lora() first")


def _layers_or_error(llama: Llama) -> dict[str, LoRALayer]:
    if layers := lora_layers(llama):
        return layers
    raise MinllamaError(
        "the model has no adapters; add one with add_lora_wrapper() or load_adapter()"
    )


def _check_mergeable(layers: Mapping[str, LoRALayer]) -> None:
    """Check that all layers can be merged, before any is."""
    for name, layer in layers.items():
        try:
            layer.merged_weight()
        except MinllamaError as error:
            raise MinllamaError(f"{name}: {error}") from error


def _logits(llama: Llama, sample: Tensor | Callable[[], Tensor] | None) -> Tensor | None:
    if sample is None:
        return None
    logits: Tensor = llama(sample).logits if isinstance(sample, Tensor) else sample()
    return logits.float()
