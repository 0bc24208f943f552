"""Convert JSON Lines to rows of CSV or TSV while predictions are written.

Determines the columns of the table and writes the header.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minllama.data import Row, stream_rows
from minllama.data.source import Source
from minllama.errors import DataError
from minllama.experiment.resume import Done, check_table
from minllama.experiment.tables import (
    DELIMITERS,
    FIRST,
    FROM_INPUT,
    INPUT_COLUMNS,
    TABLES,
    Layout,
    layout_of,
    prediction_fields,
    row_of,
)
from minllama.options import DataOptions
from minllama.text import listed

ALL_COLUMNS = "all"


class TableOutput:
    """Converts the JSON lines of one run to rows; for other formats they are unchanged.

    Args:
        output_format: one of OUTPUT_FORMATS.
        source, data: of the rows.
        columns: of the source to keep; ALL_COLUMNS for all.
    """

    def __init__(
        self, output_format: str, source: Source, data: DataOptions, columns: Sequence[str]
    ) -> None:
        self._delimiter = DELIMITERS.get(output_format)
        self._is_table = output_format in TABLES
        self._source, self._data = source, data
        self._columns = columns
        self._layout: Layout | None = None
        self._header = ""

    def columns(self, row: Row) -> Sequence[str]:
        """The input columns in records; a table always includes the text column."""
        if self._is_table and row.column == "text":
            return [name for name in self._columns if name != "text"]
        return self._columns

    def begin(
        self, line: str, rows: Sequence[Row], done: Done, notices: list[str] | None
    ) -> tuple[Mapping[str, Any], ...]:
        """Determine the columns of the table.

        Args:
            line: the first one.
            rows: the first ones.
            done: the rows already in a resumed output.
            notices: receives notes about the columns.

        Returns:
            The records of `done` as lines of JSON have them.

        Raises:
            DataError: the output has other columns.
        """
        if self._delimiter is None:
            return done.records
        record = json.loads(line)
        self._layout = layout_of(record, self._input_columns(record, rows, done))
        if notices is not None and (notice := self._layout.notice()):
            notices.append(notice)
        records = check_table(done, self._layout, self._delimiter)
        if done.header is None:
            self._header = row_of(self._layout.names, self._delimiter)
        return records

    def _input_columns(
        self, record: Mapping[str, Any], rows: Sequence[Row], done: Done
    ) -> Iterable[str]:
        if ALL_COLUMNS not in self._columns:
            return self.columns(rows[0])
        of_all: Iterable[Row] = rows
        if self._source != "-":
            # JSON rows may have keys that earlier rows lack.
            skipping = dataclasses.replace(self._data, skip_bad_rows=True)
            of_all = stream_rows(self._source, skipping)
        elif done.header is not None:
            prediction_columns = prediction_fields(record)
            shown = done.header[: done.header.index(FIRST)]
            plain = (name.removeprefix(FROM_INPUT) for name in shown)
            return [
                o if o in prediction_columns else name for o, name in zip(plain, shown, strict=True)
            ]
        return {name: None for row in of_all for name in row.record if name != row.column}

    def rows(self, lines: list[str]) -> list[str]:
        """The lines as rows; the first one includes the header."""
        if self._layout is None or self._delimiter is None:
            return lines
        rows = [self._row(json.loads(line), self._layout, self._delimiter) for line in lines]
        if rows:
            rows[0], self._header = self._header + rows[0], ""
        return rows

    def _row(self, record: Mapping[str, Any], layout: Layout, delimiter: str) -> str:
        if more := [
            name for name in record.get(INPUT_COLUMNS, ()) if name not in layout.input_columns
        ]:
            raise DataError(
                f"{self._source}: row {record[FIRST]} has the column {listed(more)}, which the "
                "first rows lack; name the columns with --keep-columns, or write JSON Lines"
            )
        return row_of(layout.values(record), delimiter)
