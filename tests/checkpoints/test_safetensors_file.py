"""Files that are written tensor by tensor are those that the safetensors library writes."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minllama.checkpoints import huggingface
from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.safetensors_file import write_safetensors
from minllama.checkpoints.types import TensorSource
from tests.tiny import our_model

TENSORS = {
    "z": torch.randn(3, 5, dtype=torch.float64),
    "b": torch.randn(4, 2).bfloat16(),
    "ä": torch.randn(7),
    "a.weight": torch.randn(2, 3, 1),
    "h": torch.randn(3).half(),
    "transposed": torch.randn(4, 3).t(),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("names", [[*TENSORS], ["b", "h"], ["ä"], []])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, names: list[str]) -> None:
    tensors = {name: TENSORS[name] for name in names}
    write_safetensors(tmp_path / "ours", tensors, tensors.__getitem__)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


class Fresh(TensorSource):
    """Tensors that exist as long as they are used; most of them at once, and how often each."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors, self.most = tensors, 0
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.read: list[str] = []

    @property
    def like(self) -> dict[str, Tensor]:
        return {name: tensor.to("meta") for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].clone()
        self._alive.add(tensor)
        self.read.append(name)
        self.most = max(self.most, len(self._alive))
        return tensor


@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_a_model_is_written_with_one_tensor_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: str
) -> None:
    monkeypatch.setattr(huggingface, "MAX_SHARD_SIZE", shard_size)
    model = our_model()
    state = model.state_dict()
    source = Fresh(state)
    write_huggingface(tmp_path / "one-by-one", model.config, source)
    assert sorted(source.read) == sorted(state)  # each once
    assert source.most <= 2  # the last one is dropped as the next is there
    model.save_pretrained(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "one-by-one").iterdir()}
    assert (len(names) > 3) == (shard_size == "8KB")
    for name in names:
        found, expected = (tmp_path / way / name for way in ("one-by-one", "whole"))
        assert found.read_bytes() == expected.read_bytes()
    if shard_size == "5GB":
        assert load_file(tmp_path / "whole" / "model.safetensors").keys() >= {"lm_head.weight"}
