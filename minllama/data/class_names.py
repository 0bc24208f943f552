"""Convert one label of any type to its class name.

The same table as CSV, TSV, JSON or Parquet gives the same names: a value's name is its text in CSV,
`1.0` is `1` if all labels are integers (tables with missing values store integers as floats), and
`True` is `true` if all are booleans. Nothing else changes: `007` is not `7`.
"""

import datetime
import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from minllama.text import shown

MAX_DIGITS = 300  # longer numbers are not compared by value
# Digits without leading zeros: 007 is a code, not a number.
_INTEGER = re.compile(rf"-?(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})(\.0+)?", re.ASCII)
_NUMBER = re.compile(
    rf"[+-]?(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})(\.[0-9]{{1,{MAX_DIGITS}}})?"
    r"([eE][+-]?[0-9]{1,3})?",
    re.ASCII,
)
_NUMBER_LIKE = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", re.ASCII)
_TRUTH = ("false", "true")


def class_text(value: Any) -> str | None:
    """A scalar as text, without surrounding white space; None if it is missing.

    Args:
        value: text, a number, a boolean, a date, or None.

    Raises:
        ValueError: it has another type.
    """
    match value:
        case None:
            return None
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"label {shown(value)} contains half of a character (a lone surrogate)"
                ) from error
            return value.strip() or None
        case bool():
            return str(value).lower()
        case float():
            # Numeric tables mark missing values with NaN.
            return None if math.isnan(value) else repr(float(value))
        case Decimal():
            return None if value.is_nan() else str(value)
        case int():
            return str(int(value))
        case datetime.datetime():
            is_day = value.time() == datetime.time() and value.tzinfo is None
            return str(value.date() if is_day else value)  # as pandas writes a column of days
        case datetime.date() | datetime.time():
            return str(value)
    raise ValueError(f"label {shown(value)} is neither a name nor a number")


def integer_of(text: str) -> int | None:
    """Parse an integer such as `7`, `-7` or `7.0`; None for anything else."""
    return int(text.partition(".")[0]) if _INTEGER.fullmatch(text) else None


def number(text: str) -> Decimal | None:
    """Parse a number; None for other texts, and for numbers with leading zeros."""
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def is_number_like(text: str) -> bool:
    """Whether a name looks like a number, also with leading zeros."""
    return _NUMBER_LIKE.fullmatch(text) is not None


def is_truth(text: str) -> bool:
    """Whether a text is a truth value, as JSON (true), Python (True) or Excel (TRUE) write it."""
    return text.casefold() in _TRUTH


def same_classes(names: Sequence[str], others: Sequence[str]) -> dict[str, str] | None:
    """The position in `others` of each name, if both list the same classes; else None.

    Booleans and numbers may be spelled differently, as in files of different formats; other names
    must be equal.
    """
    if set(names) == set(others):
        return {name: name for name in names}
    values, found = ({_value(name): name for name in some} for some in (names, others))
    if len(values) < len(names) or len(found) < len(others) or values.keys() != found.keys():
        return None
    return {name: found[value] for value, name in values.items()}


def _value(name: str) -> str | Decimal:
    """A name in normalized spelling."""
    if is_truth(name):
        return name.casefold()
    value = number(name)
    return name if value is None else value


def class_names(texts: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """The class names for labels written like this, and the class of each text.

    If all are integers, `1` and `1.0` are the same class; if all are booleans, `true` and `True`
    are. Numbers are sorted by value, everything else by name.
    """
    found = set(texts)
    name_of = {text: text for text in found}
    if found and all(map(is_truth, found)):
        name_of = {text: text.casefold() for text in found}
    else:
        integers = {text: value for text in found if (value := integer_of(text)) is not None}
        if len(integers) == len(found):
            name_of = {text: str(value) for text, value in integers.items()}
        else:  # the shortest of several spellings
            shortest: dict[int, str] = {}
            for text in sorted(integers, key=lambda text: (-len(text), text)):
                shortest[integers[text]] = text
            name_of |= {text: shortest[value] for text, value in integers.items()}
    names = sorted(set(name_of.values()))
    if all(number(name) is not None for name in names):
        names.sort(key=Decimal)
    place = {name: index for index, name in enumerate(names)}
    return names, {text: place[name] for text, name in name_of.items()}
