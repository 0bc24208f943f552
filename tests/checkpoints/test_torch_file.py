"""torch.save's files: good ones are mapped, bad ones cost one line, and no code is ever run."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from minllama.checkpoints.torch_file import dense_tensors, is_torch_file, load_torch_file
from minllama.errors import CheckpointError

STATE = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.arange(5).to(torch.bfloat16),
}


class Code:
    """Its pickle runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_torch_file(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 3}],
    ids=["zip", "legacy", "protocol 3"],
)
def test_a_state_dict_is_read_whatever_wrote_it(path: Path, options: dict[str, Any]) -> None:
    torch.save(STATE, path, **options)
    assert is_torch_file(path)
    found = dense_tensors(load_torch_file(path), path)
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_parameters_come_out_as_plain_tensors(path: Path) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(3))}, path)
    found = dense_tensors(load_torch_file(path), path)["w"]
    assert type(found) is torch.Tensor
    assert not found.requires_grad


def test_a_file_is_mapped_into_memory(path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see what is mapped")
    torch.save(STATE, path)
    values = load_torch_file(path)
    assert str(path) in maps.read_text()
    assert torch.equal(values["a.weight"], STATE["a.weight"])


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(path: Path) -> None:
    torch.save(STATE, path)
    before = path.read_bytes()
    load_torch_file(path)["a.weight"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_with_code_is_refused_and_not_run(path: Path, protocol: int) -> None:
    marker = path.with_name("ran")
    torch.save({"a": torch.ones(2), "b": Code(marker)}, path, pickle_protocol=protocol)
    refused(path, r"is refused: its pickle (calls posix\.system|is not one)")
    torch.save({"b": Code(marker)}, path, _use_new_zipfile_serialization=False)
    refused(path, r"calls posix\.system")
    path.write_bytes(pickle.dumps({"b": Code(marker)}, protocol=protocol))
    refused(path, "is refused|truncated or damaged")
    assert not marker.exists()


def test_python_objects_are_refused_by_name(path: Path) -> None:
    torch.save({"a": torch.ones(2), "args": argparse.Namespace(lr=1)}, path)
    refused(path, r"calls argparse\.Namespace")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_anywhere_is_one_line(path: Path, legacy: bool) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    assert len(content) > 400
    for length in range(4, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            load_torch_file(path)
        assert "\n" not in str(caught.value)


def test_what_is_no_file_of_torch_s_is_one_line(path: Path) -> None:
    refused(path, "cannot read .*: No such file")
    path.write_bytes(b"")
    refused(path, "is empty")
    path.write_bytes(b"some text, nothing more")
    assert not is_torch_file(path)
    refused(path, "was not written by torch.save")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/y.txt", "z")
    refused(path, "a zip archive, but was not written by torch.save")
    torch.save([torch.ones(2)], path)
    refused(path, "contains a list, not a state dict")
    torch.save({1: torch.ones(2)}, path)
    refused(path, "not a state dict")


def test_a_pipe_is_refused_and_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    refused(path, "is not a regular file")


def test_torchscript_is_refused_because_it_is_code(path: Path) -> None:
    torch.save(STATE, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("file/constants.pkl", b"")
    refused(path, "TorchScript, which can run arbitrary code")


def test_an_archive_that_was_compressed_is_refused(path: Path) -> None:
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(path, "was compressed after torch.save wrote it")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(1).expand(10**6, 10**6), "larger than its data in the file"),
        (torch.eye(3).to_sparse(), "not a plain dense tensor"),
        ({"nested": torch.ones(2)}, "is of type dict, not a tensor"),
    ],
    ids=["expanded", "sparse", "dict"],
)
def test_a_tensor_that_the_file_does_not_hold_in_full_is_refused(
    path: Path, value: Any, message: str
) -> None:
    torch.save({"w": value}, path)
    with pytest.raises(CheckpointError, match=message):
        dense_tensors(load_torch_file(path), path)
