"""Parse the header of a GGUF file: key/value pairs and tensor positions.

Supports versions 2 and 3, little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Every count, length and offset is
checked against the file's size before use, so that a truncated or malicious file raises an error
without using much memory or time. `minllama.checkpoints.gguf` calls it.
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from minllama.errors import CheckpointError
from minllama.quantization.gguf_blocks import GGMLType, ggml_type

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
# Far above any real vocabulary or chat template, but too little to exhaust memory.
MAX_ARRAY_LEN = 2**24
MAX_STRING_BYTES = 2**24
MAX_ARRAY_DEPTH = 4
MAX_STRINGS = 2**22  # in all arrays together, five times the largest vocabulary and its merges
MAX_FIELDS = 2**16
MAX_TENSORS = 2**17  # a hundred times those of Llama 3.1 405B

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
# Value types by their number in the file; 8 is a string and 9 an array.
_SCALARS = dict(enumerate("BbHhIif")) | {7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """The position of one tensor in a GGUF file.

    Attributes:
        name: its name there, `blk.0.attn_q.weight`.
        shape: outermost dimension first, as torch counts (the file counts the other way).
        type: its storage format.
        offset: of its first byte from the start of the file.
        n_bytes: its size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    n_bytes: int


class NumberArray(Sequence[Any]):
    """An array of numbers as stored in the file: a Python list needs nine bytes or more for each.

    (In the machine's byte order, which must be the file's.)
    """

    def __init__(self, content: bytes, code: str) -> None:
        self._items = memoryview(content).cast(code)  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index].tolist() if isinstance(index, slice) else self._items[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._items.tolist() == list(other)

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 8 else ""
        return f"[{', '.join(map(repr, self[:8]))}{more}]"


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file.

    Attributes:
        fields: key -> plain Python value; an array is a list, or a `NumberArray`.
        tensors: name -> position.
    """

    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that starts like GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> GGUFHeader:
    """Parse the head of the GGUF file at `path`.

    Raises:
        CheckpointError: it cannot be read, is no GGUF file, is big-endian or of another version,
            is truncated or inconsistent.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(data, path).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


class _Parser:
    """Reads forward through `data`; `offset` is the next unread byte."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.size = len(data)
        self.path = path
        self.offset = len(MAGIC)
        self.strings_left = MAX_STRINGS

    def header(self) -> GGUFHeader:
        version = self.u32()
        if version & 0xFFFF == 0:  # a small number in the wrong byte order
            self.fail("is big-endian; convert it to little-endian first (gguf-convert-endian)")
        if version not in VERSIONS:
            self.fail(f"is GGUF version {version}, but only versions 2 and 3 are supported")
        n_tensors = self.count("tensors", min_bytes=24)  # name, n_dims, one dim, type, offset
        n_fields = self.count("key/value pairs", min_bytes=13)  # key, type, value
        if n_fields > MAX_FIELDS or n_tensors > MAX_TENSORS:
            self.fail(f"announces {n_fields} keys and {n_tensors} tensors; the file is damaged")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.string()
            if key in fields:
                self.fail(f"has a duplicate key {key!r}")
            fields[key] = self.value(self.u32(), depth=0)
        infos = [self.tensor_info() for _ in range(n_tensors)]
        return GGUFHeader(fields, self.placed(infos, fields.get("general.alignment")))

    def tensor_info(self) -> GGUFTensor:
        """One tensor's entry, with an offset relative to the first tensor."""
        name = self.string()
        n_dims = self.u32()
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"has a tensor {name!r} with {n_dims} dimensions; the file is damaged")
        dims = [self.u64() for _ in range(n_dims)]
        type_id = self.u32()
        stored = ggml_type(type_id)
        if stored is None:
            self.fail(f"stores the tensor {name!r} as type {type_id}, which is unknown")
        if 0 in dims or dims[0] % stored.block_len:
            self.fail(
                f"has a tensor {name!r} with rows of {dims[0]}, which {stored.name} does not allow"
            )
        shape = tuple(reversed(dims))
        return GGUFTensor(name, shape, stored, self.u64(), stored.n_bytes(shape))

    def placed(self, infos: list[GGUFTensor], alignment: Any) -> dict[str, GGUFTensor]:
        """The tensors by name, with offsets from the start of the file, within its size."""
        if alignment is None:
            alignment = DEFAULT_ALIGNMENT
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"has general.alignment {alignment!r}, which must be a power of two")
        start = -(-self.offset // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for info in infos:
            offset = start + info.offset
            if info.offset % alignment:
                self.fail(f"has the tensor {info.name!r} off its alignment of {alignment}")
            if offset + info.n_bytes > self.size:
                self.fail(
                    f"is truncated: the tensor {info.name!r} ends at byte {offset + info.n_bytes}, "
                    f"the file at {self.size}; download it again"
                )
            if info.name in tensors:
                self.fail(f"has a duplicate tensor {info.name!r}")
            tensors[info.name] = GGUFTensor(info.name, info.shape, info.type, offset, info.n_bytes)
        end = 0
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:  # a small file could imply gigabytes of tensors
                self.fail(f"has overlapping tensors at {tensor.name!r}; the file is damaged")
            end = tensor.offset + tensor.n_bytes
        return tensors

    def value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            layout = struct.Struct(f"<{_SCALARS[kind]}")
            return layout.unpack_from(self.data, self.advance(layout.size))[0]
        if kind != _ARRAY or depth == MAX_ARRAY_DEPTH:
            self.fail(f"has a value of type {kind} (at byte {self.offset}); the file is damaged")
        item_kind = self.u32()
        if item_kind == _STRING:
            return self.strings(self.array_len(min_bytes=8))
        if item_kind in _SCALARS:
            code = _SCALARS[item_kind]
            return self.number_array(code, self.array_len(min_bytes=struct.calcsize(code)))
        return [self.value(item_kind, depth + 1) for _ in range(self.array_len(min_bytes=12))]

    def number_array(self, code: str, count: int) -> NumberArray:
        start = self.advance(count * struct.calcsize(f"<{code}"))
        return NumberArray(self.data[start : self.offset], code)

    def u32(self) -> int:
        value: int = _U32.unpack_from(self.data, self.advance(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self.data, self.advance(8))[0]
        return value

    def count(self, item_name: str, min_bytes: int) -> int:
        """A count of items of at least `min_bytes` each, checked against the rest of the file."""
        count = self.u64()
        if count * min_bytes > self.size - self.offset:
            self.fail(
                f"is truncated or damaged: it announces {count} {item_name}; download it again"
            )
        return count

    def array_len(self, min_bytes: int) -> int:
        length = self.count("array items", min_bytes)
        if length > MAX_ARRAY_LEN:
            self.fail(f"has an array of {length} items; the file is damaged")
        return length

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` strings; a vocabulary has tens of thousands, hence a plain loop."""
        self.strings_left -= count
        if self.strings_left < 0:
            self.fail(f"has more than {MAX_STRINGS} strings; the file is damaged")
        data, size, offset, unpack = self.data, self.size, self.offset, _U64.unpack_from
        encoded = []
        for _ in range(count):
            start = offset + 8
            if start > size:
                self.fail_truncated()
            length = unpack(data, offset)[0]
            offset = start + length
            if offset > size:
                self.fail_truncated()
            if length > MAX_STRING_BYTES:
                self.fail(f"has a string of {length} bytes; the file is damaged")
            encoded.append(data[start:offset])
        self.offset = offset
        try:
            return [str(text, "utf-8") for text in encoded]
        except UnicodeDecodeError:
            self.fail(f"has a string (before byte {offset}) that is not UTF-8; the file is damaged")

    def advance(self, n_bytes: int) -> int:
        """Advance past the next `n_bytes`, which must be in the file; returns their offset."""
        start = self.offset
        if start + n_bytes > self.size:
            self.fail_truncated()
        self.offset = start + n_bytes
        return start

    def fail_truncated(self) -> NoReturn:
        self.fail(f"is truncated in its header (at byte {self.size}); download it again")

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path} {problem}")
