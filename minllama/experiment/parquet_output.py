"""Convert predictions between JSON Lines and Parquet, in constant memory.

A Parquet file is only readable when it is complete, so a run writes JSON Lines next to it and
converts them at the end. Columns are those of `experiment/tables.py`, typed by their values: text,
booleans, integers, floats, or lists of one of these; columns of mixed types or structures become
text, like cells of CSV.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minllama.atomic import atomic_file
from minllama.errors import DataError, MinllamaError
from minllama.experiment.tables import (
    INPUT_COLUMNS,
    Layout,
    cell_of,
    layout_of,
    prediction_fields,
    record_of,
    utf8,
)

MOST_ROWS = 16_384  # of a row group
MOST_BYTES = 2**25  # of the JSON lines of a row group
EXACT = 2**53  # floats represent all integers up to it
METADATA = b"minllama"  # lists the input's names of the input columns

# The type of a column's values: (), which fits any, a kind, or ("list", the type of its
# elements). A column of "json" contains text.
Kind = tuple[Any, ...]
JSON: Kind = ("json",)


def write_parquet(lines: Path, output: Path) -> Layout | None:
    """Convert a JSON Lines file to Parquet, atomically.

    Returns:
        Its columns; None without lines, and then no file is written.

    Raises:
        MinllamaError: it cannot be written.
    """
    layout, kinds = _columns(lines)
    if layout is None:
        return None
    import pyarrow as pa
    from pyarrow import parquet

    names = [utf8(name) for name in layout.names]
    types = [_arrow_type(kind) for kind in kinds]
    schema = pa.schema(list(zip(names, types, strict=True)))
    schema = schema.with_metadata(
        {METADATA: json.dumps({INPUT_COLUMNS: layout.input_columns}).encode()}
    )
    with atomic_file(output) as temporary:
        try:
            with parquet.ParquetWriter(temporary, schema) as writer:
                for rows in _groups(lines, layout):
                    columns = zip(zip(*rows, strict=True), kinds, types, strict=True)
                    arrays = [
                        pa.array([_stored(value, kind) for value in column], type=arrow_type)
                        for column, kind, arrow_type in columns
                    ]
                    writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        except pa.ArrowException as error:
            reason = str(error).split("\n")[0]
            raise MinllamaError(
                f"{output}: cannot be written ({reason}); its lines are in {lines}"
            ) from error
    return layout


def records_in(output: Path) -> Iterator[dict[str, Any]]:
    """The records of a Parquet file; input columns of mixed types are text.

    Raises:
        DataError: it is damaged, or does not contain predictions.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(output) as file:
            names, input_columns = file.schema_arrow.names, _input_names(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1000):
                columns = [column.to_pylist() for column in batch.columns]
                for values in zip(*columns, strict=True):
                    record = record_of(names, values)
                    if len(input_columns) == len(record.get(INPUT_COLUMNS, {})):
                        record[INPUT_COLUMNS] = dict(
                            zip(input_columns, record[INPUT_COLUMNS].values(), strict=True)
                        )
                    yield record
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{output}: not predictions of `minllama classify`, or incomplete ({reason}); "
            "name another file, or replace it with --force"
        ) from error


def write_lines(records: Iterable[Mapping[str, Any]], lines: Path) -> int:
    """Write records as JSON Lines, atomically; returns the size in bytes."""
    with atomic_file(lines) as temporary:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return temporary.stat().st_size


def _input_names(schema: Any) -> tuple[str, ...]:
    try:
        return tuple(json.loads(schema.metadata[METADATA])[INPUT_COLUMNS])
    except (KeyError, TypeError, ValueError):
        return ()


def _records(lines: Path) -> Iterator[tuple[dict[str, Any], int]]:
    with lines.open("rb") as file:
        for line in file:
            yield json.loads(line), len(line)


def _columns(lines: Path) -> tuple[Layout | None, list[Kind]]:
    """The columns of a JSON Lines file, and their types over all rows."""
    first: dict[str, Any] | None = None
    input_columns: dict[str, Kind] = {}
    prediction_columns: dict[str, Kind] = {}
    for record, _ in _records(lines):
        first = first or record
        for kinds, values in (
            (input_columns, record.get(INPUT_COLUMNS, {})),
            (prediction_columns, prediction_fields(record)),
        ):
            for name, value in values.items():
                kinds[name] = _merged(kinds.get(name, ()), _kind(value))
    if first is None:
        return None, []
    layout = layout_of(first, input_columns)
    return layout, [
        *map(input_columns.__getitem__, layout.input_columns),
        *map(prediction_columns.__getitem__, layout.prediction_columns),
    ]


def _groups(lines: Path, layout: Layout) -> Iterator[list[list[Any]]]:
    """The rows of each row group."""
    rows: list[list[Any]] = []
    n_bytes = 0
    for record, size in _records(lines):
        rows.append(layout.values(record))
        n_bytes += size
        if len(rows) >= MOST_ROWS or n_bytes >= MOST_BYTES:
            yield rows
            rows, n_bytes = [], 0
    if rows:
        yield rows


def _kind(value: Any) -> Kind:
    match value:
        case None:
            return ()
        case bool():
            return ("bool",)
        case int() if abs(value) <= EXACT:
            return ("int",)
        case int() if -(2**63) <= value < 2**63:
            return ("long",)
        case float():
            return ("float",)
        case str():
            return ("str",)
        case list():
            inner: Kind = ()
            for element in value:
                inner = _merged(inner, _kind(element))
            return _listed(inner)
    return JSON


def _merged(one: Kind, other: Kind) -> Kind:
    """The type that can represent values of both types."""
    if not one or not other or one == other:
        return one or other
    match sorted((one, other), key=lambda kind: str(kind[0])):
        case [("int",), ("long",)]:
            return ("long",)
        case [("float",), ("int",)]:
            return ("float",)
        case [("list", inner), ("list", other_inner)]:
            return _listed(_merged(inner, other_inner))
    return JSON


def _listed(inner: Kind) -> Kind:
    return JSON if inner == JSON else ("list", inner)


def _arrow_type(kind: Kind) -> Any:
    import pyarrow as pa

    match kind:
        case ("bool",):
            return pa.bool_()
        case ("int",) | ("long",):
            return pa.int64()
        case ("float",):
            return pa.float64()
        case ("list", inner):
            return pa.list_(_arrow_type(inner))
    return pa.string()


def _stored(value: Any, kind: Kind) -> Any:
    """A value for an Arrow column of this type."""
    if value is None:
        return None
    match kind:
        case ("list", inner):
            return [_stored(element, inner) for element in value]
        case ("str",) | ("json",):
            return cell_of(value)
        case ("float",):
            return float(value)
    return value
