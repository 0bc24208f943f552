"""Accelerate operations from outside: `@accelerated` marks one, `register` adds an implementation.

The body of an accelerated function is its definition in plain torch, available as `.reference`. A
kernel module registers a faster function for it, with a predicate for the arguments that it
supports; the first one whose predicate is true is used. So the model reads like its equations, and
kernels are added without changing it.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

# In the order in which they are asked. Imported when an operation is first called, which is when
# torch is there and somebody computes.
BACKENDS = (
    "minllama.kernels.cpu.ops",
    "minllama.kernels.cpu.attention",
    "minllama.kernels.cpu.linear",
    "minllama.kernels.cpu.lora",
    "minllama.kernels.cpu.sampling",
    "minllama.kernels.gpu.launch",
)


class Fast(Generic[P, R]):
    """A faster implementation of an operation.

    Attributes:
        supports: whether it computes the same for these arguments.
        compute: does it.
    """

    def __init__(self, supports: Callable[P, bool], compute: Callable[P, R]) -> None:
        self.supports, self.compute = supports, compute


class Operation(Protocol[P, R_co]):
    """An accelerated function; `reference` is its definition."""

    @property
    def reference(self) -> Callable[P, R_co]: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


_registered: dict[str, list[Fast[Any, Any]]] = {}
_loaded: list[str] = []


def accelerated(reference: Callable[P, R]) -> Operation[P, R]:
    """Let kernels replace a function, whose body remains the definition."""
    fast = _registered.setdefault(reference.__name__, [])

    @functools.wraps(reference)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _loaded:
            load_backends()
        for way in fast:
            if way.supports(*args, **kwargs):
                return cast(R, way.compute(*args, **kwargs))
        return reference(*args, **kwargs)

    operation.reference = reference  # type: ignore[attr-defined]
    return cast(Operation[P, R], operation)


def register(name: str, supports: Callable[..., bool], compute: Callable[..., Any]) -> None:
    """Register a faster implementation of the accelerated function of this name, tried after
    others.
    """
    _registered.setdefault(name, []).append(Fast(supports, compute))


def registered(name: str) -> tuple[Fast[Any, Any], ...]:
    """The faster ways to compute the accelerated function of this name, in their order."""
    load_backends()
    return tuple(_registered.get(name, ()))


def load_backends() -> None:
    """Import the modules that register kernels."""
    if not _loaded:
        _loaded.extend(BACKENDS)
        for module in BACKENDS:
            import_module(module)


def is_plain(x: Any) -> bool:
    """Whether a tensor has memory of its own, which kernels read by its address.

    A FakeTensor (`torch.export`) has none, nor have the wrapper tensors of `torch.func`.
    """
    return type(x) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(x)
