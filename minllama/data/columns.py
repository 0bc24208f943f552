"""Choose the text and label columns: as given, or guessed from their names.

If there is no unambiguous guess, the error lists the columns.
"""

from collections.abc import Collection, Mapping, Sequence

from minllama.errors import DataError
from minllama.text import cut, listed, printable, shown

# The first of each list takes precedence over the others.
TEXT_NAMES = (
    "text",
    "sentence",
    "review",
    "content",
    "comment",
    "message",
    "tweet",
    "body",
    "document",
    "utterance",
    "phrase",
)
LABEL_NAMES = (
    "label",
    "labels",
    "class",
    "category",
    "sentiment",
    "target",
    "intent",
    "emotion",
    "topic",
    "rating",
    "stars",
)


def find_columns(
    columns: Sequence[str],
    name: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    needs_label: bool,
    no_text: Mapping[str, str] | None = None,
    no_label: Mapping[str, str] | None = None,
    header: str = "",
) -> tuple[str, str | None]:
    """The text column and the label column (None if there is none and none is needed).

    Args:
        columns: all there are.
        name: of the source, for errors.
        text_column, label_column: as given; None to guess by name, then by elimination.
        needs_label: whether a source without a label column is refused.
        no_text, no_label: types of columns that cannot be one, as in `Table`.
        header: advice for the case that the first line is not a header; empty if there is no doubt.

    Raises:
        DataError: a column is not there, or cannot be guessed.
    """
    no_text, no_label = no_text or {}, no_label or {}
    if any(is_known(column) or column in (text_column, label_column) for column in columns):
        header = ""
    # Suggested instead of a column of the wrong type: never the column of the other purpose.
    of_text = [c for c in columns if c != label_column and not is_label(c)]
    of_label = [c for c in columns if c != text_column and not is_text(c)]
    text = _checked_column(columns, name, text_column, "text", no_text, header, of_text)
    if not needs_label and label_column not in columns:
        label_column = None  # files to classify need not have the training file's columns
    label = _checked_column(columns, name, label_column, "label", no_label, header, of_label)
    left = [c for c in columns if c and c not in (text, label)]  # pandas' index has no name
    if label is None:
        label, rivals = _guessed(left, LABEL_NAMES)
        if rivals and needs_label:
            raise _unclear(name, rivals, "label", {}, header)
        left = [column for column in left if column != label]
    if text is None:
        may_be = [column for column in left if column not in no_text]
        text, rivals = _guessed(may_be, TEXT_NAMES)
        typed = _guessed([column for column in no_text if column != label], TEXT_NAMES)[0]
        if text is None and not rivals and typed is not None:
            raise _of_type(name, typed, "text", no_text, [c for c in of_text if c != label])
        if text is None and not rivals and len(may_be) == 1:
            text = may_be[0]
            if header and _is_prose(text):
                raise _unclear(name, columns, "text", {}, header)
        if text is None:
            raise _unclear(name, rivals or columns, "text", no_text, header)
        left.remove(text)
    if label is None and needs_label:
        if (typed := _guessed(list(no_label), LABEL_NAMES)[0]) is not None:
            raise _of_type(name, typed, "label", no_label, [c for c in of_label if c != text])
        if len(left := _without_days(left, no_text)) != 1:
            raise _unclear(name, columns, "label", no_label, header)
        label = left[0]
    return text, label


def _without_days(left: list[str], no_text: Mapping[str, str]) -> list[str]:
    """Columns that may be labels by elimination: dates and times only if nothing else is."""
    return [column for column in left if not _is_day(no_text.get(column, ""))] or left


def _is_prose(column: str) -> bool:
    """Whether a name looks like a text, or a whole line, of a file without a header."""
    return len(column.split()) > 4 or column.endswith((".", "!", "?")) or "|" in column


def is_known(column: str) -> bool:
    """Whether this is a usual name of a text or label column."""
    return is_text(column) or is_label(column)


def is_text(column: str) -> bool:
    """Whether this is a usual name of a text column."""
    return column.lower() in TEXT_NAMES


def is_label(column: str) -> bool:
    """Whether this is a usual name of a label column."""
    return column.lower() in LABEL_NAMES


def _is_day(kind: str) -> bool:
    return kind.startswith(("date", "time32", "time64"))


def _checked_column(
    columns: Sequence[str],
    name: str,
    column: str | None,
    what: str,
    types: Mapping[str, str],
    header: str,
    others: Sequence[str],
) -> str | None:
    if column is not None and column in types:
        raise _of_type(name, column, what, types, others)
    if column is not None and column not in columns:
        hint = f"; {header}" if header else ""
        raise DataError(
            f"{name}: no column {column!r}; set --{what}-column to one of {listed(columns)}{hint}"
        )
    return column


def _of_type(
    name: str, column: str, what: str, types: Mapping[str, str], columns: Sequence[str]
) -> DataError:
    others = [other for other in columns if other not in types and other != column]
    remedy = (
        f"convert it to strings, in pandas with df[{shown(column)}].{_as_strings(types[column])}"
    )
    if others:
        remedy += f", or give --{what}-column one of {listed(others)}"
    kind = printable(types[column])
    kind = cut(kind)
    return DataError(f"{name}: column {column!r} is {kind}, which cannot be a {what}; {remedy}")


def _as_strings(kind: str) -> str:
    """The pandas expression that converts a column to strings."""
    if "binary" in kind.partition("<")[0]:
        return 'str.decode("utf-8")'
    return "map(str)" if "<" in kind else "astype(str)"


def names_text_column(columns: Collection[str], text_column: str | None) -> bool:
    """Whether the text column is identified by its name, and not only by elimination."""
    if text_column is not None:
        return text_column in columns
    return any(column.lower() in TEXT_NAMES for column in columns)


def _guessed(left: list[str], guesses: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The chosen column, or None and the candidates."""
    found = [column for column in left if column.lower() in guesses]
    first = [column for column in found if column.lower() == guesses[0]]
    if len(first) == 1 or len(found) == 1:
        return (first or found)[0], []
    return None, found


def _unclear(
    name: str, columns: Sequence[str], what: str, types: Mapping[str, str], header: str
) -> DataError:
    may_be = [column for column in columns if column not in types]
    there = f"there are {listed(may_be)}" if may_be else "no column has that type"
    unfit = [f"{column!r} is {printable(kind)[:40]}" for column, kind in types.items()]
    if unfit and not may_be:
        there += f" ({', '.join(unfit[:5])})"
    hint = f"; {header}" if header else ""
    several = what == "label" and len(may_be) > 2  # one of them is the text column
    vectors = ", or the columns of 0 and 1 with --label-columns" * several
    return DataError(
        f"{name}: which column holds the {what}? {there}; "
        f"name one with --{what}-column{vectors}{hint}"
    )
