"""Rows of parameters that are read alone are those of the whole parameters."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minllama.checkpoints import huggingface
from minllama.checkpoints.gguf import write_gguf
from minllama.checkpoints.llama2c import write_llama2c_bin
from minllama.checkpoints.load import LoadedRows, load_rows, load_with
from minllama.checkpoints.open import open_checkpoint
from minllama.checkpoints.sample import sample_of
from minllama.checkpoints.types import Checkpoint, LazyTensor
from minllama.checkpoints.weight_format import WeightFormat
from minllama.errors import CheckpointError
from minllama.model.llama import Llama
from tests.peft_model import their_adapter
from tests.tiny import our_model

FLOAT32 = WeightFormat(torch.device("cpu"), torch.float32)


def folder(tmp_path: Path, dtype: torch.dtype, **changes: object) -> Path:
    model = our_model(**changes).to(dtype)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface, "MAX_SHARD_SIZE", "8KB")
    written = folder(tmp_path, torch.float16, tie_embeddings=True)
    assert len(list(written.glob("model-*-of-*.safetensors"))) > 2
    return written


def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from safetensors.torch import load_file

    written = folder(tmp_path, torch.bfloat16)
    torch.save(load_file(written / "model.safetensors"), written / "pytorch_model.bin")
    (written / "model.safetensors").unlink()
    return written


def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = our_model(hidden_dim=64, attention_bias=True)
    write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), None, "q8_0")
    return tmp_path / "m.gguf"


def llama2c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = our_model()
    write_llama2c_bin(tmp_path / "m.bin", model.config, model.state_dict())
    return tmp_path / "m.bin"


def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    their_adapter(tmp_path, target_modules=["q_proj", "v_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    named = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(named))
    return tmp_path / "adapter"


def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return folder(tmp_path, torch.bfloat16, tie_embeddings=False, n_kv_heads=1)


def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return folder(tmp_path, torch.float32)


Written = Callable[[Path, pytest.MonkeyPatch], Path]
FORMATS = (default, half, shards, pickled, gguf, llama2c, adapter)


def parts(n: int, size: int) -> list[tuple[int, int]]:
    """The rows of each process, as torch.chunk divides them."""
    ends = [0]
    for chunk in torch.arange(n).chunk(size):
        ends.append(ends[-1] + len(chunk))
    ends += [n] * (size + 1 - len(ends))
    return list(itertools.pairwise(ends))


def loaded_by(checkpoint: Checkpoint, size: int) -> list[dict[str, LoadedRows]]:
    """What each of some processes loads."""
    found = []
    for rank in range(size):
        model, rows = load_rows(
            Llama, checkpoint, FLOAT32, lambda n, rank=rank: parts(n, size)[rank], dropout=0.25
        )
        assert all(p.shape == (0,) and p.dtype == torch.float32 for p in model.parameters())
        assert model.config.dropout == 0.25
        assert model.source == checkpoint.source
        found.append(rows)
    return found


@pytest.mark.parametrize("written", FORMATS)
@pytest.mark.parametrize("size", [2, 5, 64])
def test_rows_of_all_processes_are_the_whole_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Written, size: int
) -> None:
    checkpoint = open_checkpoint(written(tmp_path, monkeypatch))
    whole = dict(load_with(Llama, checkpoint, FLOAT32).named_parameters())
    found = loaded_by(checkpoint, size)
    assert [*found[0]] == [*whole]
    for name, parameter in whole.items():
        pieces = [rows[name] for rows in found]
        assert torch.equal(torch.cat([piece.values for piece in pieces]), parameter), name
        assert {piece.sample for piece in pieces} == {sample_of(parameter)}
        assert {piece.shape for piece in pieces} == {tuple(parameter.shape)}


def counting(checkpoint: Checkpoint, read: list[int], whole: list[str]) -> Checkpoint:
    """The same checkpoint, which keeps how many rows of matrices were read, and what whole."""

    def counted(name: str, tensor: LazyTensor) -> LazyTensor:
        def load() -> Tensor:
            whole.append(name)
            return tensor.load()

        def rows(start: int, stop: int) -> Tensor:
            assert tensor.load_rows is not None
            read.append(stop - start)
            return tensor.load_rows(start, stop)

        return replace(tensor, load=load, load_rows=rows)

    tensors = {name: counted(name, tensor) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("written", [default, half, shards, pickled, gguf])
def test_no_more_is_read_than_rows_and_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Written
) -> None:
    read: list[int] = []
    whole: list[str] = []
    checkpoint = counting(open_checkpoint(written(tmp_path, monkeypatch)), read, whole)
    _, found = load_rows(Llama, checkpoint, FLOAT32, lambda n: parts(n, 2)[1])
    assert not whole
    of_samples = [n for n in read if n == 1]
    assert len(of_samples) <= 32 * len(found)
    assert sum(read) - len(of_samples) == sum(len(rows.values) for rows in found.values())


def test_rotated_rows_read_no_more_than_their_heads(tmp_path: Path) -> None:
    """The rows of q and k are stored in another order, within each head of 8."""
    path = folder(tmp_path, torch.float32)
    checkpoint = open_checkpoint(path)
    tensor = checkpoint.tensors["layers.1.attention.compute_query.weight"]
    assert tensor.load_rows is not None
    whole = tensor.load()
    for start in range(32):
        for stop in range(start + 1, 33):
            assert torch.equal(tensor.load_rows(start, stop), whole[start:stop])
    stored = next(
        stored
        for name, stored in huggingface.read_safetensors(path / "model.safetensors")
        if name == "model.layers.1.self_attn.q_proj.weight"
    )
    asked: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        assert stored.load_rows is not None
        return stored.load_rows(start, stop)

    name = "layers.1.attention.compute_query.weight"
    permuted = huggingface._permuted(name, replace(stored, load_rows=rows), checkpoint.config)
    assert permuted.load_rows is not None
    assert torch.equal(permuted.load_rows(9, 17), whole[9:17])
    assert asked == [(8, 24)]


def test_rows_that_are_no_numbers_are_refused_by_who_reads_them(tmp_path: Path) -> None:
    model = our_model()
    model.tok_embeddings.weight.data[40, 3] = torch.nan
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    load_rows(Llama, checkpoint, FLOAT32, lambda n: parts(n, 2)[0])
    with pytest.raises(CheckpointError, match=r"tok_embeddings\.weight has 1 NaN"):
        load_rows(Llama, checkpoint, FLOAT32, lambda n: parts(n, 2)[1])


def test_tensors_that_contradict_the_config_are_refused_before_any_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(default(tmp_path, pytest.MonkeyPatch()))
    tensors = dict(checkpoint.tensors)
    del tensors["norm.weight"]
    with pytest.raises(CheckpointError, match=r"norm\.weight is missing"):
        load_rows(Llama, replace(checkpoint, tensors=tensors), FLOAT32, lambda n: (0, n))
