"""Load a model by rows, and write it: prints what each process needs of memory for it.

`torchrun --nproc-per-node N tests/distributed/loading.py MODEL WRITTEN`
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama import LlamaConfig
from minllama.checkpoints import load
from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.weight_format import WeightFormat
from minllama.distributed import sharded_llama
from minllama.distributed.ranks import joined
from minllama.model.llama import Llama
from minllama.training.malloc import give_back_freed_memory

FLOAT32 = WeightFormat(torch.device("cpu"), torch.float32)


class Peak:
    """The most anonymous memory of this process at some moments, above what it is now."""

    def __init__(self) -> None:
        self._start = self._most = self._now()

    def look(self) -> None:
        self._most = max(self._most, self._now())

    @property
    def growth(self) -> int:
        """Bytes."""
        self.look()
        return self._most - self._start

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024


def watched(module: Any, name: str, look: Callable[[Any], object]) -> None:
    """Call `look` with each result of a function, while its arguments are in memory."""
    function = getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        look(result)
        return result

    setattr(module, name, call)


def main(model: Path, written: Path) -> None:
    peak, sizes = Peak(), list[int]()

    def at_gathered(whole: Tensor | None) -> None:
        peak.look()
        if whole is not None:
            sizes.append(whole.nbytes)

    # When a tensor has been converted, and when one has been gathered.
    watched(load, "_check_finite", lambda result: peak.look())
    watched(sharded_llama, "gathered", at_gathered)
    checkpoint = open_checkpoint(model)
    with joined(device="cpu") as ranks:
        give_back_freed_memory()
        # What libraries need for the first time is not the model's.
        tiny = Llama(LlamaConfig(dim=8, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=5))
        tiny.save_pretrained(written.with_name(f"tiny-{ranks.rank}"))
        ranks.collected(0)
        peak = Peak()
        llama = sharded_llama.load_sharded(checkpoint, FLOAT32, ranks)
        found: dict[str, Any] = {"loading": peak.growth}
        shards = llama.shards
        found["rows"] = {n: tuple(shard.values.shape) for n, shard in shards.shards.items()}
        peak = Peak()
        shards.first(lambda: write_huggingface(written, llama.config, shards.tensors))
        found |= {"writing": peak.growth, "gathered": sizes}
        peak = Peak()
        load.load_with(Llama, checkpoint, FLOAT32)
        of_all = ranks.collected({**found, "whole": peak.growth})
        if ranks.is_first:
            print(json.dumps(of_all))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
