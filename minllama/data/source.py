"""Open a data source as a table: a path, `-` for standard input, or a Hugging Face dataset.

An existing path takes precedence. The format comes from an option or the file's name; content in
another format is refused with advice on how to read it.
"""

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from minllama.data.arrow import EXAMPLE_ID, HubDataset, hub_table, parquet_table, parse_hub_id
from minllama.data.formats import table_of
from minllama.data.other_forms import PARQUET, refuse_binary
from minllama.data.records import Table
from minllama.data.unpacking import Beginning, opened
from minllama.errors import DataError, OptionError
from minllama.options import DATA_FORMATS, DataOptions
from minllama.text import shown

STANDARD_INPUT = "-"

Source = str | os.PathLike[str]
WILD = re.compile(r"[*?\[]")  # in a pattern of paths

# Formats by suffix, with or without .gz. Lines of text may have labels.
FORMATS = {
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
    source: Source, options: DataOptions | None = None, *, labelled: bool = False
) -> Iterator[Table]:
    """Open `source` while the block runs.

    Args:
        source: a path, `-`, or `owner/name[/config][@revision][:split]` on the hub.
        options: format, encoding, separator and columns; formats that are not given follow from the
            name, or of standard input by the first lines.
        labelled: lines of text must be `label ||| sentence`; else the first line decides whether
            they are, or are text alone.

    Raises:
        DataError: there is no such thing, it cannot be opened, or it is in no format that is read.
    """
    options = options or DataOptions()
    name = os.fspath(source)
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise DataError("standard input is closed; name a file")
        if options.data_format == "parquet":
            raise DataError("Parquet cannot be read from standard input; name a file")
        beginning = opened(sys.stdin.buffer, "standard input")
        if beginning.head.startswith(PARQUET):
            raise DataError("Parquet cannot be read from standard input; name a file")
        yield table_of(beginning, options.data_format, options, labelled=labelled)
        return
    if hub_dataset := _on_the_hub(source):
        _refuse_for(options, name)
        yield hub_table(hub_dataset, name)
        return
    path = Path(name).expanduser()
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}; name a readable file") from error
    with file:
        beginning = opened(file, name)
        kind = _format_of(path, beginning, options.data_format)
        if kind == "parquet":
            _refuse_for(options, name)
            yield parquet_table(path, name)
        else:
            yield table_of(beginning, kind, options, labelled=labelled)


def _refuse_for(options: DataOptions, name: str) -> None:
    """Refuse options for text files if the source is not one.

    Raises:
        OptionError: names it.
    """
    given = {
        # Label names may be in that encoding.
        "--encoding": options.encoding if options.label_names is None else None,
        "--separator": options.separator,
        "--no-header": options.no_header,
        "--columns": options.columns,
    }
    if flags := [flag for flag, value in given.items() if value]:
        raise OptionError(
            f"{name}: {', '.join(flags)}: only for text files, and this file has typed columns"
        )


def is_several(source: str) -> bool:
    """Whether a name is a folder, a pattern or a URI, rather than a file or a dataset's id."""
    if "://" in source:
        return True
    path = Path(source).expanduser()
    try:
        return path.is_dir() or (WILD.search(source) is not None and not path.exists())
    except (OSError, ValueError):
        return False


def is_source(path: str | os.PathLike[str], source: Source) -> bool:
    """Whether `path` is the file that `source` is read from, under any name or link.

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
    """The data set that `source` names; None for files.

    Raises:
        DataError: it is neither.
    """
    name = os.fspath(source)
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return None
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown ~user, a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{shown(name)}: is not a path ({reason})") from error
    if not name or exists:
        # A pipe or a device may have no end, and could not be read twice.
        raise DataError(
            f"{name or 'an empty name'}: not a file; name a file, or - for standard input"
        )
    hub_dataset = parse_hub_id(name) if isinstance(source, str) else None
    if hub_dataset is None or _suffix(Path(name)) in set(FORMATS) - {""}:
        raise DataError(
            f"{shown(name)}: no such file; name a file, or a Hugging Face dataset such as "
            f"{EXAMPLE_ID}"
        )
    return hub_dataset


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix == ".gz" else suffix


def _format_of(path: Path, beginning: Beginning, requested: str | None) -> str:
    """The format by content if that contradicts the name, else as requested or by the name."""
    if beginning.head.startswith(PARQUET) and not beginning.is_compressed:
        return "parquet"
    refuse_binary(beginning.head, str(path))
    suffix = _suffix(path)
    kind = requested or FORMATS.get(suffix)
    if kind is None:
        raise DataError(
            f"{path}: unknown extension {suffix}; give the format with --data-format "
            f"({', '.join(DATA_FORMATS)})"
        )
    if kind == "parquet" and beginning.is_compressed:
        raise DataError(f"{path}: Parquet compressed with gzip is not supported; gunzip it")
    return kind
