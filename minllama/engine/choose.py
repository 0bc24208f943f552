"""Which engine runs a model: the fastest one that computes exactly what its modules do."""

import torch

from minllama.engine.base import Engine
from minllama.engine.cpu import CpuEngine
from minllama.engine.cuda_graph import CudaGraphEngine
from minllama.errors import MinllamaError, OptionError
from minllama.model.llama import Llama

ENGINES = (CpuEngine, CudaGraphEngine, Engine)  # the first that supports a model is used
BACKENDS = tuple(engine.backend for engine in ENGINES)


def engine_for(llama: Llama, backend: str | None = None) -> Engine:
    """Open an engine for the current state of a model.

    Args:
        llama: a model.
        backend: one of BACKENDS; None for the fastest one that computes exactly this model.

    Raises:
        OptionError: there is no such backend.
        MinllamaError: the backend does not compute what this model's modules do.
    """
    if backend not in (None, *BACKENDS):
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend is None and torch.is_autocast_enabled(llama.device.type):
        backend = Engine.backend  # autocast's dtypes are those of torch's operations
    for engine in ENGINES:
        if backend in (None, engine.backend) and engine.runs(llama):
            return engine(llama)
    raise MinllamaError(f"this model cannot run on the engine {backend!r}; use 'eager'")


class KeptEngine:
    """The engine of a model from one use to the next, opened again where the model has changed.

    A copy, and what is unpickled, begins without one: an engine is of the tensors of its model.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None

    def __reduce__(self) -> tuple[type["KeptEngine"], tuple[()]]:
        return KeptEngine, ()

    def of(self, llama: Llama) -> Engine:
        """An engine for the current state of a model; see `engine_for`."""
        engine = self._engine
        if engine is None or engine.llama is not llama or not engine.snapshot.is_current():
            engine = self._engine = None  # gives back its memory before another takes as much
            self._engine = engine_for(llama)
        assert self._engine is not None
        return self._engine
