"""Files with rows of tensors: any rows are read back, however many files have them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from minllama.distributed.gradients import Rows
from minllama.training.tensor_files import (
    SHARDING_INFO,
    file_name,
    files_of,
    read_tensors,
    write_tensors,
)

TENSORS = {
    "matrix": torch.arange(35, dtype=torch.float32).view(7, 5),
    "vector": torch.arange(3, dtype=torch.bfloat16),
    "cube": torch.arange(24).view(4, 3, 2),
}


def rows_of(rank: int, size: int) -> dict[str, Rows]:
    """The rows of a process, as torch.chunk divides them: as many for each but the last."""
    found = {}
    for name, tensor in TENSORS.items():
        start = [0]
        for chunk in torch.chunk(tensor, size):
            start.append(start[-1] + len(chunk))
        start += [len(tensor)] * (size + 1 - len(start))
        found[name] = Rows(start[rank], start[rank + 1], tuple(tensor.shape))
    return found


def part(rank: int, size: int) -> dict[str, Tensor]:
    return {name: TENSORS[name][r.start : r.stop] for name, r in rows_of(rank, size).items()}


def written(folder: Path, size: int) -> list[Path]:
    """Files of `size` processes."""
    paths = [folder / file_name("weights", rank, size) for rank in range(size)]
    for rank, path in enumerate(paths):
        rows = rows_of(rank, size) if size > 1 else None
        write_tensors(path, part(rank, size), rows)
    return paths


@pytest.mark.parametrize("before", [1, 2, 4, 9])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_rows_are_read_in_any_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    paths = written(tmp_path, before)
    whole = read_tensors(paths[::-1])
    assert whole.keys() == TENSORS.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in TENSORS.items())
    assert {tensor.dtype for tensor in whole.values()} == {t.dtype for t in TENSORS.values()}
    for rank in range(after):
        found = read_tensors(paths, rows_of(rank, after).__getitem__)
        assert all(torch.equal(found[n], tensor) for n, tensor in part(rank, after).items())


def test_torch_reads_files_of_rows(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    written(tmp_path, 3)
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    reader = dcp.HuggingFaceStorageReader(str(tmp_path))
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_files_that_torch_has_written_are_read(tmp_path: Path) -> None:
    """Its header for rows is the one that is written here."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "torch"), save_distributed=True)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(dict(TENSORS), storage_writer=writer, no_dist=True)
    (path,) = (tmp_path / "torch").glob("*.safetensors")
    found = read_tensors([path])
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    write_tensors(tmp_path / "ours", TENSORS, rows_of(0, 1))
    with safe_open(path, "pt") as theirs, safe_open(tmp_path / "ours", "pt") as ours:
        assert theirs.metadata().keys() == ours.metadata().keys()
        of_both = [json.loads(file.metadata()[SHARDING_INFO]) for file in (theirs, ours)]
    assert of_both[0] == of_both[1]


@pytest.mark.parametrize("wanted", [None, Rows(0, 7, (7, 5)), Rows(5, 7, (7, 5))])
def test_missing_rows_are_noticed(tmp_path: Path, wanted: Rows | None) -> None:
    first, second, third = written(tmp_path, 3)
    for paths in ([first, third], [first, second]) if wanted else ([second, third],):
        if wanted and wanted.start == 5 and third in paths:
            continue  # it needs the last part alone, and row 5
        with pytest.raises(ValueError, match="row"):
            read_tensors(paths, lambda name: wanted if name == "matrix" else None)


def test_rows_that_two_files_have_are_noticed(tmp_path: Path) -> None:
    first, _ = written(tmp_path, 2)
    again = tmp_path / "again.safetensors"
    again.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="several"):
        read_tensors([first, again])


@pytest.mark.parametrize("info", ["{}", "3", '{"matrix": {"saved_offsets": []}}', "["])
def test_a_header_without_rows_is_damage(tmp_path: Path, info: str) -> None:
    from safetensors.torch import save_file

    save_file({"matrix": TENSORS["matrix"]}, tmp_path / "a", {SHARDING_INFO: info})
    with pytest.raises(ValueError, match="a does not say which rows it has"):
        read_tensors([tmp_path / "a"])


def test_files_of_a_kind_are_found_by_name() -> None:
    names = ["weights-00001-of-00002.safetensors", "best-1.safetensors", "best-12.safetensors"]
    names += ["best-1-00002-of-00002.safetensors", "weights.json", "weights.safetensors"]
    assert files_of("best-1", names) == ["best-1-00002-of-00002.safetensors", "best-1.safetensors"]
    assert files_of("weights", names) == [file_name("weights", 0, 2), file_name("weights")]
