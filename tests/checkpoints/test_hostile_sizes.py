"""Files that claim, or hold, more than any model: refused before memory or time is spent on it."""

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minllama import Llama, load_pretrained
from minllama.checkpoints import gguf_header, huggingface
from minllama.checkpoints.gguf import read_gguf
from minllama.checkpoints.gguf_header import read_header
from minllama.checkpoints.open import open_checkpoint
from minllama.errors import CheckpointError
from tests.gguf_file import (
    ARRAY,
    BOOL,
    CONFIG,
    FIELDS,
    I8,
    STRING,
    U8,
    U32,
    random_tensors,
    stored_f32,
    string,
    with_field,
    write_file,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_file, tmp_path / "m.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Llama(CONFIG).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def safetensors(path: Path, header: dict[str, Any], data: bytes = b"") -> None:
    content = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)


def test_gguf_tensors_that_lie_on_one_another_are_refused(write: Callable[..., Path]) -> None:
    path = write()
    content = path.read_bytes()
    entry = string("blk.0.ffn_up.weight") + struct.pack("<IQQI", 2, 32, 64, 0)
    at = content.index(entry) + len(entry)
    for offset in (0, 32):
        path.write_bytes(content[:at] + struct.pack("<Q", offset) + content[at + 8 :])
        with pytest.raises(CheckpointError, match="overlapping tensors"):
            read_gguf(path)


def test_a_layer_with_one_tensor_each_is_refused_before_a_module_is_built(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [t for t in stored_f32(random_tensors()) if not t[0].startswith("blk.")]
    tensors += [(f"layers.{i}.x", (64,), 0, bytes(256)) for i in range(3000)]
    checkpoint = open_checkpoint(write(with_field("llama.block_count", U32, 3000), tensors))
    monkeypatch.setattr(Llama, "__init__", lambda *_: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.\S+ is missing.*and \d+ more"):
        Llama.from_checkpoint(checkpoint)


def test_more_layers_than_any_model_has_are_refused(write: Callable[..., Path]) -> None:
    tensors = [(f"layers.{i}.x", (1,), 0, bytes(4)) for i in range(5000)]
    tensors += stored_f32(random_tensors())
    with pytest.raises(CheckpointError, match="5000 layers exceed the limit of 4096"):
        open_checkpoint(write(with_field("llama.block_count", U32, 5000), tensors))


@pytest.mark.parametrize(("kind", "items"), [(U8, [3, 255]), (I8, [-1, 7]), (BOOL, [True, False])])
def test_an_array_of_bytes_takes_a_byte_for_each(
    write: Callable[..., Path], kind: int, items: list[Any]
) -> None:
    path = write([("x", ARRAY, (kind, items)), *FIELDS])
    found = read_header(path).fields["x"]
    assert list(found) == items
    assert found == items
    assert [type(item) for item in found] == [type(item) for item in items]
    assert found[-1] == items[-1]
    assert found[1:] == items[1:]
    size = 2**22
    content = path.read_bytes().replace(
        struct.pack("<IQ", kind, 2), struct.pack("<IQ", kind, size + 2) + bytes(size), 1
    )
    path.write_bytes(content + bytes(32))
    tracemalloc.start()
    try:
        assert len(read_header(path).fields["x"]) == size + 2
        assert tracemalloc.get_traced_memory()[1] < 2.5 * size
    finally:
        tracemalloc.stop()


def test_headers_of_too_many_entries_are_refused(
    write: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", 100)
    with pytest.raises(CheckpointError, match="more than 100 strings"):
        read_header(write([*FIELDS, ("x", ARRAY, (STRING, ["a"] * 101))]))
    monkeypatch.setattr(gguf_header, "MAX_TENSORS", 10)
    with pytest.raises(CheckpointError, match="announces 9 keys and 21 tensors"):
        read_header(write())
    monkeypatch.setattr(huggingface, "MAX_TENSORS", 10)
    with pytest.raises(CheckpointError, match=r"it names 2\d tensors; the file is damaged"):
        open_checkpoint(folder)
    monkeypatch.setattr(huggingface, "MAX_HEADER_BYTES", 100)
    with pytest.raises(CheckpointError, match="far larger than any model's"):
        open_checkpoint(folder)


SHAPES = {
    "2^63": [2**63, 0],
    "2^63 - 1": [2**63 - 1, 0],
    "2^64": [2**64, 0],
    "negative": [-1, 0],
    "a fraction": [0.5],
    "overflowing": [2**40, 2**40],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_that_no_tensor_has_is_one_line(folder: Path, shape: list[Any]) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    safetensors(folder / "model.safetensors", {"model.norm.weight": entry})
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_safetensors_that_lie_on_one_another_are_refused(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    safetensors(folder / "model.safetensors", {"a": entry, "b": entry}, bytes(16))
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_pretrained(folder)


SIZES = {
    "num_hidden_layers": 10**9,
    "vocab_size": 2**62,
    "hidden_size": 2**62,
    "intermediate_size": 2**62,
    "num_attention_heads": 2**40,
    "head_dim": 2**61,
    "max_position_embeddings": 2**62,
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_no_tensor_bears_out_is_refused_at_once(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    began = time.process_time()
    for value in (SIZES[name], 10**400, 10**300 + 0.5):
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(folder)
        assert len(str(caught.value).splitlines()) == 1
    assert time.process_time() - began < 5


@pytest.mark.parametrize("shape", [(2**40, 0), (0, 2**40)])
def test_a_tensor_without_numbers_bears_nothing_out(folder: Path, shape: tuple[int, int]) -> None:
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.x"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    safetensors(folder / "model.safetensors", header, content[8 + length :])
    config = json.loads((folder / "config.json").read_text())
    for name in ("vocab_size", "intermediate_size", "hidden_size", "head_dim"):
        (folder / "config.json").write_text(json.dumps(config | {name: 2**40}))
        with pytest.raises(CheckpointError):
            load_pretrained(folder)


def test_names_with_escape_sequences_are_shown_without_them(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["\x1b]0;owned\x07\x9b31m\u202e" + "x" * 10**5] = header.pop("model.norm.weight")
    safetensors(folder / "model.safetensors", header, content[8 + length :])
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 2000
