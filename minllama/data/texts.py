"""Check texts that callers pass in, and report the invalid ones."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from minllama.data.rows import TEXT, Rows
from minllama.errors import DataError
from minllama.text import first_few, shown


def checked_texts(texts: Any, what: str = "texts") -> Sequence[str]:
    """The texts as a list of strings, or as they are if they are those of a data set.

    Args:
        texts: a list, a tuple, a NumPy array, a pandas Series: what has strings in an order.
        what: they are called so in errors.

    Raises:
        DataError: it is one string, has no order, or holds something else than strings; names the
            places, from 0.
    """
    if isinstance(texts, Rows) and texts.kind == TEXT:
        return texts
    if isinstance(texts, str | bytes | bytearray):
        kind = "the string" if isinstance(texts, str) else "the bytes"
        raise DataError(f"{what} must be a list of strings, not {kind} {shown(texts[:40])}")
    if isinstance(texts, Mapping | Set):
        raise DataError(f"{what} must be a list of strings, not a {type(texts).__name__}")
    if hasattr(texts, "columns"):
        raise DataError(f"{what} must be a list of strings, not a table; give one of its columns")
    try:
        values = list(texts)
    except TypeError as error:
        raise DataError(f"{what} must be a list of strings, not {shown(texts)}") from error
    not_strings = [i for i, value in enumerate(values) if not isinstance(value, str)]
    if not_strings:
        problems = first_few(f"{what}[{i}] is {_named(values[i])}" for i in not_strings)
        raise DataError(f"{problems}: not a string; give a text instead, or omit it")
    return values


def _named(value: Any) -> str:
    """A description of a value that is not a string."""
    if value is None:
        return "None (missing)"
    if isinstance(value, float) and math.isnan(value):
        return "NaN (missing)"
    if type(value).__name__ in ("NAType", "NaTType"):
        return f"{value} (missing)"
    if isinstance(value, bytes | bytearray):
        return f"the bytes {shown(bytes(value))}"
    if isinstance(value, int | float):
        return f"the number {value}" if not isinstance(value, bool) else f"{value}"
    return f"a {type(value).__name__}"
