"""What a reader is, and the registry of all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.mutations import Mutator, binary


@dataclass
class Reader:
    """How one kind of file is read.

    Attributes:
        seeds: good files.
        open: reads a file of these bytes.
        mutate: damages one in the ways that its format invites.
    """

    seeds: list[bytes]
    open: Callable[[bytes], object]
    mutate: Mutator = binary


Factory = Callable[[Path], Reader]
READERS: dict[str, Factory] = {}


def reader(*names: str) -> Callable[[Callable[..., Reader]], Callable[..., Reader]]:
    """Register a factory under each name; with several, it is told which."""

    def register(make: Callable[..., Reader]) -> Callable[..., Reader]:
        for name in names:
            READERS[name] = make if len(names) == 1 else _named(make, name)
        return make

    return register


def _named(make: Callable[..., Reader], name: str) -> Factory:
    return lambda folder: make(folder, name)


def writing(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """A function of the content of the file at `path`."""

    def open_bytes(data: bytes) -> object:
        path.write_bytes(data)
        return read()

    return open_bytes
