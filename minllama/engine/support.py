"""What may run a model's short passes in the place of its modules, and when it may not.

Knows nothing of how a step computes what the modules do (`minllama.engine.cpu` does on CPUs,
`minllama.engine.cuda_graph` on GPUs), only which models it could compute, and whether they are
still that.
"""

import itertools
import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle


def is_walkable(
    llama: Any,
    implemented: Collection[str],
    is_matrix: Callable[[nn.Module, tuple[int, int]], bool],
    is_numbers: Callable[[Any, tuple[int, ...]], bool],
) -> bool:
    """Whether steps that read a Llama's tensors by their address compute what its modules do.

    In evaluation mode: no dropout, and no hooks, which only modules call. As many tensors and of
    just the shapes that the config says.

    Args:
        llama: a `minllama.Llama`.
        implemented: fields of `LlamaConfig` that the steps follow; any other has its default.
        is_matrix: whether a linear layer or an embedding is of a kind that is known, and its matrix
            (out, in) of this shape.
        is_numbers: the same of a norm's weight.
    """
    config = llama.config
    if not config.has_defaults_beyond(implemented):
        return False
    if (llama.training and config.dropout) or has_hooks(llama):
        return False
    if len(llama.layers) != config.n_layers:
        return False
    of_vocabulary = [llama.tok_embeddings, *([] if llama.output is None else [llama.output])]
    norms = [llama.norm]
    norms += [norm for layer in llama.layers for norm in (layer.attention_norm, layer.ffn_norm)]
    return (
        all(is_matrix(m, (config.vocab_size, config.dim)) for m in of_vocabulary)
        and all(
            is_matrix(module, shape)
            for layer in llama.layers
            for module, shape in zip(linear_modules(layer), _linear_shapes(config), strict=True)
        )
        and all(is_numbers(norm.weight, (config.dim,)) for norm in norms)
    )


def has_hooks(llama: Any) -> bool:
    """Whether somebody listens to the modules of this Llama, or put a `forward` on one of them."""
    return _is_heard(_hooks(llama), map(vars, llama.modules()))


def _is_heard(hooks: Iterable[Mapping[Any, Any]], modules: Iterable[Mapping[str, Any]]) -> bool:
    return any(hooks) or any("forward" in own for own in modules)


def _hooks(llama: Any) -> tuple[Mapping[Any, Any], ...]:
    """Where torch keeps the hooks of all modules and of each of this Llama's."""
    everywhere = nn.modules.module
    found = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
    for module in llama.modules():
        found += [module._forward_hooks, module._forward_pre_hooks]
    return tuple(found)


class Runner(NamedTuple):
    """What runs short passes over a cache: kept with it (`KVCache.native`).

    Attributes:
        llama: the model that it is of.
        replacements: of the model when it was asked; see `LlamaPreTrainedModel`.
        step: None where the model's modules do it.
        hooks: where those of each module are kept, which may be hung up at any time.
        modules: what each module has of its own, among which may be a `forward`.
        places: where modules keep other modules, parameters and buffers.
        kept: what was there.
        n_hooks: how many hooks anybody had hung up anywhere, when nobody listened here.
    """

    llama: "weakref.ref[Any]"
    replacements: int
    step: Any
    hooks: tuple[Mapping[Any, Any], ...]
    modules: tuple[Mapping[str, Any], ...]
    places: tuple[dict[str, Any], ...]
    kept: tuple[Any, ...]
    n_hooks: int

    @classmethod
    def of(cls, llama: Any, step: Any) -> "Runner":
        modules = tuple(map(vars, llama.modules()))
        kinds = ("_modules", "_buffers", "_parameters")
        found = ((kind, own[kind]) for own in modules for kind in kinds)
        # A parameter may come to a module that had none.
        places = tuple(place for kind, place in found if place or kind == "_parameters")
        kept = tuple(_in_places(places))
        known = weakref.ref(llama), llama.replacements
        return cls(*known, step, _hooks(llama), modules, places, kept, _hooks_ever())

    def serves(self, llama: Any) -> bool:
        """Whether it is of this model, of which nothing is known to have been replaced."""
        return self.replacements == llama.replacements and self.llama() is llama

    def finds_all_in_place(self) -> bool:
        """Whether the model has the modules and tensors that it had, one by one."""
        return sum(map(len, self.places)) == len(self.kept) and all(
            map(operator.is_, _in_places(self.places), self.kept)
        )

    def step_unless_heard(self, *, is_steady: bool = False) -> Any:
        """The step, unless somebody listens to the modules by now, or speaks for them.

        Args:
            is_steady: nobody does the latter, and who listens has hung up a hook since: to look
                through all modules takes a processor that has just read all weights 0.3 ms.
        """
        if is_steady and self.n_hooks == _hooks_ever():
            return self.step
        return None if _is_heard(self.hooks, self.modules) else self.step


def _hooks_ever() -> int:
    """How many hooks were ever hung up, on whatever: torch gives each a number."""
    return RemovableHandle.next_id


def _in_places(places: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, places))


def _linear_shapes(config: Any) -> tuple[tuple[int, int], ...]:
    """(out, in) of `linear_modules`."""
    query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, hidden = config.dim, config.hidden_dim
    return (
        *((query, dim), (key, dim), (key, dim), (dim, query)),
        *((hidden, dim), (dim, hidden), (hidden, dim)),
    )


def linear_modules(layer: Any) -> tuple[nn.Module, ...]:
    """Those of a layer: query, key, value, output, w1, w2, w3."""
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
