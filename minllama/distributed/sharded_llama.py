"""A Llama of which each process reads and keeps some rows of each weight: none ever has all of it.

Its own parameters are empty. Its processes compute predictions together, train it
(`minllama.distributed.sharding`), and give the first one whole tensors to write, one at a time.
`minllama.experiment.train` loads it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from minllama.checkpoints.load import load_rows
from minllama.checkpoints.sample import sample_of
from minllama.checkpoints.types import Checkpoint, TensorSource
from minllama.checkpoints.weight_format import WeightFormat
from minllama.distributed.gradients import Rows
from minllama.distributed.ranks import Ranks
from minllama.distributed.shard import GatheredTensors, Shard, gathered
from minllama.distributed.sharded_modules import ShardedModules, copy_of_modules
from minllama.model.llama import Llama

T = TypeVar("T")

# Of a batch that is evaluated. Each batch gathers all layers, so larger ones are faster.
MOST_TEXTS, MAX_TOKENS = 32, 2048
OUTPUT = "output.weight"


class ShardedLlama:
    """What the processes of a Llama do together that have some rows each; its `shards`.

    Args:
        llama: its parameters are empty.
        shards: this process's rows of each, by name.
        ranks: the processes.

    Attributes:
        shards: as given.
    """

    def __init__(self, llama: Llama, shards: Mapping[str, Shard], ranks: Ranks) -> None:
        self._llama, self.shards, self._ranks = llama, shards, ranks
        self._modules: ShardedModules | None = None
        self._has_output = False
        self._is_served = False

    def evaluated(
        self,
        classifier: Any,
        prompts: Sequence[Any],
        compute: Callable[[Any, Sequence[Any]], Any],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[list[int], Any]]:
        """See `minllama.classification.base.Evaluator`."""
        modules = self._opened(has_output=classifier.reads_output)
        twin: Any = copy_of_modules(classifier)
        twin.llama = modules.module
        twin.eval()
        return modules.in_batches(
            prompts,
            lambda llama, texts: compute(twin, texts),
            most_texts=MOST_TEXTS,
            max_tokens=MAX_TOKENS,
            progress=progress,
        )

    def _opened(self, *, has_output: bool) -> ShardedModules:
        """Modules that compute with the rows; without an output matrix that none of them reads."""
        if self._modules is None or has_output > self._has_output:
            self.close()
            shards = {n: s for n, s in self.shards.items() if has_output or n != OUTPUT}
            self._modules = ShardedModules(self._llama, shards, self._ranks)
            self._has_output = has_output
        return self._modules

    def close(self) -> None:
        """Free what computes with the rows, until it is needed again."""
        self._modules = None

    def first(self, compute: Callable[[], T]) -> T:
        """`Ranks.first`, whose `compute` may read whole `tensors`: all send their rows."""
        ranks = self._ranks

        def served() -> T:
            self._is_served = True
            try:
                return compute()
            finally:
                self._is_served = False
                ranks.first(lambda: None)

        while not ranks.is_first and (name := ranks.first(_no_name)) is not None:
            gathered(self.shards[name], ranks, by_all=False)
        return ranks.first(served)

    @property
    def tensors(self) -> TensorSource:
        """Its whole tensors, each for the moment in which it is read: in the first process."""
        return GatheredTensors(self.shards, self._whole)

    def _whole(self, name: str) -> Tensor:
        assert self._is_served, "others do not send their rows"
        whole = gathered(self.shards[self._ranks.first(lambda: name)], self._ranks, by_all=False)
        assert whole is not None
        return whole


def _no_name() -> str | None:
    raise AssertionError("the first process says which tensor it reads")


def load_sharded(
    checkpoint: Checkpoint, weights: WeightFormat, ranks: Ranks, **config_changes: Any
) -> Llama:
    """Load a Llama, of which each process reads its rows.

    Args:
        checkpoint: to load.
        weights: a dense format.
        ranks: the processes, all of which call it.
        config_changes: as for `load_with`.

    Raises:
        CheckpointError: as for `minllama.checkpoints.load.load_weights`.
        MinllamaError: the processes have read different models.
    """

    def rows_of(n: int) -> tuple[int, int]:
        rows = Rows.of_process((n,), ranks.rank, ranks.size)
        return rows.start, rows.stop

    llama, loaded = ranks.each(
        lambda: load_rows(Llama, checkpoint, weights, rows_of, **config_changes)
    )
    parameters = dict(llama.named_parameters())
    shards = {}
    for name in list(loaded):
        found = loaded.pop(name)
        rows = Rows.of_process(found.shape, ranks.rank, ranks.size)
        shards[name] = Shard(parameters[name], rows, found.values, found.sample)
    ranks.check_equal(
        {name: shard.sample for name, shard in shards.items()},
        lambda first, other: f"it has read another model ({checkpoint.path})",
    )
    llama.shards = ShardedLlama(llama, shards, ranks)
    return llama


def sharded_llamas(module: nn.Module) -> Iterator[ShardedLlama]:
    """Those among some modules."""
    for llama in module.modules():
        if isinstance(llama, Llama) and isinstance(llama.shards, ShardedLlama):
            yield llama.shards


def shards_in(module: nn.Module) -> dict[str, Shard]:
    """This process's rows of the Llamas among some modules, by the names of parameters."""
    found: dict[str, Shard] = {}
    for prefix, llama in module.named_modules():
        if isinstance(llama, Llama) and isinstance(llama.shards, ShardedLlama):
            start = f"{prefix}." if prefix else ""
            found |= {f"{start}{name}": shard for name, shard in llama.shards.shards.items()}
    return found


def samples_of(
    module: nn.Module, is_wanted: Callable[[nn.Parameter], bool] = lambda parameter: True
) -> Iterator[bytes]:
    """A sample of each parameter and buffer, as its weights were read if it has no more than rows.

    Args:
        module: buffers of it are quantized weights.
        is_wanted: of its parameters.
    """
    shards = shards_in(module)
    for name, parameter in module.named_parameters():
        if is_wanted(parameter):
            yield shards[name].sample if name in shards else sample_of(parameter)
    yield from map(sample_of, module.buffers())
