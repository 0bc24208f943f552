"""One process's rows of a parameter, and the whole tensor that the rows of all processes are.

`minllama.distributed.sharding` takes rows of weights that are there, and
`minllama.distributed.sharded_llama` reads them from files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minllama.checkpoints.types import TensorSource
from minllama.distributed.gradients import Rows
from minllama.distributed.ranks import Ranks


@dataclass
class Shard:
    """This process's rows of a parameter.

    Attributes:
        parameter: that of the module, which has no elements meanwhile.
        rows: which they are.
        values: (n, ...), what they are.
        sample: of all rows as they were read; see `minllama.checkpoints.sample`. Empty where they
            were not read from a file.
    """

    parameter: nn.Parameter
    rows: Rows
    values: Tensor
    sample: bytes = b""


@torch.no_grad()
def take_rows(parameter: nn.Parameter, ranks: Ranks) -> Shard:
    """This process's rows of a parameter as the first process has it, which is then empty."""
    rows = Rows.of_process(tuple(parameter.shape), ranks.rank, ranks.size)
    # Not into the parameter itself: it may be pages of a file, which all processes share.
    whole = parameter.detach() if ranks.is_first else torch.empty_like(parameter)
    ranks.send([whole])
    shard = Shard(parameter, rows, whole[rows.start : rows.stop].clone())
    parameter.data = whole.new_empty(0)
    return shard


@torch.no_grad()
def gathered(shard: Shard, ranks: Ranks, *, by_all: bool) -> Tensor | None:
    """The whole tensor, in the first process or in all of them; all call it at once.

    Returns:
        None in a process that does not get it.
    """
    shape, values = shard.rows.shape, shard.values.detach()
    most = -(-shape[0] // ranks.size)
    if len(values) < most:
        values = torch.cat([values, values.new_zeros((most - len(values), *shape[1:]))])
    # As bytes, which all backends exchange.
    mine = values.contiguous().view(torch.uint8)
    if not by_all and not ranks.is_first:
        dist.gather(mine, dst=0)
        return None
    whole = values.new_empty((ranks.size * most, *shape[1:]))
    parts = list(whole.view(torch.uint8).split(len(mine)))
    if by_all:
        dist.all_gather(parts, mine)
    else:
        dist.gather(mine, parts, dst=0)
    return whole[: shape[0]]


class GatheredTensors(TensorSource):
    """Whole tensors, one at a time, of which each process has rows.

    Args:
        shards: by the names of the tensors.
        gather: returns the whole tensor of a name.
    """

    def __init__(self, shards: Mapping[str, Shard], gather: Callable[[str], Tensor]) -> None:
        self._shards, self._gather = shards, gather

    @cached_property
    def like(self) -> Mapping[str, Tensor]:
        return {
            name: torch.empty(shard.rows.shape, dtype=shard.values.dtype, device="meta")
            for name, shard in self._shards.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shards:
            raise KeyError(name)
        return self._gather(name)
