"""When weights are divided, and the copy of modules that computes with parts of them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from minllama.distributed import sharding
from minllama.distributed.ranks import ALONE
from minllama.distributed.sharded_modules import copy_of_modules
from minllama.distributed.sharding import (
    check_parallel,
    is_read_by_rows,
    memory_of_process,
    replicated_bytes,
)
from minllama.engine.support import HOOKS_OF_SHARDING, has_hooks
from minllama.errors import OptionError
from tests.tiny import our_model

CPU = torch.device("cpu")


class Two:
    """Two processes."""

    size = 2

    def any(self, value: bool) -> bool:
        return value


def model() -> nn.Sequential:
    """A trained layer of 20 numbers in float32, a frozen one of 30, and a buffer of 8 bytes."""
    layers = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 6, bias=False))
    layers[1].requires_grad_(False)
    layers.register_buffer("quantized", torch.zeros(8, dtype=torch.uint8))
    return layers


def test_one_process_has_nothing_to_divide() -> None:
    with pytest.raises(OptionError, match="--parallel fsdp divides weights among processes"):
        check_parallel("fsdp", 1)
    for parallel, size in (("auto", 1), ("ddp", 1), ("fsdp", 2)):
        check_parallel(parallel, size)


def test_replicated_memory_counts_gradients_buckets_and_moments_of_what_is_trained() -> None:
    assert replicated_bytes(model()) == 4 * (20 + 30) + 8 + 4 * 4 * 20


def test_a_container_may_have_less_memory_than_its_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sharding, "CONTAINER_LIMIT", tmp_path / "memory.max")
    of_machine = memory_of_process(CPU)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_of_process(CPU) == of_machine
    (tmp_path / "memory.max").write_text("123456789\n")
    assert memory_of_process(CPU) == 123456789 < of_machine


def test_processes_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = memory_of_process(CPU)
    assert alone > 2**28
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert memory_of_process(CPU) == alone / 4


@pytest.mark.parametrize(("memory", "expected"), [(1e3, "sharded"), (1e12, "replicated")])
def test_auto_divides_weights_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, memory: float, expected: str
) -> None:
    monkeypatch.setattr(sharding, "memory_of_process", lambda device: memory)
    monkeypatch.setattr(sharding, "ShardedGradients", lambda *arguments: "sharded")
    monkeypatch.setattr(sharding, "ReplicatedGradients", lambda *arguments: "replicated")
    monkeypatch.setattr(sharding, "replicated_bytes", lambda classifier: 1e6)
    assert sharding.gradients_of(model(), {}, Two()) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parallel", "times", "expected"),
    [("fsdp", 9.0, True), ("ddp", 0.1, False), ("auto", 4.99, True), ("auto", 5.0, False)],
)
def test_a_model_is_read_by_rows_where_its_training_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, parallel: str, times: float, expected: bool
) -> None:
    """Weights, two copies of gradients, and two moments are five times its bytes."""
    llama = our_model()
    memory = times * sum(p.nbytes for p in llama.parameters())
    monkeypatch.setattr(sharding, "memory_of_process", lambda device: memory)
    ways = (llama.config, torch.float32, CPU)
    assert is_read_by_rows(*ways, Two(), parallel) == expected  # type: ignore[arg-type]
    assert not is_read_by_rows(*ways, ALONE, parallel)


def test_a_copy_of_modules_shares_tensors_and_nothing_else() -> None:
    original = model()
    original[0].note = notes = ["shared"]
    twin = copy_of_modules(original)
    assert [*twin.state_dict()] == [*original.state_dict()]
    assert all(a is b for a, b in zip(twin.parameters(), original.parameters(), strict=True))
    assert not set(twin.modules()) & set(original.modules())
    assert twin[0].note is notes
    x = torch.randn(3, 4)
    assert torch.equal(twin(x), original(x))

    twin[0].weight = nn.Parameter(torch.zeros(5, 4))
    twin[0].register_forward_hook(lambda *arguments: None)
    twin.eval()
    assert original[0].weight.abs().sum() > 0
    assert not original[0]._forward_hooks
    assert original[0].training


def test_hooks_that_gather_weights_do_not_count() -> None:
    layers = model()
    layers[0].register_forward_hook(lambda *arguments: None)
    layers[0].register_forward_pre_hook(lambda *arguments: None)
    assert has_hooks(layers)
    setattr(layers[0], HOOKS_OF_SHARDING, 1)
    assert not has_hooks(layers)
    layers[0].register_forward_hook(lambda *arguments: None)
    assert has_hooks(layers)
