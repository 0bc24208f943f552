"""Read line-based formats as tables: `label ||| text`, plain text and JSONL.

Lines end with LF or CRLF; blank lines are skipped. One row is in memory at a time. Other readers
use its line iterator.
"""

import contextlib
import io
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from minllama.data.columns import LABEL_NAMES, TEXT_NAMES
from minllama.data.encoding import BYTE_ORDER_MARK, CHUNK, UTF_8, advice_for, bad_bytes
from minllama.data.records import RawRow, Table, numbered
from minllama.errors import DataError
from minllama.text import shown

# Far more than any text for a model, but a modest amount of memory: without a limit another kind
# of file, or a device, could be one endless line.
MAX_LINE_BYTES = 2**24
MAX_BLANK_LINES = 10**6  # in a row: a few kilobytes of gzip may contain billions
SEPARATOR = "|||"

Problem = tuple[int, str]  # line and reason


class Lines:
    """The lines of a stream as text, and their problems.

    A line that is not UTF-8 is returned with replacement characters; the problem is stored until
    it is queried: a CSV row can span lines, and must be read completely before it is refused.

    Attributes:
        name: of the stream, in errors.
        number: of the line handed out last, from 1.
        remedies: advice for bad lines, without repetitions.
    """

    def __init__(self, stream: io.BufferedReader, name: str, encoding: str = UTF_8) -> None:
        self.name = name
        self.number = 0
        self.remedies: list[str] = []
        self._stream = stream
        self._encoding = encoding
        self._ahead: deque[tuple[str, Problem | None]] = deque()
        self._marked: list[tuple[str, Problem | None]] | None = None
        self._n_read = 0
        self._n_blank = 0
        self._problem: Problem | None = None
        self._has_utf8 = False  # beyond ASCII

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line, problem = self._ahead.popleft() if self._ahead else self._read()
        if not line:
            raise StopIteration
        if self._marked is not None:
            self._marked.append((line, problem))
        self.number += 1
        self._problem = self._problem or problem
        return line

    def peek(self) -> str:
        """Peek at the next line that is not blank; empty at the end."""
        while not self._ahead or (self._ahead[0][0] and not self._ahead[0][0].strip()):
            if self._ahead:
                self._ahead.popleft()
                self.number += 1
            self._ahead.append(self._read())
        return self._ahead[0][0]

    def peek_ahead(self, offset: int) -> str:
        """Peek at the line `offset` lines after the last one."""
        while len(self._ahead) < offset:
            if self._ahead and not self._ahead[-1][0]:
                return ""
            self._ahead.append(self._read())
        return self._ahead[offset - 1][0]

    def mark(self) -> None:
        """Remember the lines from here on, and forget earlier ones."""
        self._marked = []

    def rewind(self, n_skipped: int) -> None:
        """Return the lines since the mark again, except the first `n_skipped`."""
        lines = (self._marked or [])[n_skipped:]
        self._ahead.extendleft(reversed(lines))
        self._marked = []
        self.number -= len(lines)

    def take_problem(self) -> Problem | None:
        """Line and reason of the first bad line since the last call."""
        problem, self._problem = self._problem, None
        return problem

    def _read(self) -> tuple[str, Problem | None]:
        number = self._n_read = self._n_read + 1
        with reading(f"{self.name}, line {number}"):
            line = self._stream.readline(MAX_LINE_BYTES + 1)
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{self.name}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; "
                "is this a text file?"
            )
        self._n_blank = self._n_blank + 1 if line in (b"\n", b"\r\n") else 0
        if self._n_blank > MAX_BLANK_LINES:
            raise DataError(
                f"{self.name}, line {number}: {MAX_BLANK_LINES:,} blank lines before it; is this a "
                "file of rows?"
            )
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            problem = number, bad_bytes(line, error.start, self._encoding)
            self._advise(line)
            return line.decode(errors="replace"), problem
        self._has_utf8 = self._has_utf8 or not text.isascii()
        return text, None

    def _advise(self, line: bytes) -> None:
        if self.remedies:
            return
        if self._encoding != UTF_8:
            advice = "give its encoding with --encoding, or omit that for UTF-8"
        elif self._has_utf8:
            advice = "the lines before it are UTF-8, so the file mixes encodings"
        else:
            with reading(self.name):
                advice = advice_for(line + self._stream.peek(CHUNK)[:CHUNK])
        self.remedies.append(advice)


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Raise a one-line error if the stream cannot be read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeError) as error:  # the middle two from gzip
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{where}: cannot be read ({reason})") from error


def labelled_table(lines: Lines) -> Table:
    """Lines of `label ||| sentence`: columns `label` and `text`."""

    def split(line: str) -> dict[str, Any] | str:
        label, separator, text = line.partition(SEPARATOR)
        if not separator:
            return f"no {SEPARATOR} between label and text"
        if label.strip().lower() in LABEL_NAMES and text.strip().lower() in TEXT_NAMES:
            return "a line of column names, not an example"
        return {"label": label.strip(), "text": text.lstrip(" \t")}

    return _table(lines, ["label", "text"], split)


def text_table(lines: Lines) -> Table:
    """Lines of plain text: the column `text`."""
    return _table(lines, ["text"], lambda line: {"text": line})


def jsonl_table(lines: Lines) -> Table:
    """One JSON object a line."""
    return _table(lines, None, _json_object)


def _table(
    lines: Lines, columns: list[str] | None, parse: Callable[[str], dict[str, Any] | str]
) -> Table:
    rows = numbered(_each_line(lines, parse))
    return Table(lines.name, columns, rows, remedies=lines.remedies)


def _each_line(lines: Lines, parse: Callable[[str], dict[str, Any] | str]) -> Iterator[RawRow]:
    for line in lines:
        if problem := lines.take_problem():
            yield problem
        elif line.strip():
            # Concatenated files have a byte order mark here.
            line = line.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff")
            yield lines.number, parse(line)


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        return checked_object(json.loads(line))
    except (ValueError, RecursionError) as error:
        return not_json(error)


def checked_object(value: Any) -> dict[str, Any] | str:
    """`value`, or the reason why it is not a row."""
    return value if isinstance(value, dict) else f"{shown(value)} is not a JSON object"


def not_json(error: ValueError | RecursionError, column: int | None = None) -> str:
    """The reason why a text is not JSON; `column` if the error lacks its position in the line."""
    match error:
        case json.JSONDecodeError():
            return f"not JSON ({error.msg} at character {column or error.colno})"
        case RecursionError():
            return "JSON that is nested too deeply"
    return "JSON with a number of too many digits"
