"""Which column holds the text, and which the label: as asked, or guessed from their names.

A guess is made only where there is one; otherwise the error lists the columns. Knows nothing of
what is in them.
"""

from collections.abc import Collection, Sequence

from minllama.data.records import listed
from minllama.errors import DataError

# The first of each is taken even where others of the list are there.
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
) -> tuple[str, str | None]:
    """The columns of the text and of the label (None where there is none and none is needed).

    Args:
        columns: all there are.
        name: of the source, for errors.
        text_column, label_column: as asked for; None to guess by name, and else by elimination.
        needs_label: whether a source without a label column is refused.

    Raises:
        DataError: a column is not there, or cannot be guessed.
    """
    text = _asked(columns, name, text_column, "--text-column")
    if not needs_label and label_column not in columns:
        label_column = None  # what is to be classified need not have the training file's columns
    label = _asked(columns, name, label_column, "--label-column")
    # The index that pandas writes has no name.
    left = [column for column in columns if column and column not in (text, label)]
    if label is None:
        label, rivals = _guessed(left, LABEL_NAMES)
        if rivals and needs_label:
            raise _unclear(f"{name}: which column holds the label?", rivals, "label")
        left = [column for column in left if column != label]
    if text is None:
        text, rivals = _guessed(left, TEXT_NAMES)
        if text is None and not rivals and len(left) == 1:
            text = left[0]
        if text is None:
            raise _unclear(f"{name}: which column holds the text?", rivals or columns, "text")
        left.remove(text)
    if label is None and needs_label:
        if len(left) != 1:
            raise _unclear(f"{name}: which column holds the label?", columns, "label")
        label = left[0]
    return text, label


def _asked(columns: Sequence[str], name: str, asked: str | None, flag: str) -> str | None:
    if asked is not None and asked not in columns:
        raise DataError(f"{name}: has no column {asked!r}; give {flag} one of {listed(columns)}")
    return asked


def tells_text(columns: Collection[str], text_column: str | None) -> bool:
    """Whether the column of the text is among these by its name, and not only by elimination."""
    if text_column is not None:
        return text_column in columns
    return any(column.lower() in TEXT_NAMES for column in columns)


def _guessed(left: list[str], guesses: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """The column that is meant, or None and those that may be."""
    found = [column for column in left if column.lower() in guesses]
    first = [column for column in found if column.lower() == guesses[0]]
    if len(first) == 1 or len(found) == 1:
        return (first or found)[0], []
    return None, found


def _unclear(question: str, columns: Sequence[str], what: str) -> DataError:
    return DataError(f"{question} there are {listed(columns)}; name one with --{what}-column")
