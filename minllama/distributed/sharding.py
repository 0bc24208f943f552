"""Trained weights, their gradients and moments divided among processes (FSDP2), layer by layer.

Each process keeps some rows of each trained parameter. A layer's are gathered for its forward pass
and again for its backward pass, after which its gradients are summed and divided. Frozen weights
stay whole in each process: they would be gathered for nothing. `minllama.training.run` calls it.

FSDP2: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from minllama.distributed.gradients import (
    ComputesLogits,
    Gradients,
    Logits,
    ReplicatedGradients,
    Rows,
)
from minllama.distributed.launcher import launch
from minllama.distributed.ranks import Ranks
from minllama.engine.support import HOOKS_OF_SHARDING
from minllama.errors import OptionError
from minllama.model.llama import Llama

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
    filler: Any = None,
) -> Gradients:
    """The gradients of a run, however many processes it has.

    Args:
        classifier: a `Classifier`; with `fsdp` its trained parameters are empty until `release`.
        parameters: those of it that are trained, by name.
        ranks: the processes.
        parallel: `ddp`, `fsdp`, or `auto`: fsdp where ddp does not fit into memory.
        most_texts, max_tokens: of an evaluated batch; padded tokens, unless one text has more.
        filler: an encoded text for processes that have fewer texts to evaluate than others.
    """
    if ranks.size == 1:
        return Gradients(classifier, parameters)
    if parallel == "auto":
        does_not_fit = replicated_bytes(classifier) > memory_of_process(classifier)
        parallel = "fsdp" if ranks.any(does_not_fit) else "ddp"
    if parallel == "ddp":
        return ReplicatedGradients(classifier, parameters, ranks)
    return ShardedGradients(classifier, parameters, ranks, most_texts, max_tokens, filler)


def replicated_bytes(classifier: nn.Module) -> int:
    """What each process has in memory where all have all weights, without activations."""
    tensors: list[tuple[Tensor, bool]] = [(p, p.requires_grad) for p in classifier.parameters()]
    tensors += [(buffer, False) for buffer in classifier.buffers()]  # quantized weights
    return sum(
        tensor.nbytes * (1 + COPIES_IF_REPLICATED * is_trained) for tensor, is_trained in tensors
    )


def memory_of_process(classifier: nn.Module) -> float:
    """Bytes of its GPU, or its share of the machine's memory."""
    device = next(classifier.parameters()).device
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

    Args:
        classifier, parameters: as for `Gradients`; they start as those of the first process.
        ranks: the processes.
        most_texts, max_tokens, filler: as for `gradients_of`.
    """

    is_sharded = True

    def __init__(
        self,
        classifier: ComputesLogits,
        parameters: Mapping[str, nn.Parameter],
        ranks: Ranks,
        most_texts: int,
        max_tokens: float,
        filler: Any,
    ) -> None:
        super().__init__(classifier, parameters)
        self._ranks, self._filler = ranks, filler
        self._most_texts, self._max_tokens = most_texts, max_tokens
        self._whole = self.parameters  # the classifier's own
        self._model = _OwnLogits(cast(ComputesLogits, copy_of_modules(cast(nn.Module, classifier))))
        self._sharded: dict[str, Any] = {}  # DTensors
        self.parameters = {}
        self._shard()
        cast(Any, classifier).evaluator = self

    def _shard(self) -> None:
        """Divide the parameters: those of each layer, then all others as one group."""
        from torch.distributed.device_mesh import init_device_mesh

        device = next(iter(self._whole.values())).device.type
        mesh = init_device_mesh(device, (self._ranks.size,))
        model = cast(nn.Module, self._model.classifier)
        layers = [
            layer for llama in model.modules() if isinstance(llama, Llama) for layer in llama.layers
        ]
        frozen = {p for p in self._model.parameters() if not p.requires_grad}
        names = {parameter: name for name, parameter in self._whole.items()}
        for group in (*layers, self._model):
            chosen = [p for p in group.parameters() if p in names]
            parts = [*_of_other_dtypes(group, set(chosen)), group]
            # A layer that is not trained gathers nothing; what is around them all is the root.
            for part in parts if chosen or group is self._model else ():
                # The root is needed again at once by the backward pass.
                fully_sharded(part, mesh, frozen, reshard_after_forward=group is not self._model)
            self._take({names[parameter]: parameter for parameter in chosen})
        self.parameters = {name: self.parameters[name] for name in self._whole}

    @torch.no_grad()
    def _take(self, group: Mapping[str, nn.Parameter]) -> None:
        """Start with the first process's values of some parameters, and free the whole ones."""
        ranks = self._ranks
        found = dict(cast(nn.Module, self._model.classifier).named_parameters())
        for name, whole in group.items():
            sharded = self._sharded[name] = found[name]
            local = cast(Any, sharded).to_local().detach()
            most = -(-len(whole) // ranks.size)
            start = min(ranks.rank * most, len(whole))
            assert len(local) == min(most, len(whole) - start), name
            # Not into the whole ones: they may be pages of a file, which all processes share.
            values = whole if ranks.is_first else torch.empty_like(whole)
            dist.broadcast(values, src=0)
            local.copy_(values[start : start + len(local)])
            self.parameters[name] = nn.Parameter(local)
            self.rows[name] = Rows(start, start + len(local), tuple(whole.shape))
            whole.data = whole.new_empty(0)

    def logits(self, prompts: Sequence[Any]) -> Tensor:
        return cast(Tensor, self._model(prompts))

    def begin(self) -> None:
        self._model.train()
        self.clear()

    def clear(self) -> None:
        super().clear()
        for parameter in self._sharded.values():
            parameter.grad = None

    def clip(self, most: float) -> float:
        squares = 0.0
        for name, local in self.parameters.items():
            gradient = self._sharded[name].grad
            if gradient is not None and local.numel():  # few rows may be none for some
                local.grad = gradient.to_local()
                squares += float(torch.linalg.vector_norm(local.grad)) ** 2
        (total,) = self._ranks.summed([squares])
        norm = torch.tensor(total, dtype=torch.float64).sqrt().float()
        nn.utils.clip_grads_with_norm_(list(self.parameters.values()), most, norm)
        return float(norm)

    @torch.no_grad()
    def predict(
        self, prompts: Sequence[Any], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Logits of this process's N encoded texts, (N, C); all processes call it at once.

        Layers are gathered for each batch, so all compute as many batches.
        """
        self._model.eval()
        batches = _batches([len(p) for p in prompts], self._most_texts, self._max_tokens)
        rows: NDArray[np.float32] | None = None
        for number in range(max(self._ranks.collected(len(batches)))):
            batch = batches[number] if number < len(batches) else []
            logits = self._model([prompts[i] for i in batch] or [self._filler])
            if rows is None:
                rows = np.empty((len(prompts), logits.shape[1]), dtype=np.float32)
            if batch:
                rows[batch] = logits.float().cpu().numpy()
                if progress is not None:
                    progress(len(batch))
        cast(Any, self._model).reshard()
        assert rows is not None, "there are no texts"
        return rows

    @torch.no_grad()
    def release(self) -> None:
        self.clear()
        for name, whole in self._whole.items():
            self.parameters.pop(name)
            whole.data = self._sharded.pop(name).full_tensor().detach()
        cast(Any, self._classifier).evaluator = None


class _OwnLogits(Logits):
    """Logits in memory of their own: hooks of FSDP are lost where a view is written to."""

    def forward(self, prompts: Sequence[Any]) -> Tensor:
        return super().forward(prompts).clone()


def fully_sharded(
    module: nn.Module, mesh: Any, frozen: set[nn.Parameter], *, reshard_after_forward: bool
) -> None:
    """Divide a module's parameters that are not divided yet; their gradients are summed."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Sums of half-precision gradients are exact enough in float32 only.
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        mp_policy=MixedPrecisionPolicy(
            reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
        ),
        ignored_params=frozen,
    )
    sharded = cast(Any, module)
    # By default gradients are averaged, which gloo once did wrong without a word
    # (https://github.com/pytorch/pytorch/issues/162338); and losses are divided here already.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    setattr(module, HOOKS_OF_SHARDING, 1)


def _of_other_dtypes(group: nn.Module, chosen: set[nn.Parameter]) -> Iterator[nn.Module]:
    """Modules to divide by themselves: a group is gathered at once, in one dtype."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in chosen:
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    main = max(sizes, key=lambda dtype: sizes[dtype], default=None)
    for module in group.modules():
        own = [p for p in module.parameters(recurse=False) if p in chosen]
        if module is not group and any(p.dtype != main for p in own):
            yield module


def copy_of_modules(module: nn.Module) -> nn.Module:
    """A copy of a module and all below it that shares their tensors and other attributes.

    Parameters, modules and hooks of the copy can be replaced; the original's stay.
    """
    copies: dict[nn.Module, nn.Module] = {}
    for original in module.modules():
        # nn.Module's own registries are dictionaries whose names begin with an underscore.
        attributes = {
            name: copy.copy(value) if name.startswith("_") and isinstance(value, dict) else value
            for name, value in vars(original).items()
        }
        copies[original] = twin = object.__new__(type(original))
        twin.__dict__.update(attributes)
    for twin in copies.values():
        twin._modules.update(
            {name: copies[child] for name, child in twin._modules.items() if child is not None}
        )
    return copies[module]


def _batches(lengths: Sequence[int], most_texts: int, max_tokens: float) -> list[list[int]]:
    """Texts in batches of similar length, longest first, no larger than these limits."""
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = len(batches[-1]) + 1 if batches else most_texts + 1
        if n > most_texts or n * longest > max_tokens:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches
