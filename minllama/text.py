"""Handle untrusted text and JSON: escape it for display, bound it before it is parsed.

Names and messages from files and libraries may contain escape sequences, line breaks or marks that
change the text direction; here they are escaped before a terminal shows them. Python makes sixty
bytes of `{},` in JSON, and of a lone surrogate a text that cannot be written.
"""

import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

VERSION = "0.1.0"  # of minllama; pyproject.toml reads it here
JOINERS = "\u200c\u200d"  # invisible, and part of many scripts and emoji
MAX_LINE_CHARS = 2000
MAX_VALUE_CHARS = 60
MAX_SHOWN = 10  # names, or other items, that a message spells out
_TAIL_CHARS = 500  # of a message its end, which is the remedy
MAX_JSON_BYTES = 2**24  # ten times the longest config.json, index or adapter_config.json
MAX_JSON_ENTRIES = 2**20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def printable(text: str) -> str:
    """The text on one line, without terminal control characters."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def escaped(text: str) -> str:
    """The text with escapes for unprintable characters."""
    return text if text.isprintable() else ascii(text)[1:-1]


def one_line(text: str, max_chars: int = MAX_LINE_CHARS) -> str:
    """`printable` text of at most so many characters: of longer ones the middle is left out."""
    if len(text) > max_chars:
        tail = min(_TAIL_CHARS, max_chars // 4)
        text = f"{text[: max_chars - tail - 5]} ... {text[-tail:]}"
    return printable(text)


def cut(text: str, most: int = MAX_VALUE_CHARS) -> str:
    """The text, or its beginning and three dots, in at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: object) -> str:
    """A value in a message: quoted, on one line, and short."""
    return cut(repr(value[:100] if isinstance(value, str | bytes) else value))


def listed(names: Iterable[str]) -> str:
    """The first few names, quoted."""
    return first_few(map(shown, names))


def first_few(items: Iterable[str], most: int = MAX_SHOWN, between: str = ", ") -> str:
    """The first few of them, and how many more there are."""
    items = iter(items)
    few = list(islice(items, most))
    more = sum(1 for _ in items)
    return between.join(few) + (f"{between.strip(', ')} and {more} more" if more else "")


def first_line(error: BaseException) -> str:
    """The first line of a library's exception; its type if the message is empty."""
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__


def _shown(char: str) -> str:
    if char.isprintable() or char in JOINERS:
        return char
    return " " if char.isspace() else "\N{REPLACEMENT CHARACTER}"


def parse_json(data: bytes, *, max_entries: int = MAX_JSON_ENTRIES) -> Any:
    """Parse a JSON document in UTF-8.

    Args:
        data: the document.
        max_entries: the most values, of lists and objects together, that it may have.

    Raises:
        ValueError: it is damaged, nested too deeply, has too many entries, or is not text.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > max_entries:
        raise ValueError(f"more than {max_entries:,} entries")
    try:
        text = data.decode("utf-8-sig")  # json.loads would accept lone surrogates
        content = json.loads(text)
        if _SURROGATE.search(text):  # escapes that may be lone surrogates
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it contains half of a character (a lone surrogate)") from error
    return content


def read_json(
    path: Path, *, max_bytes: int = MAX_JSON_BYTES, max_entries: int = MAX_JSON_ENTRIES
) -> Any:
    """Parse a JSON file; see `parse_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or far larger than such a file should be.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(
            f"more than {max_bytes // 2**20} MiB, far larger than such a file should be"
        )
    return parse_json(data, max_entries=max_entries)


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
