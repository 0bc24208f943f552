"""Predictions that are there already: a run of `classify` that was cut goes on behind them.

Its output is then that of a run that was not cut. What the output holds is compared with what the
classifier says of the same rows now, since rounding depends on the company that a text is in.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from minllama.data import Row
from minllama.data.source import Source
from minllama.errors import DataError

CHUNK = 512  # rows that are sorted by length and computed together, and so compared
SAME_PROBABILITY = 0.05  # what rounding in halves may change, here or on another machine
RECORD_BEGINS = b'{"index": '


@dataclass(frozen=True)
class Done:
    """What an output holds already, of a run that was cut.

    Attributes:
        records: those of its last chunk, in order; empty where it holds none.
        n_before: how many come before them.
        end: where the last whole record ends, in bytes.
    """

    records: tuple[Mapping[str, Any], ...] = ()
    n_before: int = 0
    end: int = 0

    @property
    def start(self) -> int:
        """The index of the row at which a run that goes on begins to compute."""
        return chunk_of(self.records[-1]["index"]) * CHUNK if self.records else 0


def chunk_of(index: int) -> int:
    return index // CHUNK


def rows_still_to_do(rows: Iterator[Row], done: Done, source: Source) -> Iterator[Row]:
    """The rows that are still to be computed, once those before them are found to be done.

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
            f"the output has {done.n_before:,} records of the rows before number {done.start:,}, "
            f"and {source} has {n_before:,} there; give the input and options that the run began "
            "with, or another --output"
        )
    return rows


def read_done(output: Path) -> Done:
    """What a file of JSON lines holds of a run that is to go on: nothing if it is not there.

    Raises:
        DataError: it cannot be read, or holds something else, or records out of order.
    """
    records: list[Mapping[str, Any]] = []
    n_before, end, number = 0, 0, 0
    try:
        with output.open("rb") as file:
            for line in file:
                number += 1
                if not line.endswith(b"\n"):
                    if line[: len(RECORD_BEGINS)] != RECORD_BEGINS[: len(line)]:
                        raise ValueError("nor the beginning of one")
                    break
                found = _record_of(line)
                if records and found["index"] <= records[-1]["index"]:
                    raise ValueError(f"row {found['index']} behind row {records[-1]['index']}")
                if records and chunk_of(found["index"]) != chunk_of(records[-1]["index"]):
                    n_before += len(records)
                    records.clear()
                records.append(found)
                end += len(line)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"{output}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{output}, line {number}: not a prediction of `minllama classify` ({what}); "
            "name another file"
        ) from error
    return Done(tuple(records), n_before, end)


def _record_of(line: bytes) -> Mapping[str, Any]:
    found = json.loads(line)
    is_number = "value" in found and type(found["value"]) in (int, float)
    is_whole = is_number or isinstance(found["probabilities"], dict)
    is_whole = is_whole and type(found["text"]) is str
    if type(found["index"]) is not int or not is_whole:
        raise ValueError("index, text or probabilities are of another type")
    record: Mapping[str, Any] = found
    return record


def check_same(
    records: Iterable[Mapping[str, Any]],
    lines: Sequence[str],
    source: Source,
    unit: float = 1.0,
) -> None:
    """Refuse records that are not what is said now of the first rows of their chunk.

    Args:
        records: those that are there.
        lines: what is said now.
        source: of the rows.
        unit: of numbers, as 1 is of probabilities: their standard deviation.
    """
    for number, record in enumerate(records):
        now = json.loads(lines[number]) if number < len(lines) else {}
        if (now.get("index"), now.get("text")) != (record["index"], record["text"]):
            raise other_input(record, source)
        if not _is_alike(record, now, unit):
            raise DataError(
                f"the output holds row {record['index']}, and of that row this classifier says "
                "something else; give the one that the run began with, or another --output"
            )
        if record.get("columns") != now.get("columns"):
            raise DataError(
                f"the output holds row {record['index']} with other columns; give the "
                "--keep-columns that the run began with, or another --output"
            )


def _is_alike(record: Mapping[str, Any], now: Mapping[str, Any], unit: float) -> bool:
    """Whether two records of a row are by one classifier, but for rounding."""
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


def other_input(record: Mapping[str, Any], source: Source) -> DataError:
    return DataError(
        f"the output holds row {record['index']} where {source} has no such row with that text; "
        "give the input that the run began with, or another --output"
    )
