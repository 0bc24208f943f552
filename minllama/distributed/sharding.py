"""Trained weights, their gradients and moments divided among processes, or not.

Each process keeps some rows of each trained parameter. Frozen weights that each process has read
whole stay so: they would be gathered for nothing. `minllama.training.run` calls it.
"""

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from minllama.checkpoints.state_dict import tensor_shapes
from minllama.distributed.gradients import ComputesLogits, Gradients, ReplicatedGradients
from minllama.distributed.launcher import launch
from minllama.distributed.ranks import Ranks
from minllama.distributed.shard import Shard, gathered, take_rows
from minllama.distributed.sharded_llama import sharded_llamas, shards_in
from minllama.distributed.sharded_modules import ShardedModules
from minllama.errors import OptionError
from minllama.model.config import LlamaConfig

# What each process has of a trained number besides it where all have all of them: a gradient, its
# copy in a bucket that is exchanged, and two moments.
COPIES_IF_REPLICATED = 4
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of Linux' control groups, in bytes


def check_parallel(parallel: str, size: int) -> None:
    """Check that the option `parallel` can be had with this number of processes.

    Raises:
        OptionError: there is nothing to divide.
    """
    if parallel == "fsdp" and size == 1:
        raise OptionError(
            "--parallel fsdp divides weights among processes, and there is one; start several "
            "with torchrun, or omit it"
        )


def gradients_of(
    classifier: Any,
    parameters: Mapping[str, nn.Parameter],
    ranks: Ranks,
    *,
    parallel: str = "auto",
    most_texts: int = 16,
    max_tokens: float = float("inf"),
) -> Gradients:
    """The gradients of a run, however many processes it has.

    Args:
        classifier: a `Classifier`; with `fsdp` its trained parameters are empty until `release`.
        parameters: those of it that are trained, by name.
        ranks: the processes.
        parallel: `ddp`, `fsdp`, or `auto`: fsdp where ddp does not fit into memory. It is fsdp
            where the processes have read rows of the Llama.
        most_texts, max_tokens: of an evaluated batch; padded tokens, unless one text has more.
    """
    if ranks.size == 1:
        return Gradients(classifier, parameters)
    if any(sharded_llamas(classifier)):
        parallel = "fsdp"
    if parallel == "auto":
        device = next(classifier.parameters()).device
        does_not_fit = replicated_bytes(classifier) > memory_of_process(device)
        parallel = "fsdp" if ranks.any(does_not_fit) else "ddp"
    if parallel == "ddp":
        return ReplicatedGradients(classifier, parameters, ranks)
    return ShardedGradients(classifier, parameters, ranks, most_texts, max_tokens)


def is_read_by_rows(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks, parallel: str
) -> bool:
    """Whether each process reads its rows of a Llama whose weights are all trained.

    Args:
        config: of the Llama.
        dtype, device: of its weights.
        ranks: the processes.
        parallel: as for `gradients_of`. By `auto`, all weights count as trained: which layers are
            is chosen by the Llama.
    """
    if ranks.size == 1 or parallel == "ddp":
        return False
    n_weights = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    n_bytes = n_weights * dtype.itemsize * (1 + COPIES_IF_REPLICATED)
    return parallel == "fsdp" or ranks.any(n_bytes > memory_of_process(device))


def replicated_bytes(classifier: nn.Module) -> int:
    """What each process has in memory where all have all weights, without activations."""
    tensors: list[tuple[Tensor, bool]] = [(p, p.requires_grad) for p in classifier.parameters()]
    tensors += [(buffer, False) for buffer in classifier.buffers()]  # quantized weights
    return sum(
        tensor.nbytes * (1 + COPIES_IF_REPLICATED * is_trained) for tensor, is_trained in tensors
    )


def memory_of_process(device: torch.device) -> float:
    """Bytes of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    limits = [float("inf")]
    with contextlib.suppress(ValueError, OSError, AttributeError):  # a system that does not say
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(ValueError, OSError):  # "max" where there is none
        limits.append(int(CONTAINER_LIMIT.read_text()))
    return min(limits) / launch().local_size


class ShardedGradients(Gradients):
    """Gradients of processes that each hold some rows of the trained parameters.

    A copy of the classifier's modules computes, with the same frozen tensors. In the classifier
    itself the trained parameters are empty until `release`, and its predictions are this object's.
    Those of a Llama that was read by rows stay empty after it: its rows are then the trained ones.

    Args:
        classifier, parameters: as for `Gradients`; they start as those of the first process, or as
            they were read.
        ranks: the processes.
        most_texts, max_tokens: as for `gradients_of`.
    """

    is_sharded = True

    def __init__(
        self,
        classifier: ComputesLogits,
        parameters: Mapping[str, nn.Parameter],
        ranks: Ranks,
        most_texts: int,
        max_tokens: float,
    ) -> None:
        super().__init__(classifier, parameters)
        self._ranks = ranks
        self._most_texts, self._max_tokens = most_texts, max_tokens
        module = cast(nn.Module, classifier)
        for llama in sharded_llamas(module):
            llama.close()  # what it computes by would keep rows in memory
        read = shards_in(module)
        self._taken = {n: take_rows(p, ranks) for n, p in parameters.items() if n not in read}
        shards = {name: read[name] if name in read else self._taken[name] for name in parameters}
        self._modules: ShardedModules | None = ShardedModules(module, shards, ranks)
        self.parameters = {name: nn.Parameter(shard.values) for name, shard in shards.items()}
        self.rows = {name: shard.rows for name, shard in shards.items()}
        self._evaluator = cast(Any, classifier).evaluator
        cast(Any, classifier).evaluator = self

    @property
    def _computing(self) -> ShardedModules:
        assert self._modules is not None, "they have been released"
        return self._modules

    def logits(self, prompts: Sequence[Any]) -> Tensor:
        # In memory of their own: hooks of FSDP are lost where a view is written to.
        compute = self._computing
        return cast(Tensor, compute(lambda module: module.compute_logits(prompts).clone()))

    def begin(self) -> None:
        self._computing.train()
        self.clear()

    def clear(self) -> None:
        super().clear()
        if self._modules is not None:
            for parameter in self._modules.parameters.values():
                parameter.grad = None

    def clip(self, most: float) -> float:
        squares = 0.0
        for name, local in self.parameters.items():
            gradient = self._computing.parameters[name].grad
            if gradient is not None and local.numel():  # few rows may be none for some
                local.grad = gradient.to_local()
                squares += float(torch.linalg.vector_norm(local.grad)) ** 2
        (total,) = self._ranks.summed([squares])
        norm = torch.tensor(total, dtype=torch.float64).sqrt().float()
        nn.utils.clip_grads_with_norm_(list(self.parameters.values()), most, norm)
        return float(norm)

    def evaluated(
        self,
        classifier: Any,
        prompts: Sequence[Any],
        compute: Callable[[Any, Sequence[Any]], Any],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[list[int], Any]]:
        """See `minllama.classification.base.Evaluator`."""
        assert classifier is self._classifier
        return self._computing.in_batches(
            prompts,
            compute,
            most_texts=self._most_texts,
            max_tokens=self._max_tokens,
            progress=progress,
        )

    @torch.no_grad()
    def release(self) -> None:
        self.clear()
        self.parameters = {}
        for name in list(self._taken):
            shard: Shard = self._taken.pop(name)
            whole = gathered(shard, self._ranks, by_all=True)
            assert whole is not None
            shard.parameter.data = whole
        cast(Any, self._classifier).evaluator = self._evaluator
        self._modules = None
        gc.collect()  # torch's modules refer to one another
