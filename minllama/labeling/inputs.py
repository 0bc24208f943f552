"""Find the files of a folder, a pattern or a URI, and read their rows in Arrow tables.

Paths and URIs (`s3://`, `gs://`, `file://`) go through Arrow's file systems. Text formats
are read by `minllama.data`, so that a row that cannot be used is a row with a reason; Parquet by
Arrow. Both engines read here: the same files give the same rows, with the same numbers.
"""

import io
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from minllama.data.columns import find_columns
from minllama.data.dataset import rows_of
from minllama.data.formats import table_of
from minllama.data.records import BadRow, BadRows, Record
from minllama.data.source import FORMATS, WILD
from minllama.data.unpacking import opened
from minllama.errors import DataError, OptionError, optional_import
from minllama.options import DataOptions
from minllama.text import first_few, first_line, listed, shown

# Columns that a row gets here; `row_id` is unique over all files, and the same in every run.
ROW_ID, FILE, INDEX, TEXT, ERROR = "row_id", "file", "index", "text", "error"
OWN_COLUMNS = (ROW_ID, FILE, INDEX, TEXT, ERROR)
FROM_INPUT = "input_"  # before a kept column with a name of the output's own
ROWS_OF_A_FILE = 2**40  # row_id = ROWS_OF_A_FILE * (number of the file) + index


@dataclass(frozen=True)
class Inputs:
    """The files to label.

    Attributes:
        filesystem: Arrow's.
        paths: in it, sorted: a file's number is its place.
        sizes: in bytes.
        base: folder that all of them are in.
        data_format: of all of them.
    """

    filesystem: Any = field(repr=False)
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    base: str
    data_format: str

    def name_of(self, path: str) -> str:
        """A file's path within the base folder."""
        return posixpath.relpath(path, self.base)


def find_inputs(source: str, data_format: str | None = None) -> Inputs:
    """The files that `source` names.

    Args:
        source: a file, a folder (all files below it whose format is known), or a pattern with `*`,
            `?`, `[...]` and `**` for any folders; as a path or as a URI.
        data_format: one of DATA_FORMATS; None to tell it from the names.

    Raises:
        DataError: there are none, they are of different formats, or cannot be listed.
        MinllamaError: Arrow is not installed.
    """
    fs = optional_import("pyarrow.fs", f"{shown(source)}: labeling files needs")
    import pyarrow as pa

    try:
        filesystem, base, pattern = _located(fs, source)
        found = _listed_files(fs, filesystem, base, pattern)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{shown(source)}: cannot be listed ({first_line(error)}); check the name and, for a "
            "bucket, the access"
        ) from error
    chosen = [
        info
        for info in found
        if pattern is not None or data_format is not None or _format_by_name(info.path)
    ]
    if not chosen:
        raise DataError(
            f"{shown(source)}: no files ({', '.join(filter(None, FORMATS))}); name a folder, a "
            "file, or a quoted pattern such as 'data/*.parquet'"
        )
    kinds = {data_format or _format_by_name(info.path): info.path for info in chosen}
    if None in kinds:
        raise DataError(
            f"{shown(kinds[None])}: the name does not tell the format; give it with --data-format"
        )
    if len(kinds) > 1:
        examples = first_few(map(shown, kinds.values()))
        raise DataError(
            f"{shown(source)}: files of different formats ({examples}); label those of one format "
            "at a time, with a pattern such as '*.parquet'"
        )
    paths = tuple(info.path for info in chosen)
    top = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return Inputs(
        filesystem, paths, tuple(info.size or 0 for info in chosen), top, str(next(iter(kinds)))
    )


def _located(fs: Any, source: str) -> tuple[Any, str, str | None]:
    """The file system, a folder or file in it, and the pattern of paths below; None for none."""
    wild = WILD.search(source)
    is_file = "://" not in source and Path(source).expanduser().exists()
    if wild is None or is_file:
        base, pattern = source, None
    else:
        cut = source.rfind("/", 0, wild.start()) + 1
        base, pattern = source[:cut] or ".", source[cut:]
    if "://" in base:
        filesystem, path = fs.FileSystem.from_uri(base)
        return filesystem, path, pattern
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(base)), pattern


def _listed_files(fs: Any, filesystem: Any, base: str, pattern: str | None) -> list[Any]:
    """The files at or below a path, sorted; without hidden ones and those of other programs."""
    info = filesystem.get_file_info(base)
    if info.type == fs.FileType.File:
        return [info]
    selector = fs.FileSelector(base, recursive=pattern is None or "/" in pattern)
    matches = None if pattern is None else re.compile(_expression(pattern))
    below = [
        (posixpath.relpath(one.path, base.rstrip("/")), one)
        for one in filesystem.get_file_info(selector)
        if one.type == fs.FileType.File
    ]
    return [
        one
        for name, one in sorted(below, key=lambda pair: pair[0])
        if not any(part.startswith((".", "_")) for part in name.split("/"))
        and (matches is None or matches.fullmatch(name))
    ]


def _expression(pattern: str) -> str:
    """A pattern of paths as a regular expression: `*` within a name, `**` over folders."""
    words = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = []
    for part in re.findall(r"\*\*/?|\[[^\]/]+\]|.", pattern):
        if part.startswith("[") and len(part) > 1:
            inside = part[1:-1].replace("\\", "\\\\").replace("^", "\\^")
            parts.append(f"[{re.sub('^!', '^', inside)}]")
        else:
            parts.append(words.get(part) or re.escape(part))
    return "".join(parts)


def _format_by_name(path: str) -> str | None:
    name = path.lower().removesuffix(".gz")
    return FORMATS.get(posixpath.splitext(name)[1] or ".")


class _AllBadRows(BadRows):
    """Keeps every bad row, with its record, until it is taken; never stops: all are written."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[BadRow, dict[str, Any]]] = []
        self._records: dict[int, dict[str, Any]] = {}

    def watched(self, rows: Iterator[Record | BadRow]) -> Iterator[Record | BadRow]:
        """The rows, whose records are remembered until `forget`."""
        for row in rows:
            if isinstance(row, Record):
                self._records[row.index] = row.values
            yield row

    def forget(self, index: int) -> None:
        self._records.pop(index, None)

    def add(self, row: BadRow) -> None:
        self.count += 1
        self.waiting.append((row, self._records.pop(row.index, {})))

    def check(self, name: str, n_good: int) -> None:
        pass


@dataclass(frozen=True)
class Reading:
    """How files are read; it can be pickled.

    Attributes:
        data: format, encoding, columns.
        keep: columns that the output carries along.
        rows_at_once: rows of a table.
    """

    data: DataOptions
    keep: tuple[str, ...] = ()
    rows_at_once: int = 8192

    def kept_names(self) -> dict[str, str]:
        """Name in the input -> name in the output of the columns to keep."""
        names: dict[str, str] = {}
        for name in self.keep:
            shown_as = name
            while shown_as in OWN_COLUMNS or shown_as in names.values():
                shown_as = FROM_INPUT + shown_as
            names[name] = shown_as
        return names

    def tables(self, file: BinaryIO, name: str, number: int, data_format: str) -> Iterator[Any]:
        """The rows of one file in Arrow tables, good and bad ones in their order.

        Args:
            file: open for reading in bytes; seekable if Parquet.
            name: of the file.
            number: its place among all files.
            data_format: of its content.

        Yields:
            Tables of up to `rows_at_once` rows: `row_id`, `file`, `index`, the kept columns,
            `text`, and `error`, which says why a row has no usable text.

        Raises:
            DataError: the file as a whole cannot be read, or lacks a column.
        """
        if data_format == "parquet":
            parts = self._of_parquet(file, name)
        else:
            parts = self._of_text(file, name, data_format)
        for index, columns in parts:
            yield self._table(name, number, index, columns)

    def _table(self, name: str, number: int, index: Sequence[int], columns: dict[str, Any]) -> Any:
        import pyarrow as pa

        ids = [ROWS_OF_A_FILE * number + row for row in index]
        files = pa.array([name] * len(ids), pa.string())
        own = {ROW_ID: pa.array(ids, pa.int64()), FILE: files, INDEX: pa.array(index, pa.int64())}
        return pa.table({**own, **columns})

    def _of_text(
        self, file: BinaryIO, name: str, data_format: str
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        table = table_of(opened(file, name), data_format, self.data, labelled=False)
        if table.columns is not None:
            self._check_kept(table.columns, name)
        bad = _AllBadRows()
        table = replace(table, rows=bad.watched(table.rows))
        rows: list[tuple[int, str | None, str | None, dict[str, Any]]] = []
        skipping = replace(self.data, skip_bad_rows=True)

        column = self.data.text_column

        def taken() -> Iterator[tuple[list[int], dict[str, Any]]]:
            for row, record in bad.waiting:
                text = None if column is None else record.get(column)
                rows.append((row.index, _storable(text), row.reason, record))
            bad.waiting.clear()
            rows.sort(key=lambda row: row[0])
            while len(rows) >= self.rows_at_once:
                yield self._columns(rows[: self.rows_at_once])
                del rows[: self.rows_at_once]

        for row in rows_of(table, skipping, bad_rows=bad):
            bad.forget(row.index)
            column = row.column
            rows.append((row.index, row.text, None, row.record))
            if len(rows) + len(bad.waiting) >= self.rows_at_once:
                yield from taken()
        yield from taken()
        if rows:
            yield self._columns(rows)

    def _columns(
        self, rows: Sequence[tuple[int, str | None, str | None, dict[str, Any]]]
    ) -> tuple[list[int], dict[str, Any]]:
        """Arrow columns of rows of text; what is kept is text too, as in a table of CSV."""
        import pyarrow as pa

        from minllama.experiment.tables import cell_of

        columns: dict[str, Any] = {}
        for name, shown_as in self.kept_names().items():
            cells = [record.get(name) for *_, record in rows]
            values = [None if cell is None else cell_of(cell) for cell in cells]
            columns[shown_as] = pa.array(values, pa.string())
        columns[TEXT] = pa.array([text for _, text, _, _ in rows], pa.string())
        columns[ERROR] = pa.array([reason for _, _, reason, _ in rows], pa.string())
        return [index for index, *_ in rows], columns

    def _of_parquet(self, file: BinaryIO, name: str) -> Iterator[tuple[list[int], dict[str, Any]]]:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            content = parquet.ParquetFile(file)
            column = self._text_column(content.schema_arrow, name)
            self._check_kept(content.schema_arrow.names, name)
            wanted = [*dict.fromkeys((*self.keep, column))]
            start = 0
            for batch in content.iter_batches(batch_size=self.rows_at_once, columns=wanted):
                index = list(range(start, start + batch.num_rows))
                start += batch.num_rows
                columns = {
                    shown_as: batch.column(kept) for kept, shown_as in self.kept_names().items()
                }
                columns[TEXT] = batch.column(column).cast(pa.string())
                columns[ERROR] = pa.nulls(batch.num_rows, pa.string())
                yield index, columns
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{name}: damaged, or not a Parquet file ({first_line(error)})"
            ) from error

    def _text_column(self, schema: Any, name: str) -> str:
        from pyarrow import types

        no_text = {
            one.name: str(one.type)
            for one in schema
            if not (types.is_string(one.type) or types.is_large_string(one.type))
        }
        column, _ = find_columns(
            list(schema.names),
            name=name,
            text_column=self.data.text_column,
            needs_label=False,
            no_text=no_text,
        )
        return column

    def _check_kept(self, columns: Sequence[str], name: str) -> None:
        if missing := [kept for kept in self.keep if kept not in columns]:
            raise OptionError(
                f"{name}: no column {listed(missing)} to keep; there are {listed(columns)}"
            )


def _storable(text: Any) -> str | None:
    """The text of a bad row, if it is one that Arrow can hold."""
    try:
        return text if isinstance(text, str) and text.encode() is not None else None
    except UnicodeEncodeError:  # half of a character
        return None


def opened_input(inputs: Inputs, path: str) -> BinaryIO:
    """A file of the inputs, open for reading in bytes.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return as_binary(inputs.filesystem.open_input_file(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({first_line(error)})") from error


def as_binary(file: Any) -> BinaryIO:
    """An Arrow file as a buffered stream, as `minllama.data` reads it."""
    return cast(BinaryIO, io.BufferedReader(file, 2**20))
