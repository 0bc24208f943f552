"""Training and evaluation mode of modules, for as long as something lasts."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

from torch import nn


class HasModules(Protocol):
    """An `nn.Module`, or what has the modules of one."""

    def modules(self) -> Iterator[nn.Module]: ...


@contextlib.contextmanager
def mode_restored(module: HasModules) -> Iterator[None]:
    """At the end every submodule is in the mode that it was in, also after an error."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for as long as it lasts; then the mode that was."""
    with mode_restored(module):
        module.eval()
        yield
