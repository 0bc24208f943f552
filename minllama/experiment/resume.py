"""Resume an interrupted `minllama classify` after the predictions already written.

The output is the same as that of an uninterrupted run. The last rows in the output are predicted
again and compared, with a tolerance, since rounding depends on a text's batch.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from minllama.data import Row
from minllama.data.encoding import BYTE_ORDER_MARK
from minllama.data.source import Source
from minllama.errors import DataError
from minllama.experiment.tables import (
    DELIMITERS,
    EXPLANATION,
    INPUT_COLUMNS,
    Layout,
    cell_of,
    cells_of,
    check_header,
    is_complete_row,
    record_of,
    row_of,
    rows_in,
    without_mark,
)

CHUNK = 512  # rows that are sorted by length, computed and compared together
SAME_PROBABILITY = 0.05  # what rounding in half precision may change, here or on another machine
RECORD_BEGINS = b'{"index": '


@dataclass(frozen=True)
class Done:
    """The rows that an interrupted run has written.

    Attributes:
        records: of its last chunk, in order; may be empty.
        n_before: number of records before them.
        end: end of the last complete record, in bytes.
        header: the column names of a table; None for JSON Lines, or if incomplete.
        begun: the incomplete row after the last complete one of a table.
    """

    records: tuple[Mapping[str, Any], ...] = ()
    n_before: int = 0
    end: int = 0
    header: tuple[str, ...] | None = None
    begun: bytes = b""

    @property
    def start(self) -> int:
        """The index of the first row that a resumed run computes."""
        return chunk_of(self.records[-1]["index"]) * CHUNK if self.records else 0


def chunk_of(index: int) -> int:
    return index // CHUNK


def rows_still_to_do(rows: Iterator[Row], done: Done, source: Source) -> Iterator[Row]:
    """The rows still to be computed, after checking earlier ones.

    Raises:
        DataError: the output has not as many records of these.
    """
    n_before = 0
    for row in rows:
        if row.index >= done.start:
            rows = chain([row], rows)
            break
        n_before += 1
    if n_before != done.n_before:
        raise DataError(
            f"the output has {done.n_before:,} records before row {done.start:,}, but {source} "
            f"has {n_before:,} rows there; give the run's original input and options, or another "
            "--output"
        )
    return rows


def read_done(output: Path, output_format: str = "jsonl") -> Done:
    """Read what a resumed run has written; empty without a file.

    Args:
        output: JSON lines, or a table of CSV or TSV.
        output_format: one of these.

    Raises:
        DataError: it cannot be read, is not from such a run, or has records out of order.
    """
    try:
        with output.open("rb") as file:
            if output_format in DELIMITERS:
                return _done_of_table(output, file, DELIMITERS[output_format])
            return _done_of_lines(output, file)
    except FileNotFoundError:
        return Done()
    except OSError as error:
        raise DataError(f"{output}: cannot be read ({error.strerror})") from error


class _Records:
    """Collects the records of an output in order, keeping those of the last chunk."""

    def __init__(self) -> None:
        self.last: list[Mapping[str, Any]] = []
        self.n_before = 0

    def add(self, found: Mapping[str, Any]) -> None:
        if self.last and found["index"] <= self.last[-1]["index"]:
            raise ValueError(f"row {found['index']} after row {self.last[-1]['index']}")
        if self.last and chunk_of(found["index"]) != chunk_of(self.last[-1]["index"]):
            self.n_before += len(self.last)
            self.last.clear()
        self.last.append(found)


def done_of_records(records: Iterable[Mapping[str, Any]], output: Path) -> Done:
    """Check the records of a resumed run.

    Raises:
        DataError: they are out of order, or not predictions.
    """
    accepted = _Records()
    for number, found in enumerate(records, start=1):
        with _prediction(output, f"row {number}"):
            accepted.add(_checked(found))
    return Done(tuple(accepted.last), accepted.n_before)


def _done_of_lines(output: Path, file: BinaryIO) -> Done:
    accepted, end = _Records(), 0
    for number, line in enumerate(file, start=1):
        with _prediction(output, f"line {number}"):
            if not line.endswith(b"\n"):
                if line[: len(RECORD_BEGINS)] != RECORD_BEGINS[: len(line)]:
                    raise ValueError("nor the beginning of one")
                break
            accepted.add(_record_of(line))
            end += len(line)
    return Done(tuple(accepted.last), accepted.n_before, end)


def _done_of_table(output: Path, file: BinaryIO, delimiter: str) -> Done:
    accepted, end, header = _Records(), 0, None
    for number, row in rows_in(file):
        with _prediction(output, f"line {number}"):
            content = without_mark(row) if header is None else row
            if not is_complete_row(row):
                return Done(tuple(accepted.last), accepted.n_before, end, header, content)
            cells = cells_of(content, delimiter)
            if header is None:
                check_header(cells)
                header = cells
            else:
                accepted.add(_checked(record_of(header, cells)))
            end += len(row)
    return Done(tuple(accepted.last), accepted.n_before, end, header)


@contextlib.contextmanager
def _prediction(output: Path, place: str) -> Iterator[None]:
    """Refuse an output that contains something else at this place."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{output}, {place}: not a prediction of `minllama classify` ({what}); "
            "name another file"
        ) from error


def _record_of(line: bytes) -> Mapping[str, Any]:
    return _checked(json.loads(line))


def _checked(found: Any) -> Mapping[str, Any]:
    is_number = "value" in found and type(found["value"]) in (int, float)
    is_complete_row = is_number or isinstance(found["probabilities"], dict)
    is_complete_row = is_complete_row and type(found["text"]) is str
    if type(found["index"]) is not int or not is_complete_row:
        raise ValueError("index, text or probabilities have the wrong type")
    record: Mapping[str, Any] = found
    return record


def check_same(
    records: Iterable[Mapping[str, Any]],
    lines: Sequence[str],
    source: Source,
    unit: float = 1.0,
) -> None:
    """Refuse records that differ from the current predictions for the first rows of their chunk.

    Args:
        records: the existing ones.
        lines: the current predictions.
        source: of the rows.
        unit: the scale of the numbers (1 for probabilities): their standard deviation.
    """
    for number, record in enumerate(records):
        now = json.loads(lines[number]) if number < len(lines) else {}
        if (now.get("index"), now.get("text")) != (record["index"], record["text"]):
            raise other_input(record, source)
        if not _is_close(record, now, unit):
            raise DataError(
                f"the output has row {record['index']}, for which this classifier predicts "
                "something else; give the run's original classifier, or another --output"
            )
        if not _has_same_columns(record, now):
            raise other_columns(f"row {record['index']}")
        if _most_words(record) != _most_words(now):
            raise _other_explanations(f"row {record['index']}")


def _is_close(record: Mapping[str, Any], now: Mapping[str, Any], unit: float) -> bool:
    """Whether two records of a row are from the same classifier, up to rounding."""
    if "value" in record or "value" in now:
        if record.get("classifier") != now["classifier"] or not {"value"} <= now.keys():
            return False
        allowed = SAME_PROBABILITY * max(unit, abs(now["value"]))
        return "value" in record and bool(abs(record["value"] - now["value"]) <= allowed)
    was, is_now = record["probabilities"], now["probabilities"]
    return (
        record.get("classifier") == now["classifier"]
        and record.get("score") == now.get("score")
        and was.keys() == is_now.keys()
        and all(
            isinstance(p, int | float) and abs(p - is_now[name]) <= SAME_PROBABILITY
            for name, p in was.items()
        )
    )


def _most_words(record: Mapping[str, Any]) -> Any:
    """The limit of words with which a record was explained; None without explanation."""
    explanation = record.get(EXPLANATION)
    return explanation.get("max_words") if isinstance(explanation, Mapping) else None


def _has_same_columns(record: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the input columns of two records are equal, up to the precision of table cells."""
    was, is_now = record.get(INPUT_COLUMNS) or None, now.get(INPUT_COLUMNS) or None
    if was is None or is_now is None:
        return was is is_now
    return all(
        was.get(name) == is_now.get(name) or cell_of(was.get(name)) == cell_of(is_now.get(name))
        for name in was | is_now
    )


def check_table(done: Done, layout: Layout, delimiter: str) -> tuple[Mapping[str, Any], ...]:
    """The last records of a table that is resumed, with the names of the input's columns.

    Args:
        done: the table's rows.
        layout: the columns of the run that resumes it.
        delimiter: between its cells.

    Raises:
        DataError: the table has other columns, or no predictions.
    """
    if done.header is None:
        first = row_of(layout.names, delimiter).encode()
        if not (first.startswith(done.begun) or BYTE_ORDER_MARK.startswith(done.begun)):
            raise DataError(
                "the output is not a table that `minllama classify` started with these options; "
                "give the run's original options, or another --output"
            )
        return ()
    n_predicted = len(layout.prediction_columns)
    if (EXPLANATION in done.header) != (EXPLANATION in layout.prediction_columns):
        raise _other_explanations("a table")
    if done.header[-n_predicted:] != layout.prediction_columns:
        raise DataError(
            "the output has the columns of another classifier; give the run's original "
            "classifier, or another --output"
        )
    if done.header[:-n_predicted] != layout.shown:
        raise other_columns("a table")
    names = dict(zip(layout.shown, layout.input_columns, strict=True))
    return tuple(
        record
        | {INPUT_COLUMNS: {names[shown]: cell for shown, cell in record[INPUT_COLUMNS].items()}}
        if INPUT_COLUMNS in record
        else record
        for record in map(dict, done.records)
    )


def _other_explanations(what: str) -> DataError:
    return DataError(
        f"the output has {what} with other explanations, or without; give the run's original "
        "--explain and --max-words, or another --output"
    )


def other_columns(what: str) -> DataError:
    return DataError(
        f"the output has {what} with other columns; give the run's original --keep-columns, or "
        "another --output"
    )


def other_input(record: Mapping[str, Any], source: Source) -> DataError:
    return DataError(
        f"the output has row {record['index']} but {source} has no such row with that text; give "
        "the run's original input, or another --output"
    )
