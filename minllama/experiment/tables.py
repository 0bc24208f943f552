"""Convert between JSON records of predictions and rows of CSV or TSV.

A row has the requested input columns first, then the record's fields in order, with one column
per class (`probability_LABEL`). It is written as pandas and spreadsheets read it: UTF-8, quoted
where needed (RFC 4180), with LF line ends.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from minllama.data.encoding import BYTE_ORDER_MARK
from minllama.text import first_few, shown

DELIMITERS = {"csv": ",", "tsv": "\t"}
TABLES = (*DELIMITERS, "parquet")
FIRST = "index"  # of the columns that are not the input's
INPUT_COLUMNS = "columns"  # the field of a record that contains them
PROBABILITY = "probability_"
EXPLANATION = "explanation"  # the field of a record that stays one column, of JSON
TEXTS = ("text", "label", "score", "classifier")  # text even if it looks like a number
FROM_INPUT = "input_"  # precedes an input column's name that is also a prediction's


@dataclass(frozen=True)
class Layout:
    """The columns of a table of predictions.

    Attributes:
        input_columns: the input's columns, by their names there.
        shown: the same, by their names in the table.
        prediction_columns: the columns of the predictions.
    """

    input_columns: tuple[str, ...]
    shown: tuple[str, ...]
    prediction_columns: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.shown, *self.prediction_columns)

    def values(self, record: Mapping[str, Any]) -> list[Any]:
        """A record's value for each column; None for missing ones."""
        input_columns, prediction_columns = record.get(INPUT_COLUMNS, {}), prediction_fields(record)
        return [
            *map(input_columns.get, self.input_columns),
            *map(prediction_columns.get, self.prediction_columns),
        ]

    def notice(self) -> str | None:
        """A message about input columns that are renamed in the table; None without any."""
        renamed = [
            f"{shown(of_input)} is named {shown(name)} in the table"
            for of_input, name in zip(self.input_columns, self.shown, strict=True)
            if of_input != name
        ]
        return f"of the columns of the input, {first_few(renamed)}" if renamed else None


def layout_of(record: Mapping[str, Any], input_columns: Iterable[str]) -> Layout:
    """The columns of a table that starts with this record and keeps these input columns."""
    prediction_columns = tuple(prediction_fields(record))
    input_columns = tuple(dict.fromkeys(input_columns))
    others: list[str] = []
    for name in map(utf8, input_columns):
        if name in prediction_columns:
            name = FROM_INPUT + name
            while name in prediction_columns or name in input_columns or name in others:
                name = FROM_INPUT + name
        others.append(name)
    return Layout(input_columns, tuple(others), prediction_columns)


def prediction_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record, one value each, without the input columns."""
    fields: dict[str, Any] = {}
    for field, value in record.items():
        if field == INPUT_COLUMNS:
            continue
        if isinstance(value, Mapping) and field != EXPLANATION:
            prefix = PROBABILITY if field == "probabilities" else f"{field}_"
            fields |= {f"{prefix}{name}": element for name, element in value.items()}
        else:
            fields[field] = value
    return fields


def record_of(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The record of a row; input columns by their names in the table.

    Raises:
        ValueError: it is not a prediction; the message says why.
    """
    if len(values) != len(names):
        raise ValueError(f"columns: {len(values)} here, {len(names)} in the first line")
    first = names.index(FIRST)
    record: dict[str, Any] = {}
    probabilities: dict[str, float] = {}
    for name, value in zip(names[first:], values[first:], strict=True):
        if name.startswith(PROBABILITY):
            probabilities[name.removeprefix(PROBABILITY)] = float(value)
            record["probabilities"] = probabilities
        elif name in TEXTS or not isinstance(value, str):
            record[name] = value
        else:
            record[name] = json.loads(value or "null")
    if first:
        record[INPUT_COLUMNS] = dict(zip(names[:first], values[:first], strict=True))
    return record


def check_header(names: Sequence[str]) -> None:
    """Check that these are the columns of predictions.

    Raises:
        ValueError: it is not.
    """
    prediction_columns = names[names.index(FIRST) :] if FIRST in names else ()
    if tuple(prediction_columns[:2]) != (FIRST, "text") or "classifier" not in prediction_columns:
        raise ValueError("its columns differ")
    if len(set(names)) < len(names):
        raise ValueError("it has duplicate columns")


def cell_of(value: Any) -> str:
    """A value as a cell: text unchanged, empty for None, else JSON."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return utf8(text)


def utf8(text: str) -> str:
    """The text with lone surrogates escaped, as in JSON lines."""
    return text.encode("utf-8", "backslashreplace").decode()


def row_of(values: Iterable[Any], delimiter: str) -> str:
    """One row of a table, with its end."""
    stream = io.StringIO()
    # A carriage return is quoted only if the row's end has one.
    csv.writer(stream, delimiter=delimiter, lineterminator="\r\n").writerow(map(cell_of, values))
    return stream.getvalue().removesuffix("\r\n") + "\n"


def cells_of(row: bytes, delimiter: str) -> tuple[str, ...]:
    """The cells of a complete row.

    Raises:
        ValueError: it is not UTF-8, or not a row of such a table.
    """
    text = row.decode()
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a global setting of the module
    try:
        (cells,) = csv.reader([text], delimiter=delimiter, strict=True)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return tuple(cells)


def rows_in(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The rows of a table and their first lines; an incomplete last one has no end.

    A row ends with the first line with balanced quotes: they are written in pairs.
    """
    parts: list[bytes] = []
    start, quotes = 1, 0
    for number, line in enumerate(file, start=1):
        parts.append(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0 and line.endswith(b"\n"):
            yield start, b"".join(parts)
            parts, start, quotes = [], number + 1, 0
    if parts:
        yield start, b"".join(parts)


def is_complete_row(row: bytes) -> bool:
    """Whether a row of `rows_in` is complete."""
    return row.endswith(b"\n") and row.count(b'"') % 2 == 0


def without_mark(row: bytes) -> bytes:
    return row.removeprefix(BYTE_ORDER_MARK)
