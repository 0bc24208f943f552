"""Set modules to training or evaluation mode while a block runs."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

from torch import nn


class HasModules(Protocol):
    """An `nn.Module`, or an object with the modules of one."""

    def modules(self) -> Iterator[nn.Module]: ...


@contextlib.contextmanager
def mode_restored(module: HasModules) -> Iterator[None]:
    """Restore every submodule's mode at the end, also after an error."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) while the block runs; then the previous mode."""
    with mode_restored(module):
        module.eval()
        yield
