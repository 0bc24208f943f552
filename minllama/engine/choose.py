"""Which engine runs a model: the fastest one that computes exactly what its modules do."""

from typing import Any

import torch

from minllama.engine import cpu, cuda_graph
from minllama.engine.base import Engine
from minllama.errors import OptionError

BACKENDS = ("cpu", "cuda_graph", "eager")


def engine_for(llama: Any, backend: str | None = None) -> Engine:
    """Open an engine for the current state of a model.

    Args:
        llama: a `minllama.Llama`.
        backend: one of BACKENDS; None for the fastest one that computes exactly this model.

    Raises:
        OptionError: there is no such backend.
        MinllamaError: the backend does not compute what this model's modules do.
    """
    if backend not in (None, *BACKENDS):
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "eager" or (backend is None and torch.is_autocast_enabled(llama.device.type)):
        return Engine(llama)  # autocast's dtypes are those of torch's operations
    if backend == "cpu" or (backend is None and cpu.can_run(llama)):
        return cpu.CpuEngine(llama)
    if backend == "cuda_graph" or (backend is None and cuda_graph.can_run(llama)):
        return cuda_graph.CudaGraphEngine(llama)
    return Engine(llama)
