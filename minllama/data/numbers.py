"""Convert cells of a label column to numbers, for regression.

Has the interface of `LabelReader`, which reads classes.
"""

import decimal
import math
import numbers
import re
from typing import Any

from minllama.text import shown

# As Python's float(), but for its underscores, and for words: "nan" and "inf" are no targets.
LARGEST = 1e100  # sums of squares must fit into floats
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)


class NumberReader:
    """Reads the number cells of one source; see `minllama.data.labels.LabelReader`."""

    hint = ""

    def unfolded(self, value: Any) -> Any:
        """The unchanged cell: a list is not a number."""
        return value

    def read(self, value: Any) -> list[float] | None:
        """The number in a cell; None for an empty cell.

        Raises:
            ValueError: it is not a finite number; the message says why.
        """
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, float) and math.isnan(value):  # how tables mark what is missing
            return None
        return [number_of(value)]

    def is_placeholder(self, value: Any) -> bool:
        """Every number is a target."""
        return False


def number_of(value: Any) -> float:
    """A cell as a finite number.

    Raises:
        ValueError: it is not a number; the message says why.
    """
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            remedy = (
                " (write a decimal point instead of the comma)" if _COMMA.fullmatch(text) else ""
            )
            raise ValueError(f"label {shown(value)} is not a number{remedy}")
        number = float(text)
    elif isinstance(value, bool):
        raise ValueError(f"label {shown(value)} is not a number")
    elif isinstance(value, numbers.Real | decimal.Decimal):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    else:
        raise ValueError(f"label {shown(value)} is not a number")
    if not math.isfinite(number):
        raise ValueError(f"label {shown(value)} is not a finite number")
    if abs(number) > LARGEST:
        raise ValueError(f"label {shown(value)} is larger than {LARGEST:g}")
    return number


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        number_of(text)
    except ValueError:
        return False
    return True
