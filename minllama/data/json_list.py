"""Read a JSON list of objects, or concatenated objects, as a table.

Only one object is in memory at a time, whatever the length of the list.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator

from minllama.data.encoding import BYTE_ORDER_MARK, CHUNK, UTF_8, advice_for, bad_bytes
from minllama.data.lines import MAX_LINE_BYTES, checked_object, not_json, reading
from minllama.data.records import RawRow, Table, numbered
from minllama.errors import DataError

_BLANK = re.compile(r"[ \t\n\r]*")
_TRIMMED_FROM = 2**16  # parsed characters that are held before they are discarded


def json_list_table(stream: io.BufferedReader, name: str, encoding: str = UTF_8) -> Table:
    """The objects of a JSON list, or concatenated objects without a list."""
    return Table(name, None, numbered(_objects(_Text(stream, name, encoding))))


class _Text:
    """The buffered part of a stream, and the parser's position.

    Attributes:
        text: the buffer.
        at: the parser's position in it.
    """

    def __init__(self, stream: io.BufferedReader, name: str, encoding: str) -> None:
        self.name = name
        self.text = ""
        self.at = 0
        self._stream = stream
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(UTF_8)()
        self._line = 1  # line at the position up to which lines were counted
        self._counted = 0  # that position
        self._column = 0  # characters before `text` in its first line
        self._read_of_line = 0  # bytes, or characters of another encoding, of the line being read
        self._is_start = True
        self._has_utf8 = False  # beyond ASCII
        self._ended = False

    def line(self) -> int:
        """The line of the parser's position."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def line_and_column(self, position: int) -> tuple[int, int]:
        """Column of a later position, from 1."""
        before = self.text.rfind("\n", 0, position)
        column = position - before if before >= 0 else self._column + position + 1
        return self.line() + self.text.count("\n", self.at, position), column

    def skip_blank(self) -> str:
        """Advance to the next non-space character; empty at the end."""
        while True:
            match = _BLANK.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def more(self) -> bool:
        """Read on; whether there was more."""
        if self._ended:
            return False
        if self.at >= _TRIMMED_FROM:
            self._discard_read()
        data = self._bytes(len(self.text) - self.at)
        pending = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(data, self._ended)
        except UnicodeDecodeError as error:
            raise self._not_utf8(error) from error
        undecoded = pending + data
        newline = undecoded.rfind(b"\n")
        if newline >= 0:
            self._read_of_line = -newline - 1
        n_pending = len(self._decoder.getstate()[0])
        self._read_of_line += len(text) if self._encoding != UTF_8 else len(undecoded) - n_pending
        self.text += text
        self._has_utf8 = self._has_utf8 or not text.isascii()
        return True

    def _bytes(self, held: int) -> bytes:
        """Read more: twice as much each time, so that long objects are not parsed often."""
        parts: list[bytes] = []
        size = 0
        with reading(self.name):
            while not self._ended and (not parts or size < held):
                parts.append(self._stream.read1(CHUNK))
                size += len(parts[-1])
                self._ended = not parts[-1]
        data = b"".join(parts)
        if self._is_start:
            data, self._is_start = data.removeprefix(BYTE_ORDER_MARK), False
        return data

    def _discard_read(self) -> None:
        self.line()
        newline = self.text.rfind("\n", 0, self.at)
        self._column = self.at - newline - 1 if newline >= 0 else self._column + self.at
        self.text = self.text[self.at :]
        self.at = self._counted = 0

    def _not_utf8(self, error: UnicodeDecodeError) -> DataError:
        data = error.object
        newline = data.rfind(b"\n", 0, error.start)
        before = self._read_of_line if newline < 0 else 0
        n_lines = self.text.count("\n", self.at) + data.count(b"\n", 0, error.start)
        of_line = data[newline + 1 :]
        reason = bad_bytes(of_line, error.start - newline - 1, self._encoding, before=before)
        advice = "give its encoding with --encoding, or omit that for UTF-8"
        if self._encoding == UTF_8 and self._has_utf8:
            advice = "the data before it is UTF-8, so the file mixes encodings"
        elif self._encoding == UTF_8:
            advice = advice_for(data[max(0, error.start - CHUNK) : error.start + CHUNK])
        return DataError(f"{self.name}, line {self.line() + n_lines}: {reason}; {advice}")


def _objects(text: _Text) -> Iterator[RawRow]:
    """The values one by one, since the parser of complete lists does not report lines."""
    is_list = text.skip_blank() == "["
    if is_list:
        text.at += 1
    next_character = text.skip_blank()
    while next_character and not (is_list and next_character == "]"):
        line = text.line()
        yield line, checked_object(_value(text))
        next_character = text.skip_blank()
        if is_list and next_character != "]":
            if next_character != ",":
                raise _syntax_error(text, line, "no comma or ] after this object")
            text.at += 1
            next_character = text.skip_blank()
            if next_character in ("", "]"):
                _value(text)  # its message names what is missing
    if is_list:
        if not next_character:
            line, column = text.line_and_column(text.at)
            raise _syntax_error(text, line, f"not JSON (Expecting value at character {column})")
        text.at += 1
        if text.skip_blank():
            raise DataError(f"{text.name}: extra data after the end of the list")


def _value(text: _Text) -> object:
    """The value at this position; reads more until it is complete."""
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(text.text, text.at)
        except (ValueError, RecursionError) as error:
            is_long = len(text.text) - text.at > MAX_LINE_BYTES
            # More text does not fix an error far from the end of the buffer.
            may_continue = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated") or error.pos > len(text.text) - 16
            )
            if may_continue and not is_long and text.more():
                continue
            line, column = text.line_and_column(getattr(error, "pos", text.at))
            if is_long:
                reason = f"an object of more than {MAX_LINE_BYTES:,} bytes; is it a list of rows?"
                raise _syntax_error(text, line, reason) from error
            raise _syntax_error(text, line, not_json(error, column)) from error
        # A number at the end of the buffer may continue.
        if end == len(text.text) and text.text[end - 1] not in '}]"' and text.more():
            continue
        text.at = end
        return value


def _syntax_error(text: _Text, line: int, reason: str) -> DataError:
    return DataError(f"{text.name}, line {line}: {reason}")
