"""A file of examples -> texts and numbered labels, whole in memory; or its rows, one at a time.

Texts stay as they are written: nothing is stripped, folded or normalised. Knows nothing of tokens,
models or batches.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from minllama.data.columns import find_columns, tells_text
from minllama.data.labels import UNLABELLED, Cell, LabelReader, class_names, read_label_names
from minllama.data.records import BadRow, BadRows, Record, Table, first_few
from minllama.data.source import Source, open_table
from minllama.errors import DataError, OptionError
from minllama.options import DataOptions
from minllama.text import printable

COLUMNS_FROM = 100  # rows that tell which columns a file has, where each row has its own

Labels = list[int] | list[tuple[int, ...]]


@dataclass(frozen=True)
class Notice:
    """Something that a person should hear about, and that is no error.

    Attributes:
        kind: what it is about, for programs.
        message: one line, for people.
        count: of the rows, texts or classes that it is about.
    """

    kind: Literal[
        "skipped",
        "unlabelled",
        "numbers",
        "case",
        "conflicts",
        "absent",
        "duplicates",
        "one-class",
    ]
    message: str
    count: int

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Dataset:
    """Texts and their labels.

    Attributes:
        texts: N strings, none of them blank.
        labels: N classes, 0..len(label_names)-1, or N tuples of them; None without labels.
        label_names: the names of the classes, in order.
        source: what it was read from.
        multi_label: whether a text has any number of labels, as a tuple, rather than one.
        notices: what was left out, and the like.
        label_column: where the labels stand in the source; None where no column holds them.
    """

    texts: list[str]
    labels: Labels | None
    label_names: list[str]
    source: str
    multi_label: bool = False
    notices: tuple[Notice, ...] = ()
    label_column: str | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    def classes_of(self, index: int) -> tuple[int, ...]:
        """The classes of one text, whether it may have several or not."""
        assert self.labels is not None
        label = self.labels[index]
        return label if isinstance(label, tuple) else (label,)

    def class_counts(self) -> list[int]:
        """How many texts each class has."""
        counts = [0] * len(self.label_names)
        for index in range(len(self) if self.labels is not None else 0):
            for label in self.classes_of(index):
                counts[label] += 1
        return counts

    def select(self, indices: Sequence[int]) -> Self:
        """The examples at `indices`, in that order, without the notices."""
        labels: Any = None if self.labels is None else [self.labels[i] for i in indices]
        texts = [self.texts[i] for i in indices]
        return replace(self, texts=texts, labels=labels, notices=())


def load_dataset(
    source: Source,
    options: DataOptions | None = None,
    *,
    label_names: Sequence[str] | None = None,
    needs_labels: bool = True,
) -> Dataset:
    """Read a whole file of examples.

    Args:
        source: a path, `-` for standard input, or `owner/name[/config][@revision][:split]` on the
            Hugging Face hub.
        options: format, columns, label names, what to do with bad rows.
        label_names: the classes that are known already, of the training file or of a classifier;
            a label that is none of them makes a bad row. None to take those of the file.
        needs_labels: whether a row without a label is a bad row. If not, the labels are None
            unless every row has one; rows whose label is none of those that are known are left
            out with `skip_bad_rows`, where others have one.

    Raises:
        DataError: the source cannot be read, holds no rows, or bad rows that are not to be skipped.
    """
    options = options or DataOptions()
    with open_table(source, options.data_format, labelled=needs_labels) as table:
        rows, columns = _columns_of(table)
        text_column, label_column = _text_and_label(table.name, columns, options, needs_labels)
        reader = _label_reader(table, label_column, options, label_names)
        examples = _Examples(
            *(text_column, label_column, reader),
            needs_labels=needs_labels,
            many=options.multi_label,
        )
        for row in rows:
            examples.add(row)
        return examples.dataset(table.name, options)


class _Examples:
    """Collects the examples of one source, and its bad rows."""

    def __init__(
        self,
        text_column: str,
        label_column: str | None,
        reader: LabelReader,
        *,
        needs_labels: bool,
        many: bool,
    ) -> None:
        self._text_column = text_column
        self._label_column = label_column
        self._reader = reader
        self._needs_labels = needs_labels
        self._many = many
        self._bad_rows = BadRows()
        self._unread = BadRows()  # labels that nobody needs, and that are none
        self._unread_rows: set[int] = set()  # their places among the texts
        self._texts: list[str] = []
        self._cells: list[list[Cell] | None] = []
        self._has_lists: bool | None = None  # as the first label is

    def add(self, row: Record | BadRow) -> None:
        try:
            text = _text_of(row, self._text_column)
            value = None
            if isinstance(row, Record) and self._label_column is not None:
                value = row.values.get(self._label_column)
            cells = self._read_label(row, value)
        except ValueError as error:
            self._bad_rows.add(BadRow(row.index, row.place, str(error)))
            return
        self._texts.append(text)
        self._cells.append(cells)

    def _read_label(self, row: Record | BadRow, value: Any) -> list[Cell] | None:
        try:
            cells = self._reader.read(value)
            if cells is not None:
                self._check_kind(value)
        except ValueError as error:
            if self._needs_labels:
                raise
            self._unread.add(BadRow(row.index, row.place, str(error)))
            self._unread_rows.add(len(self._texts))
            return None
        if cells is None and self._needs_labels:
            if self._reader.is_placeholder(value):
                raise ValueError(
                    f"label {UNLABELLED} stands for none (where it is a class, name it in a file "
                    "for --label-names)"
                )
            raise ValueError("no label")
        return cells

    def _check_kind(self, value: Any) -> None:
        """Refuse a list behind single labels: it would make a text of each class a set of them."""
        if self._has_lists is None:
            self._has_lists = isinstance(value, list)
        if isinstance(value, list) and not self._has_lists and not self._many:
            raise ValueError(
                "a list of labels, where rows before it have one label each; --multi-label takes "
                "several for every row"
            )

    def dataset(self, name: str, options: DataOptions) -> Dataset:
        """What was collected.

        Raises:
            DataError: bad rows that are not to be skipped, or no others.
        """
        bad_rows, notices = self._bad_rows, []
        if bad_rows.count and not options.skip_bad_rows:
            raise bad_rows.error(name, self._reader.hint)
        if not self._texts:
            raise DataError(_no_rows(name, bad_rows))
        if bad_rows.count:
            message = f"{name}: bad rows left out: {bad_rows.count} ({bad_rows.summary()})"
            notices.append(Notice("skipped", message, bad_rows.count))
        given = [cells for cells in self._cells if cells is not None]
        if self._unread.count and given and options.skip_bad_rows:
            notices.append(self._leave_out_unread(name))
        if self._unread.count or 0 < len(given) < len(self._cells):
            notices.append(self._unlabelled(name, len(given)))
        if positions := self._reader.by_position:
            notices.append(_numbers_as_names(name, positions))
        multi_label = options.multi_label or bool(self._has_lists)
        labels, names = self._numbered(given, multi_label)
        said, column = tuple(notices), self._label_column
        return Dataset(self._texts, labels, names, name, multi_label, said, label_column=column)

    def _leave_out_unread(self, name: str) -> Notice:
        """Leave out the rows whose labels are none; those without one stay, to be predicted."""
        bad, self._unread = self._unread, BadRows()
        kept = [row for row in range(len(self._texts)) if row not in self._unread_rows]
        self._texts = [self._texts[row] for row in kept]
        self._cells = [self._cells[row] for row in kept]
        message = f"{name}: rows with unknown labels left out: {bad.count} ({bad.summary()})"
        return Notice("skipped", message, bad.count)

    def _why_unread(self) -> str:
        if not self._unread.count:
            return ""
        return f" ({'; '.join(filter(None, (self._unread.summary(), self._reader.hint)))})"

    def _unlabelled(self, name: str, n_given: int) -> Notice:
        known = f"only {n_given}" if n_given else "none"
        remedy = "; --skip-bad-rows leaves them out" if n_given and self._unread.count else ""
        message = (
            f"{name}: {known} of {len(self._cells)} rows have a known label"
            f"{self._why_unread()}; none of these labels is used{remedy}"
        )
        return Notice("unlabelled", message, len(self._cells) - n_given)

    def _numbered(
        self, given: list[list[Cell]], multi_label: bool
    ) -> tuple[Labels | None, list[str]]:
        if self._reader.known is not None:
            names, index_of = self._reader.known, self._reader.index_of
        else:
            names, index_of = class_names(itertools.chain.from_iterable(given))
        if len(given) < len(self._texts):
            return None, names
        rows = [tuple(sorted({index_of[cell] for cell in cells})) for cells in given]
        return rows if multi_label else [label for (label,) in rows], names


def _numbers_as_names(name: str, positions: Mapping[int, str]) -> Notice:
    pairs = (f"{number} = {printable(positions[number])}" for number in sorted(positions))
    message = (
        f"{name}: its numbers are taken for classes in their order: {first_few(pairs)}; "
        "--label-names FILE says otherwise"
    )
    return Notice("numbers", message, len(positions))


@dataclass(frozen=True, slots=True)
class Row:
    """One text of a stream, and the row that it came in.

    Attributes:
        index: how many rows of the source, good and bad, come before it.
        place: where it stands, as people say it: `line 3`.
        text: what is to be classified.
        record: all of the row, by column.
        column: the one of the text.
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
        source: as for `load_dataset`; lines of text alone are one text each.
        options: format, columns, what to do with bad rows.
        start: leave out the rows whose index is less, to go on where an earlier run was cut.
        bad_rows: counts those that are left out, with `skip_bad_rows`.

    Raises:
        DataError: the source cannot be read; or, at its place in the stream, a bad row that is not
            to be skipped.
    """
    options = options or DataOptions()
    bad_rows = BadRows() if bad_rows is None else bad_rows
    with open_table(source, options.data_format) as table:
        rows, columns = _columns_of(table, lambda found: tells_text(found, options.text_column))
        text_column, _ = _text_and_label(table.name, columns, options, needs_labels=False)
        for row in rows:
            if row.index < start:
                continue
            try:
                text = _text_of(row, text_column)
            except ValueError as error:
                bad_rows.add(BadRow(row.index, row.place, str(error)))
                if not options.skip_bad_rows:
                    raise bad_rows.error(table.name) from error
                continue
            assert isinstance(row, Record)
            yield Row(row.index, row.place, text, row.values, text_column)


def count_rows(
    source: Source, options: DataOptions | None = None, *, start: int = 0
) -> tuple[int, BadRows]:
    """Read through a source that will be streamed: how many good rows it has, and the bad ones.

    So a bad row is found before hours of work, and progress can be told. Not for standard input.

    Args:
        source, options: as for `stream_rows`.
        start: count the good rows from this index on.

    Raises:
        DataError: the source cannot be read, has no rows, or bad rows that are not to be skipped.
    """
    options = options or DataOptions()
    name, bad_rows = str(source), BadRows()
    skipping = replace(options, skip_bad_rows=True)
    count, is_empty = 0, True
    for row in stream_rows(source, skipping, bad_rows=bad_rows):
        is_empty = False
        count += row.index >= start
    if bad_rows.count and not options.skip_bad_rows:
        raise bad_rows.error(name)
    if is_empty:
        raise DataError(_no_rows(name, bad_rows))
    return count, bad_rows


def _no_rows(name: str, bad_rows: BadRows) -> str:
    if not bad_rows.count:
        return f"{name}: holds no rows; give a file with an example on each line"
    return f"{name}: all {bad_rows.count} rows are bad: {bad_rows.summary()}"


def _columns_of(
    table: Table, enough: Callable[[Collection[str]], bool] | None = None
) -> tuple[Iterator[Record | BadRow], list[str] | None]:
    """All rows of a table, and its columns; None where no row tells them.

    JSON objects need not all have the same keys: the first COLUMNS_FROM tell which there are, or
    fewer where their columns are `enough`, so that a stream's first text does not wait for others.
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
    return itertools.chain(ahead, table.rows), list(columns) or None


def _text_and_label(
    name: str, columns: list[str] | None, options: DataOptions, needs_labels: bool
) -> tuple[str, str | None]:
    if columns is None:  # no row is good: each will say why, whatever its columns
        return options.text_column or "text", options.label_column
    if not columns:
        raise DataError(_no_rows(name, BadRows()))
    return find_columns(
        columns,
        name,
        text_column=options.text_column,
        label_column=options.label_column,
        needs_label=needs_labels,
    )


def _label_reader(
    table: Table, column: str | None, options: DataOptions, known: Sequence[str] | None
) -> LabelReader:
    numbers = None
    if options.label_names is not None:
        numbers = read_label_names(options.label_names)
    elif column in table.class_names:
        numbers = dict(enumerate(table.class_names[column]))
    if options.label_separator != DataOptions.label_separator and not options.multi_label:
        raise OptionError("label_separator is for texts with several labels; add --multi-label")
    separator = options.label_separator if options.multi_label else None
    return LabelReader(known, numbers, separator=separator)


def _text_of(row: Record | BadRow, column: str) -> str:
    """The text of a row.

    Raises:
        ValueError: it has none that can be used; says why.
    """
    if isinstance(row, BadRow):
        raise ValueError(row.reason)
    text = row.values.get(column)
    if not isinstance(text, str):
        missing = text is None
        raise ValueError(
            f"no {column!r}" if missing else f"{column!r} holds {type(text).__name__}, no text"
        )
    check_text(text)
    return text


def check_text(text: str) -> None:
    """Whether a text can be classified: what a row of a file must have, and any other text.

    Raises:
        ValueError: it cannot; says why.
    """
    if not text.strip():
        raise ValueError("the text is empty")
    if "\0" in text:
        raise ValueError("the text holds a NUL character (is the file UTF-16, or no text?)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half a character (a lone surrogate)") from error
