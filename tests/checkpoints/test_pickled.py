"""Pickles of torch's: all that checkpoints are made of is read, nothing else is run or grows."""

import collections
import datetime
import io
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minllama.checkpoints.torch_file import dense_tensors, load_torch_file
from minllama.errors import CheckpointError


def saved(path: Path, pickled: bytes, data: dict[str, bytes] | None = None) -> Path:
    """A file as torch writes it, around a pickle made by hand."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, content in (data or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return path


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def same(one: Any, other: Any) -> bool:
    if isinstance(other, torch.Tensor):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        if not other.dtype.is_floating_point or other.dtype.itemsize > 1:
            return bool(same_kind and torch.equal(one, other))
        return bool(same_kind and torch.equal(one.view(torch.uint8), other.view(torch.uint8)))
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in other)
    if isinstance(other, list | tuple | set):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def training_checkpoint() -> dict[str, Any]:
    """What a training script saves: model, optimizer, schedule, arguments."""
    model = torch.nn.Linear(3, 4)
    model.weight._is_hf_initialized = True  # an attribute, as transformers leaves it
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 3])
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    return {
        "model": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "milestones": collections.Counter(schedule.state_dict()["milestones"]),
        "model_args": {"dim": 3, "rope": None, "tied": True, "eps": 1e-5, "large": 2**40},
        "best_val_loss": torch.tensor(1.5),
        "rng": torch.get_rng_state(),
        "names": {"a", "b"},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_training_checkpoint_is_read_as_torch_reads_it(tmp_path: Path, protocol: int) -> None:
    path, saved_values = tmp_path / "ckpt.pt", training_checkpoint()
    torch.save(saved_values, path, pickle_protocol=protocol)
    found = load_torch_file(path)
    assert sorted(found.pop("names")) == sorted(saved_values.pop("names"))
    assert same(found, saved_values)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_numpy_beside_the_weights_are_passed_over(
    tmp_path: Path, protocol: int, legacy: bool
) -> None:
    # What trainers keep: the best loss as numpy has it, the state of its generator.
    values = {
        "model": {"w": torch.arange(6.0)},
        "best": np.float64(1.5),
        "step": np.int64(3),
        "rng": np.random.get_state(),
        "losses": [np.float32(2), np.arange(5.0)],
        "iter_num": 7,
    }
    torch.save(
        values,
        tmp_path / "x.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    found = load_torch_file(tmp_path / "x.pt")
    assert torch.equal(found["model"]["w"], torch.arange(6.0))
    assert found["iter_num"] == 7
    assert found.keys() == values.keys()


def test_keys_of_every_scalar_kind_are_read(tmp_path: Path) -> None:
    history = {(1, 2): 3, 0.5: 2, -1: 1, 2**40: 4, "loss": 5, None: 6}
    torch.save({"w": torch.ones(2), "history": history}, tmp_path / "x.pt")
    found = load_torch_file(tmp_path / "x.pt")
    assert torch.equal(found["w"], torch.ones(2))
    assert list(found["history"].values()) == list(history.values())


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_every_kind_are_read_as_torch_reads_them(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "x.pt"
    base = torch.arange(60, dtype=torch.float32)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]
    state = {
        "transposed": base.view(5, 12).t(),
        "rows": base.view(5, 12)[1:3],
        "every other": base[::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "tied": base,
        **{str(dtype): torch.arange(5).to(dtype) for dtype in dtypes},
    }
    if not legacy:
        state["uint16"] = torch.arange(5).to(torch.uint16)
        state["float8"] = torch.arange(5.0).to(torch.float8_e4m3fn)
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    assert same(load_torch_file(path), torch.load(path, weights_only=True))
    assert load_torch_file(path).keys() == state.keys()


def test_what_python_2_wrote_is_read(tmp_path: Path) -> None:
    # collections.OrderedDict with its items as a list, byte strings, __builtin__.
    items = b"](](U\x01aK\x01e](U\x01bc__builtin__\nset\n](K\x05e\x85Ree"
    path = saved(tmp_path / "x.pt", b"\x80\x02ccollections\nOrderedDict\n" + items + b"\x85R.")
    assert load_torch_file(path) == {"a": 1, "b": [5]}


@pytest.mark.parametrize(
    ("pickled", "named"),
    [
        (b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\xc0\x00\x85R.", "builtins.bytearray"),
        (b"c_codecs\nencode\n" + text("A") + text("hex") + b"\x86R.", "_codecs.encode"),
        (b"cos\nsystem\n" + text("true") + b"\x85R.", "os.system"),
        (b"cbuiltins\neval\n" + text("1") + b"\x85R.", "builtins.eval"),
        (b"cbuiltins\ncomplex\nK\x01\x85R.", "builtins.complex"),
        (b"ctorch._utils\n_rebuild_wrapper_subclass\n)R.", "_rebuild_wrapper_subclass"),
        (b"ctorch\n_utils\n.", "torch._utils"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\n", "os.system"),
    ],
)
def test_a_pickle_that_names_anything_else_is_refused(
    tmp_path: Path, pickled: bytes, named: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"is refused: its pickle calls \S*{named}"):
        load_torch_file(saved(tmp_path / "x.pt", b"\x80\x02" + pickled))


def test_python_s_own_objects_are_refused_by_name(tmp_path: Path) -> None:
    for value in (bytearray(3), datetime.date(2026, 1, 1), 1j):
        torch.save({"a": value}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="is refused: its pickle calls"):
            load_torch_file(tmp_path / "x.pt")


def doubled_lists() -> bytes:
    return b"]q\x00" + b"]q\x00(h\x00h\x00e" * 40


BOMBS = {
    "a call for a long tuple, over and over": (
        b"(" + b"K\x01" * 100_000 + b"tq\x00(" + b"ctorch\nSize\nq\x01h\x00\x85R" * 20_000 + b"t."
    ),
    "OrderedDicts of the same items": (
        b"](" + b"]q\x00(K\x01K\x02e" * 20_000 + b"eq\x010("
        b"ccollections\nOrderedDict\nq\x02h\x01\x85R" + b"h\x02h\x01\x85R" * 50_000 + b"t."
    ),
    "attributes of many objects": (
        b"}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(60_000)) + b"uq\x00"
        b"(ccollections\nOrderedDict\nq\x01" + b"h\x01)Rh\x00b" * 50_000 + b"t."
    ),
    "lists in lists, doubled": doubled_lists() + b".",
    "a deep nest of tuples as a key": b"}K\x01" + b"\x85" * 50_000 + b"Ns.",
    "a deep nest of lists": b"](" * 60_000 + b"e" * 60_000 + b".",
    "keys that collide": (
        b"}("
        + b"".join(
            b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(50_000)
        )
        + b"u."
    ),
    "millions of empty sets": b"(" + b"\x8f" * 2_000_000 + b"t.",
    "the longest of pickles": b"N0" * 2_000_000 + b".",
}


@pytest.mark.parametrize("pickled", BOMBS.values(), ids=BOMBS)
def test_a_small_pickle_takes_little_memory_and_time(tmp_path: Path, pickled: bytes) -> None:
    path = saved(tmp_path / "x.pt", b"\x80\x04" + pickled)
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"damaged|not a state dict"):
            load_torch_file(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6 + 3 * len(pickled)
    assert time.process_time() - began < 30  # several times slower while memory is traced


def tensor(key: str, count: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The opcodes of one tensor over a storage of float32."""

    def tuple_of(numbers: tuple[int, ...]) -> bytes:
        packed = (n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True) for n in numbers)
        return b"(" + b"".join(b"\x8a" + bytes([len(p)]) + p for p in packed) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += b"J" + struct.pack("<i", count) + b"tQ"
    rest = b"K\x00" + tuple_of(size) + tuple_of(stride) + b"\x89)"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (tensor("0", 4, (4,), (1,)), None),
        (tensor("0", 5, (5,), (1,)), "larger than its data in the file"),
        (tensor("0", 4, (5,), (1,)), "larger than its data in the file"),
        (tensor("0", 4, (2, 2), (3, 1)), "larger than its data in the file"),
        (tensor("0", 4, (1000,), (0,)), "larger than its data in the file"),
        (tensor("0", 4, (2**40, 2**40), (0, 0)), "larger than its data in the file"),
        (tensor("0", 4, (2**70, 0), (1, 1)), "damaged"),
        (tensor("0", 4, (-1,), (1,)), "contains something other than integers"),
        (tensor("0", 4, (2, 2), (-1, 1)), "contains something other than integers"),
        (tensor("0", 4, (2,), (1, 1)), "differ in length"),
        (tensor("0", -4, (1,), (1,)), "damaged"),
        (tensor("1", 4, (4,), (1,)), "damaged"),
        (tensor("../../0", 4, (4,), (1,)), "damaged"),
    ],
)
def test_a_tensor_does_not_leave_its_storage(
    tmp_path: Path, made: bytes, message: str | None
) -> None:
    content = struct.pack("<4f", 1, 2, 3, 4)
    path = saved(tmp_path / "x.pt", b"\x80\x02}" + text("a") + made + b"s.", {"0": content})
    if message is None:
        assert load_torch_file(path)["a"].tolist() == [1, 2, 3, 4]
        return
    with pytest.raises(CheckpointError, match=message):
        load_torch_file(path)


def test_tied_weights_are_read_and_a_crowd_of_names_for_one_storage_is_refused(
    tmp_path: Path,
) -> None:
    path, matrix = tmp_path / "x.pt", torch.ones(300, 300)
    torch.save({"tok_embeddings.weight": matrix, "output.weight": matrix}, path)
    assert len(dense_tensors(load_torch_file(path), path)) == 2
    torch.save({str(i): matrix for i in range(100)}, path)
    with pytest.raises(CheckpointError, match="share storage so often"):
        dense_tensors(load_torch_file(path), path)


def test_a_directory_of_millions_of_entries_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path)
    entry = b"PK\1\2" + bytes(42)
    directory = entry * (2**25 // len(entry))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(directory), 0, 0)
    path.write_bytes(b"PK\3\4" + directory + end)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="file without a readable directory"):
            load_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(CheckpointError, match="big-endian machine"):
        load_torch_file(tmp_path / "x.pt")


def test_a_legacy_file_whose_storages_are_not_there_is_refused(tmp_path: Path) -> None:
    path, buffer = tmp_path / "x.pt", io.BytesIO()
    torch.save({"a": torch.ones(1000)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    for change in (content[:-4], content.replace(b"M\xe8\x03", b"M\xff\x7f")):
        path.write_bytes(change)
        with pytest.raises(CheckpointError, match="damaged"):
            load_torch_file(path)
