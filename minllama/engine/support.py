"""Check that an engine supports a model, and that the model has not changed since."""

import itertools
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor, nn

from minllama.errors import MinllamaError
from minllama.model.config import LlamaConfig
from minllama.model.llama import Attention, FeedForward, Llama, LlamaLayer, RMSNorm

# Attribute of modules whose weights are gathered by hooks, which take tensors of any shape and
# change none: how many forward hooks, and hooks before it, these are.
HOOKS_OF_SHARDING = "hooks_of_sharding"


def is_supported(
    llama: Llama,
    implemented: Collection[str],
    is_matrix: Callable[[nn.Module, tuple[int, int]], bool],
    is_dense: Callable[[Any, tuple[int, ...]], bool],
) -> bool:
    """Whether kernels that read a Llama's tensors by address compute the same as its modules.

    In evaluation mode: no dropout, and no hooks, which only modules call. As many tensors and of
    exactly the shapes of the config.

    Args:
        llama: the model.
        implemented: fields of `LlamaConfig` that the kernels follow; any other has its default.
        is_matrix: whether a linear layer or an embedding is of a kind that is known, and its matrix
            (out, in) of this shape.
        is_dense: the same of a norm's weight.
    """
    config = llama.config
    if not config.has_defaults_beyond(implemented) or not has_plain_layers(llama):
        return False
    if (llama.training and config.dropout) or has_hooks(llama):
        return False
    if len(llama.layers) != config.n_layers:
        return False
    of_vocabulary = [llama.tok_embeddings, *([] if llama.output is None else [llama.output])]
    layers = layers_of(llama)
    norms = [llama.norm]
    norms += [norm for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)]
    return (
        all(is_matrix(m, (config.vocab_size, config.dim)) for m in of_vocabulary)
        and all(
            is_matrix(module, shape)
            for layer in layers
            for module, shape in zip(linear_modules(layer), _linear_shapes(config), strict=True)
        )
        and all(is_dense(norm.weight, (config.dim,)) for norm in norms)
    )


def has_plain_layers(llama: Llama) -> bool:
    """Whether it consists of the modules of `minllama.model.llama`, without changes."""
    for name in ("compute_logits", "forward", "run_layer"):
        if name in vars(llama) or getattr(type(llama), name, None) is not getattr(Llama, name):
            return False
    return type(llama.norm) is RMSNorm and all(
        type(layer) is LlamaLayer
        and type(layer.attention) is Attention
        and type(layer.feed_forward) is FeedForward
        and type(layer.attention_norm) is RMSNorm
        and type(layer.ffn_norm) is RMSNorm
        for layer in llama.layers
    )


def layers_of(llama: Llama) -> list[LlamaLayer]:
    """The layers of a model that `has_plain_layers`."""
    layers = [layer for layer in llama.layers if isinstance(layer, LlamaLayer)]
    assert len(layers) == len(llama.layers)
    return layers


def has_hooks(llama: nn.Module) -> bool:
    """Whether a module of this Llama has forward hooks, or a `forward` of its own instance.

    Hooks that only gather a module's weights do not count.
    """
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return any(
        len(module._forward_hooks) > (known := vars(module).get(HOOKS_OF_SHARDING, 0))
        or len(module._forward_pre_hooks) > known
        or "forward" in vars(module)
        for module in llama.modules()
    )


class Snapshot:
    """The modules and tensors of a model when it was opened, to find what has changed since.

    It notices modules and tensors that were replaced, moved or converted, tensors that were
    written to by torch or by `minllama.AdamW`, hooks, and training mode. What is not: tensors that
    were made in inference mode and are written to in place, which count no versions, and memory
    that other code writes to by its address.

    Args:
        model: a module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        modules = [vars(module) for module in model.modules()]
        kinds = ("_modules", "_buffers", "_parameters")
        self._registries: list[dict[str, Any]] = [
            attributes[kind] for attributes in modules for kind in kinds
        ]
        self._registered = list(_registered(self._registries))
        self._tensors = [
            registered for registered in self._registered if isinstance(registered, Tensor)
        ]
        self._versions = list(map(_version, self._tensors))
        self._training, self._has_hooks = model.training, has_hooks(model)

    def is_current(self) -> bool:
        """Whether no change is detected."""
        return (
            self._model.training == self._training
            and sum(map(len, self._registries)) == len(self._registered)
            and all(map(operator.is_, _registered(self._registries), self._registered))
            and list(map(_version, self._tensors)) == self._versions
            and has_hooks(self._model) == self._has_hooks
        )

    def check(self) -> None:
        """Refuse a model that has changed.

        Raises:
            MinllamaError: it has.
        """
        if not self.is_current():
            raise MinllamaError(
                "the model has changed since its engine was opened: open another one with "
                "engine_for(model), and use new caches"
            )


def _registered(registries: list[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, registries))


def _version(tensor: Tensor) -> tuple[int, int]:
    """A tensor's address, and how often it was written to."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _linear_shapes(config: LlamaConfig) -> tuple[tuple[int, int], ...]:
    """(out, in) of `linear_modules`."""
    query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, hidden = config.dim, config.hidden_dim
    return (
        *((query, dim), (key, dim), (key, dim), (dim, query)),
        *((hidden, dim), (dim, hidden), (hidden, dim)),
    )


def linear_modules(layer: LlamaLayer) -> tuple[nn.Module, ...]:
    """A layer's linear modules: query, key, value, output, w1, w2, w3."""
    attention, feed_forward = layer.attention, layer.feed_forward
    return (
        attention.compute_query,
        attention.compute_key,
        attention.compute_value,
        attention.compute_output,
        feed_forward.w1,
        feed_forward.w2,
        feed_forward.w3,
    )
