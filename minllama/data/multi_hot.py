"""Read multi-hot labels: vectors such as `[1, 0, 1]`, or one column per label."""

from collections.abc import Sequence
from typing import Any

from minllama.data.label_names import names_of_option
from minllama.errors import DataError
from minllama.text import listed, shown

_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


def vector_of(value: Any) -> tuple[int, ...] | None:
    """A list of two or more zeros and ones; None for anything else."""
    if not isinstance(value, list) or len(value) < 2:
        return None
    if not all(isinstance(v, int | float) and v in (0, 1) for v in value):
        return None
    return tuple(map(int, value))


def is_surely_a_vector(vectors: Sequence[tuple[int, ...]]) -> bool:
    """Whether lists of zeros and ones cannot be read as lists of the labels 0 and 1.

    Lists of labels have each label once, so [1, 0] may be either, but [1, 1] and [1, 0, 0] are
    vectors.
    """
    return any(len(set(vector)) < len(vector) for vector in vectors)


def vector_labels(value: Any, names: Sequence[str]) -> list[str]:
    """The labels whose elements are one.

    Raises:
        ValueError: the value is no vector of as many zeros and ones as there are names.
    """
    vector = vector_of(value)
    if vector is None and isinstance(value, list) and len(value) == len(names) == 1:
        vector = vector_of([*value, 0])
        vector = None if vector is None else vector[:1]
    if vector is None or len(vector) != len(names):
        raise ValueError(
            f"{shown(value)} is not a multi-hot vector of {len(names)} zeros and ones, one per "
            "label"
        )
    return [name for name, bit in zip(names, vector, strict=True) if bit]


def names_of_columns(text: str) -> list[str]:
    """The names of `--label-columns`: separated by commas, quoted if they contain one.

    Raises:
        OptionError: a quote is not closed, or a name is empty or there twice.
    """
    return names_of_option(text, "--label-columns")


def label_columns(text: str, columns: Sequence[str], name: str) -> list[str]:
    """The columns that `--label-columns` names, of those that the source `name` has.

    Raises:
        OptionError: see `names_of_columns`.
        DataError: the source has no such column.
    """
    requested = names_of_columns(text)
    if missing := [column for column in requested if column not in columns]:
        raise DataError(
            f"{name}: no column {listed(missing)}; choose --label-columns from {listed(columns)}"
        )
    return requested


def column_vector(values: Sequence[Any], columns: Sequence[str]) -> list[int] | None:
    """The zeros and ones of a row's label columns; None if all are missing or -1.

    Raises:
        ValueError: one is neither 0 nor 1; names its column.
    """
    texts = [_text(value) for value in values]
    if all(text in ("", "-1", "-1.0") for text in texts):
        return None
    for text, column, value in zip(texts, columns, values, strict=True):
        if text not in _BITS:
            what = "nothing" if text == "" else shown(value)
            raise ValueError(f"column {column!r} contains {what}, not 0 or 1")
    return [_BITS[text] for text in texts]


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip().lower()
