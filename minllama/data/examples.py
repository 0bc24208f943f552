"""Collect rows into a dataset: texts, class ids, and notices for the user.

Skips or reports bad rows. `minllama.data.dataset` calls it with an open table.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from minllama.data.class_names import class_names
from minllama.data.labels import UNLABELLED, LabelReader
from minllama.data.look_alikes import distinguishable, folded, look_alike_message, look_alikes
from minllama.data.multi_hot import column_vector, is_surely_a_vector, vector_labels, vector_of
from minllama.data.numbers import NumberReader
from minllama.data.records import BadRow, BadRows, Record
from minllama.data.rows import (
    CLASS,
    CLASSES,
    NUMBER,
    NUMBERS,
    OBJECT,
    TEXT,
    Column,
    RowsBuilder,
    stored,
)
from minllama.data.types import Dataset, Labels, Notice
from minllama.errors import DataError
from minllama.options import DataOptions
from minllama.text import first_few, printable, shown


class Examples:
    """Collect the examples and bad rows of one source.

    Args:
        text_column: of the text.
        label_columns: of the labels: one column; several of zeros and ones, one per label; or none.
        reader: of label cells: classes, or numbers.
        options: of these `multi_label`, `label_lists` and `skip_bad_rows`.
        needs_labels: whether a row without a label is bad.
        declared: the file declares names for the class ids, so lists are not vectors.
    """

    def __init__(
        self,
        text_column: str,
        label_columns: Sequence[str],
        reader: LabelReader | NumberReader,
        options: DataOptions,
        *,
        needs_labels: bool,
        declared: bool = False,
    ) -> None:
        self._text_column = text_column
        self._label_columns = label_columns
        self._reader = reader
        self._options = options
        self._needs_labels = needs_labels
        self._many = options.has_several_labels
        self.bad_rows = BadRows()
        self._unread = BadRows()  # labels that are not needed, and not labels
        self._unread_rows = Column("q")  # their row indices
        self._texts = RowsBuilder(TEXT)
        # Of each row its labels by their place in `_names`, or a number; empty if it has none.
        self._cells: RowsBuilder[Any] = RowsBuilder(
            NUMBERS if isinstance(reader, NumberReader) else CLASSES
        )
        self._names: dict[str, int] = {}  # of labels, as they were found
        self._n_given = 0  # rows with a label, or with the information that they have none
        self._has_lists: bool | None = None  # whether labels are lists, as the first one is
        # Lists of zeros and ones: known to be vectors, known not to be, or not yet known.
        is_vector = options.label_lists == "multi-hot" or options.label_columns is not None
        self._has_vectors: bool | None = True if is_vector else None
        is_other = options.label_lists is not None or declared or isinstance(reader, NumberReader)
        if not is_vector and is_other:
            self._has_vectors = False
        self._vector_names: Sequence[str] | None = None
        self._n_empty = 0  # empty cells, if rows may have no label
        # Rows that are not interpreted yet: the row, its text and its list.
        self._held = RowsBuilder(OBJECT)
        self._vectors = _Vectors()  # among them

    def __len__(self) -> int:
        return len(self._texts) + len(self._held)

    @property
    def _class_reader(self) -> LabelReader:
        assert isinstance(self._reader, LabelReader)
        return self._reader

    def add(self, row: Record | BadRow) -> None:
        place = BadRow(row.index, row.place, "")
        try:
            text = text_of(row, self._text_column)
            assert isinstance(row, Record)
        except ValueError as error:
            self.bad_rows.add(replace(place, reason=str(error)))
            return
        try:
            value = self._value_of(row)
        except ValueError as error:
            self._refuse_label(place, text, error)
            return
        if self._has_vectors is None and self._may_be_vectors(value):
            self._held.append((place, text, value))
            return
        if len(self._held):
            self._release()
        self._take(place, text, value)

    def _value_of(self, row: Record) -> Any:
        """The label cell of a row, with a list in text parsed."""
        columns = self._label_columns
        if self._options.label_columns is not None:
            return column_vector([row.values.get(name) for name in columns], columns)
        if not columns:
            return None
        return self._reader.unfolded(row.values.get(columns[0]))

    def _may_be_vectors(self, value: Any) -> bool:
        """Track whether this row and all earlier ones may be multi-hot vectors."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return bool(len(self._held))  # an empty cell decides nothing
        vector = vector_of(value)
        known = self._class_reader.known
        if (
            vector is None
            or not self._vectors.add(vector)
            or (known is not None and len(known) != len(vector))
        ):
            self._has_vectors = False
        return self._has_vectors is None

    def _release(self) -> None:
        held, self._held = self._held, RowsBuilder(OBJECT)
        for place, text, value in held.rows():
            self._take(place, text, value)

    def _take(self, place: BadRow, text: str, value: Any) -> None:
        try:
            cells = self._read_label(value)
        except ValueError as error:
            self._refuse_label(place, text, error)
            return
        if cells is None and self._may_be_without(value):
            cells = []
            self._n_empty += 1
        if cells is None and self._needs_labels:
            self.bad_rows.add(replace(place, reason=self._why_none(value)))
            return
        self._texts.append(text)
        self._n_given += cells is not None
        if not isinstance(self._reader, NumberReader):
            names = self._names
            cells = [names.setdefault(cell, len(names)) for cell in cells or ()]
        self._cells.append(cells or ())

    def _may_be_without(self, value: Any) -> bool:
        """Whether an empty label cell means a row without labels.

        Missing values may be empty cells, null or NaN.
        """
        is_list_of_labels = self._many and self._options.label_columns is None
        return is_list_of_labels and not self._reader.is_placeholder(value)

    def _refuse_label(self, place: BadRow, text: str, error: ValueError) -> None:
        row = replace(place, reason=str(error))
        if self._needs_labels:
            self.bad_rows.add(row)
            return
        self._unread.add(row)
        self._unread_rows.append(len(self._texts))
        self._texts.append(text)
        self._cells.append(())

    def _read_label(self, value: Any) -> list[Any] | None:
        if self._has_vectors:
            if value is None or (isinstance(value, str) and not value.strip()):
                return None
            if self._vector_names is None:
                self._name_positions(len(value) if isinstance(value, list) else 0)
            assert self._vector_names is not None
            return vector_labels(value, self._vector_names)
        cells: list[Any] | None = self._reader.read(value)
        if cells is not None:
            self._check_kind(value)
        return cells

    def _name_positions(self, n: int) -> None:
        """Name the elements of vectors by the classes' names or ids."""
        if self._options.label_columns is not None:
            self._vector_names = self._label_columns
            return
        reader = self._class_reader
        if reader.known is None and n > 1:
            reader.set_classes([str(i) for i in range(n)])
        if reader.known is None:
            raise ValueError("is not a multi-hot vector of zeros and ones, such as [1, 0, 1]")
        names = reader.names_by_position()
        self._vector_names = reader.known if names is None else names

    def _why_none(self, value: Any) -> str:
        if self._reader.is_placeholder(value):
            return (
                f"label {UNLABELLED} means no label (if it is a class, name it in a file for "
                "--label-names)"
            )
        return "no label"

    def _check_kind(self, value: Any) -> None:
        """Refuse a list after rows with single labels: all of them would become lists."""
        if self._has_lists is None:
            self._has_lists = isinstance(value, list)
        if isinstance(value, list) and not self._has_lists and not self._many:
            raise ValueError(
                "a list of labels, but earlier rows have one label each; use --multi-label to "
                "allow several"
            )

    def dataset(self, name: str, remedies: Sequence[str] = ()) -> Dataset:
        """The collected dataset.

        Args:
            name: of the source.
            remedies: advice for its bad rows.

        Raises:
            DataError: there are bad rows that may not be skipped, or no good ones; or lists are
                ambiguous.
        """
        list_notices = self._decide(name)
        bad_rows, notices = self.bad_rows, []
        skips = self._options.skip_bad_rows
        if bad_rows.count and not skips:
            raise bad_rows.error(name, *remedies, self._reader.hint)
        texts, cells = self._texts.rows(), self._cells.rows()
        if not texts:
            raise DataError(no_rows(name, bad_rows, remedies))
        if bad_rows.count:
            notices.append(_skipped(name, bad_rows, len(texts), remedies))
        if self._n_empty == len(texts) and not self._needs_labels:
            # A file with hidden labels.
            self._n_given = self._n_empty = 0
        if self._unread.count and self._n_given and skips:
            notices.append(self._leave_out_unread(name))
            unread, n = self._unread_rows.mapped(), len(texts)
            texts = texts.select(_others(unread, n))
            cells = cells.select(_others(unread, n))
        if self._unread.count or 0 < self._n_given < len(texts):
            notices.append(self._unlabeled_notice(name, len(texts)))
        if skips and (hint := self._reader.hint) and (bad_rows.count or self._unread.count):
            notices.append(Notice("look-alikes", f"{name}: {hint}", 1))
        if self._n_empty:
            message = (
                f"{name}: {self._n_empty:,} of {len(texts):,} rows have an empty or null "
                "label cell, and are used as rows without labels"
            )
            notices.append(Notice("no-labels", message, self._n_empty))
        column, are_known = self._label_column, self._n_given == len(texts)
        if isinstance(self._reader, NumberReader):
            targets: Any = stored(NUMBER, (number for (number,) in cells)) if are_known else None
            return Dataset(
                *(texts, targets, [], name),
                notices=tuple(notices),
                label_column=column,
                has_numbers=True,
            )
        if positions := self._reader.by_position:
            notices.append(_numbers_as_names(name, positions))
        multi_label = self._many or bool(self._has_lists) or bool(self._has_vectors)
        are_learned = self._reader.known is None or self._options.label_names is not None
        names, class_of = self._classes()
        labels = _numbered(cells, class_of, multi_label) if are_known else None
        found = Dataset(texts, labels, names, name, multi_label, label_column=column)
        notices += list_notices + self._white_space(name, cells)
        if are_learned:
            notices += look_alike_notices(found)
        return replace(found, notices=tuple(notices))

    @property
    def _label_column(self) -> str | None:
        """The one column of the labels; None if they are in several, or in none."""
        is_one = len(self._label_columns) == 1 and self._options.label_columns is None
        return self._label_columns[0] if is_one else None

    def _decide(self, name: str) -> list[Notice]:
        """Decide whether lists of zeros and ones are vectors, if no other row has decided it.

        Raises:
            DataError: they may be that or labels.
        """
        vectors, n_held = self._vectors, len(self._held)
        notices: list[Notice] = []
        if n_held and not vectors.are_sure:
            place, _, first = self._held.rows()[0]
            raise DataError(
                f"{name}: lists of 0 and 1 are ambiguous: {shown(first)} in {place.place} has both "
                "labels 0 and 1, or is a multi-hot vector with only label "
                f"{vectors.first.index(1)}; give --label-lists labels, or --label-lists multi-hot "
                "(with --label-names FILE for the names)"
            )
        if n_held:
            self._has_vectors = True
            self._release()
        if n_held and self._vector_names is not None:
            places = first_few(
                f"{i} = {printable(label)}" for i, label in enumerate(self._vector_names)
            )
            message = (
                f"{name}: lists are read as multi-hot vectors of {len(vectors.first)} zeros and "
                f"ones, one per label: {places}; --label-names FILE sets other names"
            )
            notices.append(Notice("multi-hot", message, vectors.count))
        return notices

    def _white_space(self, name: str, cells: Iterable[Iterable[int]]) -> list[Notice]:
        """Labels that occur both with and without surrounding white space."""
        padded: dict[str, dict[str, int]] = {}
        for (text, label), n in self._class_reader.padded.items():
            if n:
                padded.setdefault(label, {})[text] = n
        if not padded:
            return []
        notices = []
        counts = Counter(place for places in cells for place in places)
        for label, of_text in padded.items():
            plain = counts[self._names.get(label, -1)] - sum(of_text.values())
            if plain <= 0 and len(of_text) < 2:
                continue
            spellings = {**({label: plain} if plain > 0 else {}), **of_text}
            shown_names = distinguishable(list(spellings))
            described = [
                f"{text} ({n:,} row{'s' * (n != 1)})"
                for text, n in zip(shown_names, spellings.values(), strict=True)
            ]
            message = (
                f"{name}: {first_few(described)} are the same label: white space around labels is "
                "ignored"
            )
            notices.append(Notice("white-space", message, sum(of_text.values())))
        return notices

    def _leave_out_unread(self, name: str) -> Notice:
        """Skip rows with unknown labels; rows without one stay, to be predicted."""
        bad, self._unread = self._unread, BadRows()
        left_out = f"{bad.count} of {len(self._texts)} ({bad.summary()})"
        message = f"{name}: rows with unknown labels skipped: {left_out}"
        return Notice("skipped", message, bad.count)

    def _why_unread(self) -> str:
        if not self._unread.count:
            return ""
        return f" ({'; '.join(filter(None, (self._unread.summary(), self._reader.hint)))})"

    def _unlabeled_notice(self, name: str, n_rows: int) -> Notice:
        n_given = self._n_given
        known = f"only {n_given}" if n_given else "none"
        remedy = "; --skip-bad-rows skips them" if n_given and self._unread.count else ""
        message = (
            f"{name}: {known} of {n_rows} rows have a known label{self._why_unread()}; "
            f"these labels are ignored{remedy}"
        )
        return Notice("unlabelled", message, n_rows - n_given)

    def _classes(self) -> tuple[list[str], list[int]]:
        """The names of the classes, and the class of each label in `_names`."""
        reader = self._class_reader
        if self._options.label_columns is not None and reader.known is None:
            reader.set_classes(self._label_columns)
        if reader.known is not None:
            names, index_of = reader.known, reader.index_of
        else:
            names, index_of = class_names(self._names)
        return names, [index_of[name] for name in self._names]


class _Vectors:
    """What is known of multi-hot vectors of one length.

    Attributes:
        first: of them.
        count: of all.
        are_sure: they cannot be lists of labels.
    """

    def __init__(self) -> None:
        self.first: tuple[int, ...] = ()
        self.count = 0
        self.are_sure = False

    def add(self, vector: tuple[int, ...]) -> bool:
        """Count one; whether it is as long as the first."""
        self.first = self.first or vector
        self.count += 1
        self.are_sure = self.are_sure or is_surely_a_vector([vector])
        return len(vector) == len(self.first)


def _others(rows: "memoryview[int]", n: int) -> Iterator[int]:
    """The rows from 0 to n that are not among some in ascending order."""
    left_out = iter(rows)
    following = next(left_out, None)
    for row in range(n):
        if row == following:
            following = next(left_out, None)
        else:
            yield row


def _numbered(cells: Iterable[Sequence[int]], class_of: list[int], multi_label: bool) -> Labels:
    """The classes of each row, by those of the labels."""
    if multi_label:
        rows = (tuple(sorted({class_of[place] for place in places})) for places in cells)
        return stored(CLASSES, rows)
    return stored(CLASS, (class_of[place] for (place,) in cells))


def _skipped(name: str, bad_rows: BadRows, n_good: int, remedies: Sequence[str]) -> Notice:
    why = "; ".join([bad_rows.summary(), *remedies])
    total = bad_rows.count + n_good
    message = f"{name}: bad rows skipped: {bad_rows.count} of {total} ({why})"
    return Notice("skipped", message, bad_rows.count)


def _numbers_as_names(name: str, positions: Mapping[int, str]) -> Notice:
    pairs = (f"{number} = {printable(positions[number])}" for number in sorted(positions))
    message = (
        f"{name}: numbers are read as classes in numeric order: {first_few(pairs)}; "
        "--label-names FILE sets names"
    )
    return Notice("numbers", message, len(positions))


def look_alike_notices(dataset: Dataset) -> list[Notice]:
    """Notices of look-alike class names, with their row counts."""
    counts = dict(zip(dataset.label_names, dataset.class_counts(), strict=True))
    notices = []
    if blank := [name for name in dataset.label_names if not folded(name)]:
        shown_names = ", ".join(distinguishable([name])[0] for name in blank)
        message = (
            f"{dataset.called}: the label {shown_names} has no visible character; is it intended?"
        )
        notices.append(Notice("look-alikes", message, len(blank)))
    for names in look_alikes(dataset.label_names):
        is_case = len({name.casefold() for name in names}) == 1
        message = f"{dataset.called}: {look_alike_message(names, counts)}"
        notices.append(Notice("case" if is_case else "look-alikes", message, len(names)))
    return notices


def no_rows(name: str, bad_rows: BadRows, remedies: Sequence[str] = ()) -> str:
    """A message about why a source has no examples."""
    if not bad_rows.count:
        return f"{name}: no rows; give a file with one example per line"
    details = "; ".join([bad_rows.summary(), *remedies])
    return f"{name}: all {bad_rows.count} rows are bad: {details}"


def text_of(row: Record | BadRow, column: str) -> str:
    """The text of a row.

    Raises:
        ValueError: it has no usable text; the message says why.
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
    """Check that a text can be classified, from a file or elsewhere.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if not text.strip():
        raise ValueError("the text is empty")
    if "\0" in text:
        raise ValueError(
            "the text contains a NUL character (is the file UTF-16, or not a text file?)"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text contains half of a character (a lone surrogate)") from error
