"""What a user calls a source of examples -> an open table.

A path wins where it exists, `-` is standard input, anything else may be a data set on the Hugging
Face hub. The format is told by the name of the file, or by an option. Knows nothing of what the
columns mean.
"""

import contextlib
import gzip
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from minllama.data.arrow import EXAMPLE_ID, HubDataset, hub_table, parquet_table, parse_hub_id
from minllama.data.lines import (
    SEPARATOR,
    Lines,
    csv_table,
    json_table,
    jsonl_table,
    labelled_table,
    text_table,
    tsv_table,
)
from minllama.data.records import Table, shown
from minllama.errors import DataError
from minllama.options import DATA_FORMATS

STANDARD_INPUT = "-"

Source = str | os.PathLike[str]

# By the end of a file's name, with or without .gz after it. Lines of text are labelled or not.
_FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "lines",
    "": "lines",
}


@contextlib.contextmanager
def open_table(
    source: Source, data_format: str | None = None, *, labelled: bool = False
) -> Iterator[Table]:
    """Open `source` while the block runs.

    Args:
        source: a path, `-`, or `owner/name[/config][@revision][:split]` on the hub.
        data_format: one of `DATA_FORMATS`; None to tell it by the name.
        labelled: lines of text must be `label ||| sentence`; else the first line decides whether
            they are, or are text alone.

    Raises:
        DataError: there is no such thing, it cannot be opened, or its format is unknown.
    """
    name = os.fspath(source)
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise DataError("standard input is closed; name a file")
        kind = data_format or "lines"
        if kind == "parquet":
            raise DataError("Parquet cannot be read from standard input; name a file")
        yield _stream_table(sys.stdin.buffer, "standard input", kind, labelled)
        return
    if hub_dataset := _on_the_hub(source):
        yield hub_table(hub_dataset, name)
        return
    path = Path(name).expanduser()
    kind = data_format or _format_of(path)
    if kind == "parquet":
        yield parquet_table(path, name)
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}; name a file that you may read") from error
    with file:
        yield _stream_table(file, name, kind, labelled)


def is_source(path: str | os.PathLike[str], source: Source) -> bool:
    """Whether `path` is the file that `source` is read from, by whatever name or link.

    What is written there would be lost to the reader, or read as input in turn.

    Args:
        path: a file that is to be written, or `-` for standard output.
        source: as for `open_table`.
    """
    try:
        written = _stat_of(os.fspath(path), sys.stdout)
        read = _stat_of(os.path.expanduser(source), sys.stdin)
    except (OSError, ValueError, AttributeError):  # no such file, a NUL in a name, a closed stream
        return False
    return stat.S_ISREG(read.st_mode) and os.path.samestat(written, read)


def _stat_of(name: str, stream: TextIO) -> os.stat_result:
    return os.fstat(stream.fileno()) if name == STANDARD_INPUT else os.stat(name)


def _on_the_hub(source: Source) -> HubDataset | None:
    """The data set that `source` names; None where it is a file.

    Raises:
        DataError: it is neither.
    """
    name = os.fspath(source)
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return None
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~nobody, a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{shown(name)}: is no path ({reason})") from error
    if not name or exists:
        # A pipe or a device may have no end, and could not be read twice.
        raise DataError(
            f"{name or 'an empty name'}: not a file; name a file of rows, or pipe it in as -"
        )
    hub_dataset = parse_hub_id(name) if isinstance(source, str) else None
    if hub_dataset is None or _suffix(Path(name)) in set(_FORMATS) - {""}:
        raise DataError(
            f"{shown(name)}: no such file; name a file of rows, or a data set on the Hugging Face "
            f"hub such as {EXAMPLE_ID}"
        )
    return hub_dataset


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix == ".gz" else suffix


def _format_of(path: Path) -> str:
    suffix = _suffix(path)
    if suffix not in _FORMATS:
        raise DataError(
            f"{path}: {suffix} is the name of no format that is read; say which it is with "
            f"--data-format ({', '.join(DATA_FORMATS)})"
        )
    return _FORMATS[suffix]


def _stream_table(stream: BinaryIO, name: str, kind: str, labelled: bool) -> Table:
    buffered = stream if isinstance(stream, io.BufferedReader) else _buffered(stream)
    try:
        start = buffered.peek(2)[:2]
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from error
    if start == b"\x1f\x8b":  # the content says so, with or without the name
        buffered = _buffered(gzip.GzipFile(fileobj=buffered))
    if kind == "json":
        return json_table(buffered, name)
    lines = Lines(buffered, name)
    if kind == "lines":
        if _is_json_object(lines.peek()):
            raise DataError(
                f"{name}: its lines are JSON objects; read them with --data-format jsonl, or as "
                "texts with --data-format text"
            )
        kind = "labelled" if labelled or SEPARATOR in lines.peek() else "text"
    tables = {
        "labelled": labelled_table,
        "text": text_table,
        "csv": csv_table,
        "tsv": tsv_table,
        "jsonl": jsonl_table,
    }
    return tables[kind](lines)


def _is_json_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _buffered(stream: BinaryIO | gzip.GzipFile) -> io.BufferedReader:
    return io.BufferedReader(cast(io.RawIOBase, stream))
