"""Read class names from a file or the command line."""

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minllama.data.class_names import class_text, integer_of
from minllama.data.encoding import advice_for, encoding_of
from minllama.data.label_lists import read_list, split_names
from minllama.errors import DataError, OptionError
from minllama.text import listed, shown

MAX_NAMES_BYTES = 2**24
HEAD = 2**16  # bytes of a file, to detect its encoding
_WRITTEN = re.compile(r"[+-]?[0-9]{1,18}(\.0+)?", re.ASCII)  # an integer as a JSON key


class LabelNames(dict[int, str]):
    """The class names, in the order of their ids.

    Attributes:
        codes: names of ids that the file writes with leading zeros, such as 01.
    """

    codes: dict[str, str]


def names_of_option(text: str, flag: str) -> list[str]:
    """The names that an option lists.

    Args:
        text: `good,bad`; `very good,"bad, awful"` as in CSV; or a JSON list.
        flag: the option in command-line spelling.

    Raises:
        OptionError: a quote is not closed, or a name is empty or there twice.
    """
    try:
        items = read_list(text, bare_words=False)
        if items is None:
            names: list[Any] = split_names(text)
        else:
            names = [class_text(item) or "" for item in items]
    except ValueError as error:
        raise OptionError(
            f"{flag} {error}; quote a name that contains a comma as in CSV, or write a JSON list"
        ) from error
    return checked_names(names, f"{flag} {shown(text)}")


def checked_names(names: list[str], where: str) -> list[str]:
    """The names, all distinct and not empty.

    Raises:
        OptionError: one is.
    """
    if not names or not all(name.strip() for name in names):
        raise OptionError(f"{where} contains an empty name; names must not be blank")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise OptionError(f"{where}: {listed(twice)} is given twice; names must be distinct")
    return names


def read_labels_file(path: str | os.PathLike[str], encoding: str | None = None) -> list[str]:
    """The names of a file, in order: one on each line, or JSON as for `read_label_names`.

    Args:
        path: of the file.
        encoding: of a file that is not UTF-8.

    Raises:
        DataError: it cannot be read, names nothing, or a name twice.
    """
    name, text = _text_of(path, encoding)
    start = text.lstrip()[:1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    is_list_of_lists = len(lines) > 1 and all(line[0] == "[" and line[-1] == "]" for line in lines)
    if start and start in "[{" and not is_list_of_lists:
        return list(_names_of_json(text, name).values())
    if not lines:
        raise DataError(f"{name}: no class names; write one per line, or a JSON list")
    try:
        return checked_names(lines, name)
    except OptionError as error:
        raise DataError(str(error)) from error


def words_by_label(text: str) -> Mapping[str, str] | None:
    """Parse a JSON object {label: word}; None for other texts."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_mapping = isinstance(content, dict) and all(isinstance(w, str) for w in content.values())
    return content if is_mapping else None


def read_label_names(path: str | os.PathLike[str], encoding: str | None = None) -> LabelNames:
    """Read the file of `--label-names`: class names in the order of their ids.

    It contains a list of names in order, or an object {name: id} or {id: name}.

    Args:
        path: of the file.
        encoding: of a file that is not UTF-8.

    Raises:
        DataError: it cannot be read, or has another form.
    """
    name, text = _text_of(path, encoding)
    return _names_of_json(text, name)


def _text_of(path: str | os.PathLike[str], encoding: str | None) -> tuple[str, str]:
    """A file's name for messages, and its content."""
    name = str(path) if str(path).isprintable() else shown(str(path))
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_NAMES_BYTES + 1)
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # no such file, unknown ~user, NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{name}: {reason}; name a file of label names") from error
    if len(data) > MAX_NAMES_BYTES:
        raise DataError(f"{name}: too large for a file of label names")
    return name, _decoded(data, encoding, name)


def _decoded(data: bytes, encoding: str | None, name: str) -> str:
    """Decode bytes: UTF-8 if valid, whatever the encoding of the data file."""
    guessed = encoding_of(data[:HEAD], encoding, name)
    # UTF-16 of ASCII is UTF-8, too, with zeros; so is ISO-2022, with escapes.
    is_stated = encoding is not None and (b"\0" in data or b"\x1b" in data)
    for tried in [guessed] if is_stated else ["utf-8-sig", guessed]:
        with contextlib.suppress(UnicodeError):
            return data.decode(tried).removeprefix("\ufeff")
    remedy = (
        advice_for(data)
        if encoding is None
        else "give its encoding with --encoding, or convert it to UTF-8"
    )
    raise DataError(f"{name}: not UTF-8{'' if encoding is None else f' or {guessed}'}; {remedy}")


def _names_of_json(text: str, name: str) -> LabelNames:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{name}: not JSON ({error})") from error
    except RecursionError as error:
        raise DataError(f"{name}: JSON that is nested too deeply") from error
    return _checked_names(content, name)


def _checked_names(content: Any, where: str) -> LabelNames:
    expected = 'a list such as ["bad", "good"], or an object such as {"bad": 0, "good": 1}'
    codes: dict[str, str] = {}
    match content:
        case list():
            pairs = list(enumerate(content))
        case dict() if all(type(number) is int for number in content.values()):
            pairs = [(number, name) for name, number in content.items()]
        case dict() if all(_WRITTEN.fullmatch(number) for number in content):
            pairs = [(int(number.partition(".")[0]), name) for number, name in content.items()]
            codes = {key: name for key, name in content.items() if integer_of(key) is None}
        case _:
            raise DataError(f"{where}: no class names; write {expected}")
    if wrong := [name for _, name in pairs if not isinstance(name, str) or not name.strip()]:
        raise DataError(f"{where}: {shown(wrong[0])} is not a name; write {expected}")
    names = LabelNames((number, name.strip()) for number, name in sorted(pairs, key=_first))
    names.codes = {code: name.strip() for code, name in codes.items()}
    if not names:
        raise DataError(f"{where}: no class names; write {expected}")
    if len(names) < len(pairs) or len(set(names.values())) < len(pairs):
        raise DataError(f"{where}: contains a name or a number twice")
    for number, name in names.items():
        other = integer_of(name)
        if other is not None and names.get(other, name) != name:
            raise DataError(
                f"{where}: class {number} is named {name!r}, which is the number of another "
                "class; rename it"
            )
    return names


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]
