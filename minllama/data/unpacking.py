"""Decompress an open stream whose first bytes have been read."""

import gzip
import io
from dataclasses import dataclass
from typing import BinaryIO, cast

from minllama.data.lines import reading
from minllama.data.other_forms import GZIP, quoted
from minllama.errors import DataError

HEAD_BYTES = 2**16
# Deflate compresses at most a thousandfold, natural texts at most tenfold.
MAX_RATIO = 500
UNPACKED_FREELY = 2**25


@dataclass
class Beginning:
    """A stream whose first bytes were read in advance.

    Attributes:
        stream: all of it, unpacked.
        head: at least its first line, or HEAD_BYTES; possibly with further bytes.
        is_compressed: whether it was.
    """

    stream: io.BufferedReader
    head: bytes
    name: str
    is_compressed: bool = False


class _Rejoined(io.RawIOBase):
    """The bytes read in advance, followed by the rest of the stream."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head = memoryview(head)
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        data: bytes | memoryview = self._head[: len(buffer)]
        self._head = self._head[len(buffer) :]
        if not data:
            data = self._stream.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        return len(data)


class _Unpacked(io.RawIOBase):
    """A decompressed gzip stream, bounded in size."""

    def __init__(self, packed: BinaryIO, name: str) -> None:
        self._packed = _Counted(packed)
        self._unpacked = gzip.GzipFile(fileobj=io.BufferedReader(self._packed, HEAD_BYTES))
        self._size = 0
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        data = self._unpacked.read1(len(buffer))
        self._size += len(data)
        if self._size > max(UNPACKED_FREELY, MAX_RATIO * self._packed.size):
            raise DataError(
                f"{self._name}: unpacks to more than {MAX_RATIO} times its size; if that is "
                f"intended, unpack it first: gunzip -k {quoted(self._name)}"
            )
        buffer[: len(data)] = data
        return len(data)


class _Counted(io.RawIOBase):
    """A stream that counts the bytes read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        data = self._stream.read1(len(buffer))  # type: ignore[attr-defined]
        self.size += len(data)
        buffer[: len(data)] = data
        return len(data)


def opened(stream: BinaryIO, name: str) -> Beginning:
    """Read the beginning of a stream, decompressing it if it is gzip.

    Raises:
        DataError: it cannot be read.
    """
    beginning = _begun(stream, name, enough=4)
    if not beginning.head.startswith(GZIP):
        return _begun(beginning.stream, name)
    unpacked = io.BufferedReader(_Unpacked(beginning.stream, name), HEAD_BYTES)
    beginning = _begun(unpacked, name)
    if beginning.head.startswith(GZIP):
        raise DataError(f"{name}: is compressed twice; unpack it once with: gunzip {quoted(name)}")
    beginning.is_compressed = True
    return beginning


def _begun(stream: BinaryIO, name: str, enough: int = HEAD_BYTES) -> Beginning:
    """Read up to `enough` bytes, or one line, since an interactive user waits for its result."""
    head = b""
    with reading(f"{name}, line 1"):
        while len(head) < enough and b"\n" not in head.lstrip(b"\r\n\0 \t"):
            data = stream.read1(HEAD_BYTES - len(head))  # type: ignore[attr-defined]
            if not data:
                break
            head += data
    rejoined = io.BufferedReader(cast(io.RawIOBase, _Rejoined(head, stream)), HEAD_BYTES)
    return Beginning(cast(io.BufferedReader, rejoined), head, name)
