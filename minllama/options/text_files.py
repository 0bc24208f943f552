"""What people say of a file of text: its encoding, and what separates its cells; checked.

Knows nothing of how files are read.
"""

import codecs
import csv
from encodings.aliases import aliases

from minllama.errors import OptionError

# Codecs from text to text that Python counts among the encodings: none that a file is written in.
NO_FILE_IS = {"idna", "punycode", "raw_unicode_escape", "undefined", "unicode_escape"}
# What programs call an encoding, and Python does not.
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
    """The encoding `name`, as Python calls it: `cp1252` for `windows-1252`.

    Raises:
        OptionError: there is none of that name; names near ones.
    """
    try:
        info = codecs.lookup(name)
        is_text = info._is_text_encoding and info.name.replace("-", "_") not in NO_FILE_IS
        b"".decode(info.name)  # some are only there on other systems
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
    meant = f"; is {' or '.join(near)} meant?" if near else "; try cp1252, latin-1 or utf-16"
    raise OptionError(f"encoding {name[:40]!r} is no text encoding that Python knows{meant}")


def checked_separator(separator: str) -> str:
    """The character that `separator` is, or is the name of.

    Raises:
        OptionError: it is none that can separate cells.
    """
    character = SEPARATORS.get(separator.lower(), separator)
    if len(character) != 1 or character in '"\r\n\0\ufeff' or "\ud800" <= character <= "\udfff":
        raise OptionError(
            f"separator must be one character, no quote or line end, or one of "
            f"{', '.join(SEPARATORS)}; not {separator[:40]!r}"
        )
    return character


def column_names(text: str) -> list[str]:
    """The names that `--columns` lists: separated by commas, in quotes where one holds a comma.

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
            "columns must be names with commas between them, each once, in quotes where one holds "
            f"a comma, not {text!r}"
        )
    return names
