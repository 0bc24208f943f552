"""Sequences of many texts or labels that take no memory by the row: they are in mapped files.

What is small stays in memory. `minllama.data.examples` collects rows here, and the texts and labels
of a `Dataset` are such sequences; other modules keep numbers of its rows in `Column`.
"""

import mmap
import os
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index as as_index
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeVar, overload

from minllama.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")

HELD = 2**20  # bytes of a column that are in memory; of more, all are in a file
LARGE_FILES = "/var/tmp"  # on disk, while /tmp may be in memory (Filesystem Hierarchy Standard)


class Column:
    """Numbers of one type, which are appended and then mapped.

    Its file has no name, so the system removes it with the last of its users.

    Args:
        typecode: the type, as `array` has it.
    """

    def __init__(self, typecode: str) -> None:
        self._held: array[Any] = array(typecode)
        self._most = HELD // self._held.itemsize
        self._file: BinaryIO | None = None

    def append(self, value: float) -> None:
        """Add a number."""
        self._held.append(value)
        if len(self._held) >= self._most:
            self._spill()

    def extend(self, data: "bytes | memoryview") -> None:
        """Add numbers, as the bytes of them."""
        self._held.frombytes(data)
        if len(self._held) >= self._most:
            self._spill()

    def mapped(self) -> "memoryview[Any]":
        """(N,), all that was added; nothing can be added any more."""
        if self._file is None:
            return memoryview(self._held)
        self._spill()
        with self._file:
            found = memoryview(mmap.mmap(self._file.fileno(), 0))
        return found.cast(self._held.typecode)  # type: ignore[arg-type]

    def _spill(self) -> None:
        folder = "temporary files"
        try:
            folder = _folder()
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._file.write(self._held)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"{folder}: cannot keep the rows of a large data set there ({error.strerror}); set "
                "the environment variable TMPDIR to a folder with more room"
            ) from error
        self._held = array(self._held.typecode)


def _folder() -> str:
    """Where files of rows are kept."""
    if not os.environ.get("TMPDIR") and os.access(LARGE_FILES, os.W_OK):
        return LARGE_FILES
    return tempfile.gettempdir()


def zeros(typecode: str, n: int) -> "memoryview[Any]":
    """N zeros to be overwritten, in a file if they are many."""
    column = Column(typecode)
    size = n * array(typecode).itemsize
    # Written, since a mapped file with holes would end the process where the disk is full.
    for start in range(0, size, HELD):
        column.extend(bytes(min(HELD, size - start)))
    return column.mapped()


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How the values of rows are stored.

    Attributes:
        typecode: of the items that a value is stored as, as `array` has it.
        is_ragged: a value may take any number of items of the type, and not just one.
        encode: a value as the bytes of its items.
        decode: a value from its items.
    """

    typecode: str
    is_ragged: bool
    encode: Callable[[T], bytes]
    decode: Callable[["memoryview[Any]"], T]


# Half a character (a lone surrogate) may be in a text that does not come from a file.
def _text_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(part: "memoryview[Any]") -> str:
    return str(part, "utf-8", "surrogatepass")


def _class_bytes(label: int) -> bytes:
    return array("i", (label,)).tobytes()


def _classes_bytes(classes: Iterable[int]) -> bytes:
    return array("i", classes).tobytes()


def _number_bytes(number: float) -> bytes:
    return array("d", (number,)).tobytes()


def _numbers_bytes(numbers: Iterable[float]) -> bytes:
    return array("d", numbers).tobytes()


def _only(part: "memoryview[Any]") -> Any:
    return part[0]


TEXT = Kind[str]("B", True, _text_bytes, _text)
CLASS = Kind[int]("i", False, _class_bytes, _only)
CLASSES = Kind[tuple[int, ...]]("i", True, _classes_bytes, tuple)
NUMBER = Kind[float]("d", False, _number_bytes, _only)
NUMBERS = Kind[tuple[float, ...]]("d", True, _numbers_bytes, tuple)
OBJECT = Kind[Any]("B", True, pickle.dumps, pickle.loads)


class Rows(Sequence[T]):
    """N values, decoded when they are read; equal to a list of them.

    Slices and selections share the stored values.

    Args:
        kind: how they are stored.
        values: the items of all values, one after the other.
        ends: (M,), where each value ends among them; None if each is one item.
        rows: (N,), which of the M values these are; None for all.
    """

    def __init__(
        self,
        kind: Kind[T],
        values: "memoryview[Any]",
        ends: "memoryview[int] | None" = None,
        rows: "memoryview[int] | None" = None,
    ) -> None:
        self.kind = kind
        self._values, self._ends, self._rows = values, ends, rows

    def __len__(self) -> int:
        if self._rows is not None:
            return len(self._rows)
        return len(self._values if self._ends is None else self._ends)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows[T]": ...
    def __getitem__(self, index: int | slice) -> "T | Rows[T]":
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = as_index(index)
        row += len(self) if row < 0 else 0
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._at(row if self._rows is None else self._rows[row])

    def __iter__(self) -> Iterator[T]:
        if self._rows is not None:
            return map(self._at, self._rows)
        if self._ends is None:
            return iter(self._values)
        return self._all()

    def _all(self) -> Iterator[T]:
        assert self._ends is not None
        values, decode, start = self._values, self.kind.decode, 0
        for end in self._ends:
            yield decode(values[start:end])
            start = end

    def _at(self, row: int) -> T:
        if self._ends is None:
            return self.kind.decode(self._values[row : row + 1])
        start = self._ends[row - 1] if row else 0
        return self.kind.decode(self._values[start : self._ends[row]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self)) if len(self) <= 10 else f"[{len(self):,} rows: {self[0]!r}, ...]"

    def __reduce__(self) -> tuple[Any, ...]:
        return stored, (self.kind, list(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "NDArray[Any]":
        import numpy as np

        if self._ends is not None:
            return np.array(list(self), dtype)
        found = np.asarray(self._values)
        if self._rows is not None:
            found = found[np.asarray(self._rows)]
        return np.array(found, dtype) if copy else np.asarray(found, dtype)

    def select(self, indices: Iterable[int]) -> "Rows[T]":
        """The values at indices from 0, in that order."""
        return self.at(row_numbers(indices, len(self)))

    def at(self, rows: "memoryview[int]") -> "Rows[T]":
        """The values of checked rows, which are kept."""
        if self._rows is not None:
            chosen = Column("q")
            for row in rows:
                chosen.append(self._rows[row])
            rows = chosen.mapped()
        return Rows(self.kind, self._values, self._ends, rows)


def row_numbers(indices: Iterable[int], n: int) -> "memoryview[int]":
    """Indices of N rows, from 0, as a column.

    Raises:
        IndexError: there is no such row.
    """
    rows = Column("q")
    for i in indices:
        if not 0 <= i < n:
            raise IndexError(f"row {i} of {n}")
        rows.append(i)
    return rows.mapped()


class RowsBuilder(Generic[T]):
    """Collects values for `Rows`."""

    def __init__(self, kind: Kind[T]) -> None:
        self._kind, self._count, self._end = kind, 0, 0
        self._values, self._ends = Column(kind.typecode), Column("q")
        self._itemsize = array(kind.typecode).itemsize

    def __len__(self) -> int:
        return self._count

    def append(self, value: T) -> None:
        """Add a value."""
        data = self._kind.encode(value)
        self._values.extend(data)
        self._count += 1
        if self._kind.is_ragged:
            self._end += len(data) // self._itemsize
            self._ends.append(self._end)

    def rows(self) -> Rows[T]:
        """The values; none can be added any more."""
        ends = self._ends.mapped() if self._kind.is_ragged else None
        return Rows(self._kind, self._values.mapped(), ends)


def stored(kind: Kind[T], values: Iterable[T]) -> Rows[T]:
    """The values as rows."""
    builder = RowsBuilder(kind)
    for value in values:
        builder.append(value)
    return builder.rows()
