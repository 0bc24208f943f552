"""Read untrusted files of `torch.save`.

The pickle is interpreted instead of executed (`minllama.checkpoints.pickled`), and the tensors'
data is mapped into memory. The readers of pickled checkpoints call it.
"""

import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minllama.checkpoints.pickled import (
    MAX_BYTES,
    OtherTensor,
    RefusedPickle,
    Storages,
    read_pickle,
)
from minllama.errors import CheckpointError
from minllama.quantization.gguf_blocks import view_as

ZIP_MAGIC = b"PK\x03\x04"
# torch.save before 1.6, and plain pickles: opcode PROTO and a protocol number.
PICKLE_MAGICS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
LEGACY_NUMBER = 0x1950A86A20F9469CFC6C  # the first value in a file of torch.save's before 1.6
# A zip's directory has some 70 bytes for each storage; zipfile makes ten times as many of them.
MAX_DIRECTORY_BYTES = 2**24


def is_torch_file(path: Path) -> bool:
    """Whether the file begins like one of torch.save; it may still be damaged."""
    with path.open("rb") as file:
        return _is_magic(file.read(4))


def _is_magic(start: bytes) -> bool:
    """Whether a file of torch.save may begin with these four bytes.

    No opcode is NUL: 80 02 00 00 is the width 640 in a file of llama2.c's.
    """
    return start == ZIP_MAGIC or (start[:2] in PICKLE_MAGICS and start[2:3] != b"\0")


def load_torch_file(path: Path) -> dict[str, Any]:
    """The dict in a file that `torch.save` wrote; its tensors are on the CPU, memory-mapped.

    In files from before torch 1.6 data may be unaligned; it is copied.

    Raises:
        CheckpointError: the file is missing, empty, truncated or damaged; its pickle contains
            code; it contains something other than a dict with string keys.
    """
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file, so it cannot be mapped")
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not magic:
        raise CheckpointError(f"{path} is empty; download it again")
    if not _is_magic(magic):
        raise CheckpointError(f"{path} was not written by torch.save")
    try:
        values = _load_zip(path) if magic == ZIP_MAGIC else _load_legacy(path)
    except RefusedPickle as error:
        raise CheckpointError(
            f"{path} is refused: its pickle calls {error}, and such a pickle can run arbitrary "
            "code; get the weights as safetensors"
        ) from error
    except (ValueError, struct.error, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({str(error)[:120]}); download it again"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError(
            f"{path} contains a {type(values).__name__}, not a state dict (names -> tensors)"
        )
    return values


def dense_tensors(values: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The entries of a state dict from `path`, which must all be dense tensors.

    Two names may share numbers, as a tied embedding and output do; in all there are at most twice
    as many as the file has, however often it names them.

    Raises:
        CheckpointError: an entry is no tensor or not dense, or the file names the same numbers so
            often that they would take more memory than it explains.
    """
    left = 2 * path.stat().st_size
    for name, value in values.items():
        if isinstance(value, OtherTensor):
            raise CheckpointError(
                f"{path}: the tensor {name!r} is not a plain dense tensor ({value.kind})"
            )
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(
                f"{path}: {name!r} is of type {kind}, not a tensor; save the model's "
                "state_dict() alone"
            )
        left -= value.numel() * value.element_size()
        if left < 0:
            raise CheckpointError(
                f"{path}: its tensors share storage so often that they are several times larger "
                "than the file; it is damaged"
            )
    return dict(values)


def first_pickle(path: Path) -> bytes:
    """The pickle of a file of torch.save, or the beginning of an old one; empty if damaged."""
    try:
        with path.open("rb") as file:
            if file.read(4) != ZIP_MAGIC:
                file.seek(0)
                return file.read(MAX_BYTES)
        return _zip_content(path)[1]
    except (CheckpointError, ValueError, struct.error, OSError):  # reading it reports the problem
        return b""


def _load_zip(path: Path) -> Any:
    """The value in a file of torch 1.6 and later: a pickle, and a record for each storage."""
    entries, pickled = _zip_content(path)
    mapped = _mapped(path)

    def record(key: Any, n_bytes: int) -> Tensor:
        entry = entries[f"data/{key}"]
        header = mapped[entry.header_offset : entry.header_offset + 30].numpy().tobytes()
        if header[:4] != ZIP_MAGIC:
            raise ValueError("a record is not where the zip directory says")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        return _within(mapped[: start + entry.file_size], start, n_bytes)

    return read_pickle(BytesIO(pickled), _storages(record))


def _zip_content(path: Path) -> tuple[dict[str, zipfile.ZipInfo], bytes]:
    """The entries of the archive by their names in it, and the pickle."""
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            named = {entry.filename.partition("/")[2]: entry for entry in entries}
            byteorder = named.get("byteorder")
            if byteorder is not None and archive.read(byteorder) == b"big":
                raise CheckpointError(
                    f"{path} was written on a big-endian machine; save it again on a "
                    "little-endian one"
                )
            return named, archive.read(named["data.pkl"])
    except (zipfile.BadZipFile, KeyError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged (a zip file without a readable directory); download "
            "it again"
        ) from error


def _check_directory(path: Path) -> None:
    """Refuse a directory of millions of entries before they are read (APPNOTE.TXT, 4.3.14-16)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 42))
        tail = file.read()
        end = tail.rfind(b"PK\5\6")
        sizes = [struct.unpack_from("<I", tail, end + 12)[0]] if end >= 0 else [0]
        if tail[max(0, end - 20) :][:4] == b"PK\6\7":
            file.seek(struct.unpack_from("<Q", tail, end - 12)[0])
            sizes = [struct.unpack("<Q", file.read(48)[40:])[0]]
    if max(sizes) > MAX_DIRECTORY_BYTES:
        raise ValueError("the zip directory is far larger than a state dict's")


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is refused: it is TorchScript, which can run arbitrary code; save the state "
            "dict instead"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive, but was not written by torch.save")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path} was compressed after torch.save wrote it, so it cannot be mapped into memory; "
            "save it again with torch.save"
        )
    pickled = entries[names.index("data.pkl")].file_size
    if pickled > MAX_BYTES or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries are larger than the file")


def _load_legacy(path: Path) -> Any:
    """The value in a file of torch before 1.6: five pickles, then each storage after its length."""
    with path.open("rb") as stream:
        file = BytesIO(stream.read(MAX_BYTES))
    if read_pickle(file, _no_storage) != LEGACY_NUMBER:
        raise ValueError("it is a pickle that torch.save did not write")
    read_pickle(file, _no_storage)  # the version of the file format
    system = read_pickle(file, _no_storage)
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("it was written on a big-endian machine")
    begin, widths = file.tell(), dict[Any, int]()

    def measured(key: Any, dtype: torch.dtype, count: int) -> Tensor:
        widths[key] = dtype.itemsize
        return torch.empty(count, dtype=dtype, device="meta")

    read_pickle(file, measured)  # records the item size of each storage
    keys = read_pickle(file, _no_storage)
    if not isinstance(keys, list):
        raise ValueError("it has no list of storages")
    mapped, offset, extents = _mapped(path), file.tell(), dict[Any, tuple[int, int]]()
    for key in keys:
        if key not in widths or key in extents:
            raise ValueError("its storages do not match its tensors")
        count = struct.unpack("<q", _within(mapped, offset, 8).numpy().tobytes())[0]
        extents[key] = (offset + 8, count * widths[key])
        _within(mapped, *extents[key])
        offset = sum(extents[key])

    def record(key: Any, n_bytes: int) -> Tensor:
        start, size = extents[key]
        return _within(mapped[: start + size], start, n_bytes)

    file.seek(begin)
    return read_pickle(file, _storages(record))


def _mapped(path: Path) -> Tensor:
    """All bytes of a file, (n_bytes,) uint8.

    The mapping is private: torch has tensors writable, and writing to these must not reach the
    file.
    """
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _within(data: Tensor, start: int, n_bytes: int) -> Tensor:
    if n_bytes < 0 or start + n_bytes > len(data):
        raise ValueError("a storage is larger than its data in the file")
    return data[start : start + n_bytes]


def _no_storage(key: Any, dtype: torch.dtype, count: int) -> Tensor:
    raise ValueError("a tensor is in an unexpected place")


def _storages(record: Callable[[Any, int], Tensor]) -> Storages:
    """The values of each storage, read once; `record` takes a key and their count."""
    read_storages: dict[Any, Tensor] = {}

    def storage_values(key: Any, dtype: torch.dtype, count: int) -> Tensor:
        if key not in read_storages:
            read_storages[key] = view_as(record(key, count * dtype.itemsize), dtype)
        values = read_storages[key]
        if values.dtype != dtype or len(values) != count:
            raise ValueError("a storage is declared with two types")
        return values

    return storage_values
