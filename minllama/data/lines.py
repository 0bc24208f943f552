"""Formats that are read line by line -> tables: labelled and plain text, CSV, TSV, JSONL, JSON.

Lines are UTF-8, with or without a byte order mark, and end with LF or CRLF; blank lines are no
rows. One row is held at a time, except for a JSON list, which is read whole. Knows nothing of
which column holds what, nor of where the bytes come from.
"""

import contextlib
import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from minllama.data.records import RawRow, Table, numbered, shown
from minllama.errors import DataError

# Far above any text that a model reads, far below what hurts: without a limit a file of another
# kind, or a device, could be one endless line.
MAX_LINE_BYTES = 2**24
MAX_JSON_BYTES = 2**28
SEPARATOR = "|||"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Lines:
    """The lines of a stream as text, and what was wrong with them.

    A line that is not UTF-8 is handed on with replacement characters and the problem is kept until
    it is taken: a CSV row can span lines, and all of it must be read before it can be refused.

    Attributes:
        name: of the stream, in errors.
        number: of the line handed out last, from 1.
    """

    def __init__(self, stream: io.BufferedIOBase, name: str) -> None:
        self.name = name
        self.number = 0
        self._stream = stream
        self._ahead: str | None = None
        self._problem: tuple[int, str] | None = None

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._ahead if self._ahead is not None else self._read()
        self._ahead = None
        if not line:
            raise StopIteration
        self.number += 1
        return line

    def peek(self) -> str:
        """The next line that is not blank, which stays the next; empty at the end."""
        while self._ahead is None or (self._ahead and not self._ahead.strip()):
            if self._ahead:
                self.number += 1
            self._ahead = self._read()
        return self._ahead

    def take_problem(self) -> tuple[int, str] | None:
        """Line and reason of the first bad line since the last call."""
        problem, self._problem = self._problem, None
        return problem

    def _read(self) -> str:
        number = self.number + 1
        with _reading(f"{self.name}, line {number}"):
            line = self._stream.readline(MAX_LINE_BYTES + 1)
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{self.name}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; "
                "is this a text file?"
            )
        if number == 1:
            line = _without_mark(line, self.name)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            if self._problem is None:
                self._problem = number, not_utf8(line, error.start)
            return line.decode(errors="replace")


def not_utf8(data: bytes, start: int) -> str:
    return (
        f"byte {start + 1} (0x{data[start]:02x}) is not UTF-8 "
        "(convert the file, perhaps with: iconv -f latin1 -t utf-8)"
    )


def _without_mark(data: bytes, name: str) -> bytes:
    """`data`, the beginning of a file, without UTF-8's byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: is UTF-16; convert it with: iconv -f utf-16 -t utf-8")
    return data.removeprefix(BYTE_ORDER_MARK)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # the last two from gzip
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{where}: cannot be read ({reason})") from error


def labelled_table(lines: Lines) -> Table:
    """Lines of `label ||| sentence`: columns `label` and `text`."""

    def split(line: str) -> dict[str, Any] | str:
        label, separator, text = line.partition(SEPARATOR)
        if not separator:
            return f"no {SEPARATOR} between label and sentence"
        return {"label": label.strip(), "text": text.lstrip(" \t")}

    return Table(lines.name, ["label", "text"], numbered(_each_line(lines, split)))


def text_table(lines: Lines) -> Table:
    """Lines of text alone: the column `text`."""
    return Table(lines.name, ["text"], numbered(_each_line(lines, lambda line: {"text": line})))


def jsonl_table(lines: Lines) -> Table:
    """One JSON object a line."""
    return Table(lines.name, None, numbered(_each_line(lines, _json_object)))


def _each_line(lines: Lines, parse: Callable[[str], dict[str, Any] | str]) -> Iterator[RawRow]:
    for line in lines:
        if problem := lines.take_problem():
            yield problem
        elif line.strip():
            yield lines.number, parse(line.removesuffix("\n").removesuffix("\r"))


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        return _checked_object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return _not_json(error)


def _checked_object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"{shown(value)} is not a JSON object"


def _not_json(error: ValueError | RecursionError) -> str:
    match error:
        case json.JSONDecodeError():
            return f"not JSON ({error.msg} at character {error.colno})"
        case RecursionError():
            return "JSON that is nested too deeply"
    return "JSON with a number of too many digits"


def json_table(stream: io.BufferedReader, name: str) -> Table:
    """A JSON list of objects; or, as many files of that name have it, one object a line."""
    with _reading(name):
        start = stream.peek(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
    if not start.startswith(b"["):
        return jsonl_table(Lines(stream, name))
    with _reading(name):
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DataError(
            f"{name}: a list of more than {MAX_JSON_BYTES:,} bytes; put one object on each line "
            "and name the file .jsonl"
        )
    data = _without_mark(data, name)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        line_start = data.rfind(b"\n", 0, error.start) + 1
        reason = not_utf8(data[line_start : error.start + 1], error.start - line_start)
        raise DataError(f"{name}, line {line}: {reason}") from error
    return Table(name, None, numbered(_json_list(text, name)))


def _json_list(text: str, name: str) -> Iterator[RawRow]:
    """The elements one by one, since the parser of whole lists does not tell their lines."""
    decoder = json.JSONDecoder()
    blank = re.compile(r"[ \t\n\r]*")

    def skip_blank(position: int) -> int:
        match = blank.match(text, position)
        assert match is not None
        return match.end()

    line, counted = 1, 0
    position = skip_blank(skip_blank(0) + 1)  # beyond the bracket
    ended = text.startswith("]", position)
    while not ended:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {line}: {_not_json(error)}") from error
        yield line, _checked_object(value)
        position = skip_blank(position)
        ended = text.startswith("]", position)
        if not ended:
            if not text.startswith(",", position):
                raise DataError(f"{name}, line {line}: no comma or ] after this object of the list")
            position = skip_blank(position + 1)
    if skip_blank(position + 1) < len(text):
        raise DataError(f"{name}: more text after the end of the list")


def csv_table(lines: Lines) -> Table:
    """Comma-separated values below a line of column names (RFC 4180).

    Where the line of names has semicolons and no comma, semicolons separate: so do spreadsheets
    write in countries with a decimal comma.
    """
    # The limit is the csv module's own global; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    first = lines.peek()
    delimiter = ";" if ";" in first and "," not in first else ","
    return _delimited_table(lines, _csv_rows(lines, delimiter))


def tsv_table(lines: Lines) -> Table:
    """Tab-separated values below a line of column names: one line a row, no tabs in cells.

    A quote is an ordinary character, as in most published data sets; but a cell that is quoted as
    a whole, as spreadsheets and pandas write them, is unquoted.
    """
    return _delimited_table(lines, _tsv_rows(lines))


def _csv_rows(lines: Lines, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    # Strict: otherwise a misplaced quote silently joins cells, or rows.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.take_problem()
            yield start, _not_csv(str(error))
            continue
        if problem := lines.take_problem():
            yield problem
        elif "".join(cells).strip() or len(cells) > 1:
            yield start, cells


def _not_csv(message: str) -> str:
    if message.startswith("field larger"):
        return f"a cell of more than {MAX_LINE_BYTES:,} characters; is a quote not closed?"
    if message.startswith("unexpected end"):
        return "a quote is opened and never closed"
    if message.startswith("new-line character"):
        return "a carriage return outside quotes (lines must end with LF or CRLF)"
    return f"not CSV ({message})"


def _tsv_rows(lines: Lines) -> Iterator[tuple[int, list[str] | str]]:
    for line in lines:
        if problem := lines.take_problem():
            yield problem
        elif line.strip():
            cells = line.removesuffix("\n").removesuffix("\r").split("\t")
            yield lines.number, [_unquoted(cell) for cell in cells]


def _unquoted(cell: str) -> str:
    inside = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"'
    if is_quoted and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return cell


def _delimited_table(lines: Lines, rows: Iterator[tuple[int, list[str] | str]]) -> Table:
    number, header = next(rows, (1, []))
    if isinstance(header, str):
        raise DataError(f"{lines.name}, line {number}: {header}")
    columns = [name.strip() for name in header]
    if any("\0" in name for name in columns):
        raise DataError(f"{lines.name}: holds NUL characters; is it UTF-16, or no text?")

    def records() -> Iterator[RawRow]:
        for number, cells in rows:
            if isinstance(cells, str):
                yield number, cells
            elif len(cells) != len(columns):
                yield number, f"columns: {len(cells)} here, {len(columns)} in the first line"
            else:
                yield number, dict(zip(columns, cells, strict=True))

    return Table(lines.name, columns, numbered(records()))
