"""Checks of `--encoding`, `--separator` and `--columns`; `minllama.options.data` calls them."""

import codecs
import csv
from encodings.aliases import aliases

from minllama.errors import OptionError

# Codecs that Python lists among the encodings, but that no text file is written in.
NO_FILE_IS = {"idna", "punycode", "raw_unicode_escape", "undefined", "unicode_escape"}
# Names that other programs use for an encoding, and Python does not.
CALLED = {"ansi": "cp1252", "windows": "cp1252", "unicode": "utf-16", "excel": "cp1252"}

SEPARATORS = {
    "comma": ",",
    "semicolon": ";",
    "tab": "\t",
    "\\t": "\t",
    "pipe": "|",
    "bar": "|",
    "space": " ",
    "colon": ":",
}


def checked_encoding(name: str) -> str:
    """Return Python's name of an encoding: `cp1252` for `windows-1252`.

    Raises:
        OptionError: Python has no such encoding; the message suggests similar names.
    """
    try:
        info = codecs.lookup(name)
        is_text = info._is_text_encoding and info.name.replace("-", "_") not in NO_FILE_IS
        b"".decode(info.name)  # some exist only on other systems
    except (LookupError, ValueError, OSError):
        is_text = False
    if is_text:
        return info.name
    import difflib

    known = {alias.replace("_", "-") for alias in (*aliases, *aliases.values())}
    known = {alias for alias in known if not alias.isdecimal()} - {"ansi", "mbcs"}
    spelled = name.lower().replace("_", "-")[:40]
    near = difflib.get_close_matches(spelled, known, n=3, cutoff=0.7)
    if spelled in CALLED:
        near = [CALLED[spelled]]
    meant = f"; did you mean {' or '.join(near)}?" if near else "; try cp1252, latin-1 or utf-16"
    raise OptionError(f"encoding {name[:40]!r} is not a text encoding that Python knows{meant}")


def checked_separator(separator: str) -> str:
    """Return the separator character, given itself or by name.

    Raises:
        OptionError: the character cannot separate cells.
    """
    character = SEPARATORS.get(separator.lower(), separator)
    if len(character) != 1 or character in '"\r\n\0\ufeff' or "\ud800" <= character <= "\udfff":
        raise OptionError(
            f"separator must be one character (not a quote or line end) or one of "
            f"{', '.join(SEPARATORS)}; not {separator[:40]!r}"
        )
    return character


def column_names(text: str) -> list[str]:
    """Split the names of `--columns` at commas; a quoted name may contain a comma.

    Raises:
        OptionError: a quote is not closed, or a name is empty or given twice.
    """
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error:
        rows = []
    names = [name.strip() for row in rows for name in row]
    if len(rows) != 1 or len(set(names)) < len(names) or not all(names):
        raise OptionError(
            "columns must be distinct names separated by commas, quoted where a name contains a "
            f"comma, not {text!r}"
        )
    return names
