"""Load a data file as texts and class ids, or stream its rows.

Texts are kept unchanged: nothing is stripped, case-folded or normalized.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from minllama.data.columns import find_columns, names_text_column
from minllama.data.examples import Examples, check_text, no_rows, text_of
from minllama.data.label_lists import joined_names
from minllama.data.label_names import read_label_names
from minllama.data.labels import LabelReader
from minllama.data.multi_hot import label_columns, names_of_columns
from minllama.data.numbers import NumberReader
from minllama.data.records import BadRow, BadRows, Record, Table
from minllama.data.source import Source, open_table
from minllama.data.types import Dataset, Labels, Notice
from minllama.errors import DataError, OptionError
from minllama.options import DataOptions
from minllama.text import listed, shown

__all__ = [
    "Dataset",
    "Labels",
    "Notice",
    "Row",
    "check_text",
    "count_rows",
    "load_dataset",
    "stream_rows",
]

COLUMNS_FROM = 100  # rows whose columns are a file's, if each row has its own
AT_MOST_FROM = 10_000  # if the first rows have no text or label column
OF_CLASSES = ("multi_label", "label_columns", "label_lists", "label_separator", "label_names")


def load_dataset(
    source: Source,
    options: DataOptions | None = None,
    *,
    label_names: Sequence[str] | None = None,
    needs_labels: bool = True,
    numbers: bool = False,
) -> Dataset:
    """Read a whole file of examples.

    Args:
        source: a path, `-` for standard input, or `owner/name[/config][@revision][:split]` on the
            Hugging Face hub.
        options: format, columns, label names, handling of bad rows.
        label_names: known classes, of the training file or a classifier; a row with any other label
            is bad. None for the classes in the file.
        needs_labels: whether a row without a label is bad. If not, labels are None unless every row
            has one; with `skip_bad_rows`, rows with unknown labels are skipped if others have known
            ones.
        numbers: labels are numbers for a regression; a row with a non-finite one is bad.

    Raises:
        DataError: the source cannot be read, has no rows, or has bad rows that may not be skipped.
    """
    options = options or DataOptions()
    if numbers:
        _check_regression_options(options)
    with open_table(source, options, labelled=needs_labels) as table:
        rows, columns = _columns_of(table)
        text_column, label_columns = _text_and_labels(
            table, columns, options, needs_labels, label_names
        )
        reader: LabelReader | NumberReader = (
            NumberReader() if numbers else _label_reader(table, label_columns, options, label_names)
        )
        examples = Examples(
            *(text_column, label_columns, reader, options),
            needs_labels=needs_labels,
            declared=options.label_names is None and table.class_names.keys() >= {*label_columns},
        )
        for row in rows:
            examples.add(row)
            examples.bad_rows.check(table.name, len(examples))
        return examples.dataset(table.name, table.remedies)


@dataclass(frozen=True, slots=True)
class Row:
    """One text of a stream, with its row.

    Attributes:
        index: number of rows before it in the source, good and bad.
        place: its position for messages, such as `line 3`.
        text: to classify.
        record: the complete row, by column.
        column: name of the text column.
    """

    index: int
    place: str
    text: str
    record: dict[str, Any]
    column: str = "text"


def stream_rows(
    source: Source,
    options: DataOptions | None = None,
    *,
    start: int = 0,
    bad_rows: BadRows | None = None,
) -> Iterator[Row]:
    """The texts of a source one by one, in constant memory (but for a .json list); labels unread.

    Args:
        source: as for `load_dataset`; in plain text, each line is a text.
        options: format, columns, handling of bad rows.
        start: skip rows with a lower index, to resume an interrupted run.
        bad_rows: counts those that are left out, with `skip_bad_rows`.

    Raises:
        DataError: the source cannot be read, or, when it is reached, a bad row that may not be
            skipped.
    """
    options = options or DataOptions()
    with open_table(source, options) as table:
        yield from rows_of(table, options, start=start, bad_rows=bad_rows)


def rows_of(
    table: Table,
    options: DataOptions,
    *,
    start: int = 0,
    bad_rows: BadRows | None = None,
) -> Iterator[Row]:
    """The texts of an open table one by one; arguments and errors are those of `stream_rows`."""
    bad_rows = BadRows() if bad_rows is None else bad_rows
    rows, columns = _columns_of(table, lambda found: names_text_column(found, options.text_column))
    text_column, _ = _text_and_labels(table, columns, options, needs_labels=False)
    n_good = 0
    for row in rows:
        if row.index < start:
            continue
        try:
            text = text_of(row, text_column)
        except ValueError as error:
            bad_rows.add(BadRow(row.index, row.place, str(error)))
            bad_rows.remedies = table.remedies
            if not options.skip_bad_rows:
                raise bad_rows.error(table.name, *table.remedies) from error
            bad_rows.check(table.name, n_good)
            continue
        n_good += 1
        assert isinstance(row, Record)
        yield Row(row.index, row.place, text, row.values, text_column)


def count_rows(
    source: Source, options: DataOptions | None = None, *, start: int = 0
) -> tuple[int, BadRows]:
    """Count the good rows of a source before streaming it, and collect the bad ones.

    So bad rows are found before hours of work, and progress is known. Not for standard input.

    Args:
        source, options: as for `stream_rows`.
        start: count the good rows from this index on.

    Raises:
        DataError: the source cannot be read, has no rows, or has bad rows that may not be skipped.
    """
    options = options or DataOptions()
    name, bad_rows = str(source), BadRows()
    skipping = replace(options, skip_bad_rows=True)
    count, is_empty = 0, True
    for row in stream_rows(source, skipping, bad_rows=bad_rows):
        is_empty = False
        count += row.index >= start
    if bad_rows.count and not options.skip_bad_rows:
        raise bad_rows.error(name, *bad_rows.remedies)
    if is_empty:
        raise DataError(no_rows(name, bad_rows, bad_rows.remedies))
    return count, bad_rows


def _columns_of(
    table: Table, enough: Callable[[Collection[str]], bool] | None = None
) -> tuple[Iterator[Record | BadRow], list[str] | None]:
    """All rows of a table, and its columns; None without rows.

    JSON objects may have different keys: the first COLUMNS_FROM determine the columns, or fewer if
    their columns are `enough`, so that the first text of a stream is not delayed.
    """
    if table.columns is not None:
        return table.rows, table.columns
    ahead: list[Record | BadRow] = []
    columns: dict[str, None] = {}  # in order
    for row in table.rows:
        ahead.append(row)
        if isinstance(row, Record):
            columns |= dict.fromkeys(row.values)
        if columns and (len(ahead) >= COLUMNS_FROM or (enough is not None and enough(columns))):
            break
        if len(ahead) >= AT_MOST_FROM:
            break
    return itertools.chain(ahead, table.rows), list(columns) or None


def _text_and_labels(
    table: Table,
    columns: list[str] | None,
    options: DataOptions,
    needs_labels: bool,
    known: Sequence[str] | None = None,
) -> tuple[str, list[str]]:
    """The column of the text, and those of the labels: none, one, or one for each label."""
    name = table.name
    if columns is None:  # no row is good: each reports why, whatever its columns
        one = [] if options.label_column is None else [options.label_column]
        return options.text_column or "text", one
    if not columns and not table.no_label:
        raise DataError(no_rows(name, BadRows()))
    find = partial(
        find_columns,
        name=name,
        no_text=table.no_text | table.no_label,
        no_label=table.no_label,
        header=table.header,
    )
    if options.label_columns is not None:
        several = _several_columns(name, columns, options.label_columns, needs_labels, known)
        left = [column for column in columns if column not in several]
        text_column = options.text_column
        text, _ = find(left, text_column=text_column, needs_label=False)
        return text, several
    try:
        text, label = find(
            columns,
            text_column=options.text_column,
            label_column=options.label_column,
            needs_label=needs_labels,
        )
    except DataError as error:
        if known and options.label_column is None and set(known) <= set(columns):
            raise DataError(
                f"{error}; or read columns of 0 and 1 with --label-columns "
                f"{shown(joined_names(known))}"
            ) from error
        raise
    return text, [] if label is None else [label]


def _several_columns(
    name: str,
    columns: list[str],
    requested: str,
    needs_labels: bool,
    known: Sequence[str] | None,
) -> list[str]:
    if not needs_labels and not set(names_of_columns(requested)) & set(columns):
        return []  # as in test files with hidden labels
    several = label_columns(requested, columns, name)
    if known is not None and set(known) != set(several):
        raise DataError(
            f"{name}: --label-columns has {listed(several)}, but the labels are {listed(known)}; "
            "name exactly their columns"
        )
    return several


def _check_regression_options(options: DataOptions) -> None:
    """Refuse options for classes if labels are numbers."""
    for name in OF_CLASSES:
        if getattr(options, name) != getattr(DataOptions, name):
            flag = f"--{name.replace('_', '-')}"
            raise OptionError(f"{flag} is for classes, but the labels are numbers; omit it")


def _label_reader(
    table: Table, columns: Sequence[str], options: DataOptions, known: Sequence[str] | None
) -> LabelReader:
    number_names: dict[int, str] | None = None
    codes: dict[str, str] = {}
    if options.label_names is not None:
        given = read_label_names(options.label_names, options.encoding)
        number_names, codes = given, given.codes
    elif len(columns) == 1 and columns[0] in table.class_names:
        number_names = dict(enumerate(table.class_names[columns[0]]))
    if options.label_separator != DataOptions.label_separator and not options.multi_label:
        raise OptionError("label_separator needs --multi-label; add it, or omit label_separator")
    separator = options.label_separator if options.has_several_labels else None
    return LabelReader(known, number_names, codes=codes, separator=separator)
