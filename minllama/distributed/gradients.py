"""Gradients of a batch that several processes compute together: sums, not means.

The loss of each text is divided by the weight of the whole batch before the backward pass, so the
sum over micro-batches and processes is what one process computes for the batch.
`minllama.training.run` calls it; `minllama.distributed.sharding` divides weights as well.
"""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minllama.distributed.ranks import Ranks


class ComputesLogits(Protocol):
    """A classifier, which is an `nn.Module`."""

    def compute_logits(self, prompts: Any) -> Tensor:
        """(B, C), differentiable and not normalized."""


@dataclass(frozen=True)
class Rows:
    """The rows (of dimension 0) of a tensor that one process has.

    Attributes:
        start: the first one.
        stop: the one after the last.
        shape: of the whole tensor.
    """

    start: int
    stop: int
    shape: tuple[int, ...]

    @classmethod
    def of_process(cls, shape: tuple[int, ...], rank: int, size: int) -> "Rows":
        """Those of one of `size` processes: as many for each, but for the last ones."""
        most = -(-shape[0] // size)
        start = min(rank * most, shape[0])
        return cls(start, min(start + most, shape[0]), tuple(shape))

    @classmethod
    def all_of(cls, tensor: Tensor) -> "Rows":
        """All rows of a whole tensor."""
        return cls(0, tensor.shape[0] if tensor.dim() else 1, tuple(tensor.shape))


class Gradients:
    """The gradients of one process: those of its classifier.

    Args:
        classifier: whose logits are computed.
        parameters: those that are trained, by name.

    Attributes:
        parameters: what this process updates, by name: whole parameters, or rows of them.
        rows: which rows these are, by name.
        is_sharded: no process has all of them.
    """

    is_sharded = False

    def __init__(self, classifier: ComputesLogits, parameters: Mapping[str, nn.Parameter]) -> None:
        self._classifier = classifier
        self.parameters = dict(parameters)
        self.rows = {name: Rows.all_of(p) for name, p in parameters.items()}

    def logits(self, prompts: Sequence[Any]) -> Tensor:
        """(B, C) in training mode, whose backward pass adds to the gradients."""
        return self._classifier.compute_logits(prompts)

    def begin(self) -> None:
        """Set training mode and forget the gradients of the step before."""
        cast(nn.Module, self._classifier).train()
        self.clear()

    def clear(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def accumulating(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of a micro-batch's forward and backward pass.

        Args:
            is_last: of the step, after which the gradients are those of all processes.
        """
        return contextlib.nullcontext()

    def clip(self, most: float) -> float:
        """Scale the gradients so that their norm is at most `most`; returns the norm before."""
        return float(nn.utils.clip_grad_norm_(list(self.parameters.values()), most))

    def release(self) -> None:
        """Give the classifier its weights, where it was without; the last call, by all."""


class ReplicatedGradients(Gradients):
    """Gradients of processes that each hold all weights (DistributedDataParallel).

    Args:
        classifier, parameters: as for `Gradients`; they start as those of the first process.
        ranks: the processes.
    """

    def __init__(
        self, classifier: ComputesLogits, parameters: Mapping[str, nn.Parameter], ranks: Ranks
    ) -> None:
        super().__init__(classifier, parameters)
        with torch.no_grad():
            ranks.send(self.parameters.values())
        with warnings.catch_warnings():
            # torch 2.13 has another name for `broadcast_buffers`, which older ones do not know.
            warnings.simplefilter("ignore", FutureWarning)
            # Not the frozen base: it is the same in all processes, and may be a mapped file.
            self._replica = nn.parallel.DistributedDataParallel(
                Computation(cast(nn.Module, classifier)), init_sync=False, broadcast_buffers=False
            )
        self._replica.register_comm_hook(None, _summed)

    def logits(self, prompts: Sequence[Any]) -> Tensor:
        return cast(Tensor, self._replica(lambda classifier: classifier.compute_logits(prompts)))

    @contextlib.contextmanager
    def accumulating(self, *, is_last: bool) -> Any:
        with contextlib.nullcontext() if is_last else self._replica.no_sync():
            yield


class Computation(nn.Module):
    """Any computation as a forward pass, before and after which torch exchanges tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Callable[[Any], Any]) -> Any:
        return compute(self.module)


def _summed(
    state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch looks at the annotation
) -> torch.futures.Future[Tensor]:
    """Add up a bucket of gradients; by default DistributedDataParallel takes their mean."""
    work = dist.all_reduce(bucket.buffer(), op=dist.ReduceOp.SUM, async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed
