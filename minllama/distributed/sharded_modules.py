"""Modules that compute with weights of which each process has some rows (FSDP2), layer by layer.

A layer's rows are gathered for its forward pass and again for its backward pass, after which its
gradients are summed and divided. `minllama.distributed.sharding` trains by them, and
`minllama.distributed.sharded_llama` predicts.

FSDP2: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from minllama.distributed.gradients import Computation
from minllama.distributed.ranks import Ranks
from minllama.distributed.shard import Shard
from minllama.engine.support import HOOKS_OF_SHARDING
from minllama.model.llama import Llama


class ShardedModules:
    """A copy of modules that computes with rows of some parameters; it shares all else.

    Args:
        module: to copy; not changed.
        shards: by the names of its parameters. Their values become those that the copy has, in the
            same memory where all processes have as many rows.
        ranks: the processes, all of which call the same at once.

    Attributes:
        module: the copy.
        parameters: those of the shards in it, `DTensor`s.
    """

    def __init__(self, module: nn.Module, shards: Mapping[str, Shard], ranks: Ranks) -> None:
        self.module, self._ranks = copy_of_modules(module), ranks
        self._root = Computation(self.module)
        self._divide(shards)
        self.parameters = {name: self._filled(name, shard) for name, shard in shards.items()}

    def __call__(self, compute: Callable[[Any], Any]) -> Any:
        """What `compute` returns for the copy, whose weights are gathered meanwhile."""
        return self._root(compute)

    def train(self, is_training: bool = True) -> None:
        """As of `nn.Module`."""
        self._root.train(is_training)

    def in_batches(
        self,
        prompts: Sequence[Any],
        compute: Callable[[Any, Sequence[Any]], Any],
        *,
        most_texts: int,
        max_tokens: float,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[list[int], Any]]:
        """Results of this process's N encoded texts, batch by batch, without gradients.

        Layers are gathered for each batch, so all processes compute as many batches: those with
        fewer texts compute one that does not count.

        Args:
            prompts: N encoded texts.
            compute: from the copy of the modules and some texts to their results.
            most_texts, max_tokens: of a batch; padded tokens, unless one text has more.
            progress: receives the number of texts just completed.

        Yields:
            The indices of a batch's texts, and what `compute` returns for them.
        """
        self.train(False)
        batches = _batches([len(p) for p in prompts], most_texts, max_tokens)
        shortest = min(prompts, key=len, default=None)
        of_all = self._ranks.collected((len(batches), shortest))
        filler = next((text for _, text in of_all if text is not None), None)
        for number in range(max(n for n, _ in of_all)):
            batch = batches[number] if number < len(batches) else []
            texts = [prompts[i] for i in batch] or [filler]
            result = self._of_batch(compute, texts)
            if batch:
                yield batch, result
                if progress is not None:
                    progress(len(batch))
        cast(Any, self._root).reshard()

    @torch.no_grad()
    def _of_batch(self, compute: Callable[[Any, Sequence[Any]], Any], texts: Sequence[Any]) -> Any:
        return self(lambda module: compute(module, texts))

    def _divide(self, shards: Mapping[str, Shard]) -> None:
        """Divide the parameters: those of each layer, then all others as one group."""
        from torch.distributed.device_mesh import init_device_mesh

        device = next(iter(shards.values())).values.device.type
        self._mesh = init_device_mesh(device, (self._ranks.size,))
        divided = set()
        for name, shard in shards.items():
            owner, attribute = self._place_of(name)
            # No process has the whole one: torch divides its shape.
            empty = torch.empty(shard.rows.shape, dtype=shard.values.dtype, device="meta")
            parameter = nn.Parameter(empty, requires_grad=shard.parameter.requires_grad)
            setattr(owner, attribute, parameter)
            divided.add(parameter)
        whole = {p for p in self.module.parameters() if p not in divided}
        layers = [
            layer
            for llama in self.module.modules()
            if isinstance(llama, Llama)
            for layer in llama.layers
        ]
        for group in (*layers, self._root):
            chosen = {p for p in group.parameters() if p in divided}
            parts = [*_of_other_dtypes(group, chosen), group]
            # A layer that is not divided gathers nothing; what is around them all is the root.
            for part in parts if chosen or group is self._root else ():
                # The root is needed again at once by the backward pass.
                is_root = group is self._root
                fully_sharded(part, self._mesh, whole, reshard_after_forward=not is_root)

    @torch.no_grad()
    def _filled(self, name: str, shard: Shard) -> Any:
        """A parameter of the copy, a `DTensor` with the values of its shard."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Divided

        owner, attribute = self._place_of(name)
        on_meta = getattr(owner, attribute)
        assert len(on_meta.to_local()) == len(shard.values), name
        values = DTensor.from_local(
            shard.values.detach(),
            self._mesh,
            [Divided(0)],
            run_check=False,
            shape=on_meta.shape,
            stride=on_meta.stride(),
        )
        owner.load_state_dict({attribute: values}, strict=False, assign=True)
        parameter = getattr(owner, attribute)
        # Where others have more rows, torch has padded them in memory of its own.
        shard.values = parameter.to_local().detach()
        return parameter

    def _place_of(self, name: str) -> tuple[nn.Module, str]:
        owner, _, attribute = name.rpartition(".")
        return self.module.get_submodule(owner), attribute


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
