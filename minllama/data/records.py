"""Tables of numbered records, good and bad, which all file formats are read into."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minllama.errors import DataError
from minllama.text import MAX_SHOWN, listed

TOO_MANY = 100_000  # bad rows, if almost none are good

# One row of a file before numbering: its line, and its cells or the reason why it is bad.
RawRow = tuple[int, dict[str, Any] | str]


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    Attributes:
        index: how many rows, good and bad, come before it.
        place: for messages: `line 3`, or `row 3` of a file without lines.
        values: its cells by column.
    """

    index: int
    place: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and the reason."""

    index: int
    place: str
    reason: str


@dataclass(frozen=True)
class Table:
    """An open source of records.

    Attributes:
        name: of the source, as errors call it.
        columns: their names; None where each record has its own, as in JSON.
        class_names: of columns with ids of named classes: the names in order of the ids.
        rows: may be iterated once.
        no_text: the types of columns that cannot contain text, if the file declares types.
        no_label: the types of columns that cannot contain labels either; they are not read.
        header: what may help where the names of the columns are none; empty where they surely are.
        remedies: what may help with bad rows of any kind; filled as they are read.
    """

    name: str
    columns: list[str] | None
    rows: Iterator[Record | BadRow]
    class_names: dict[str, list[str]] = field(default_factory=dict)
    no_text: dict[str, str] = field(default_factory=dict)
    no_label: dict[str, str] = field(default_factory=dict)
    header: str = ""
    remedies: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = Counter(self.columns)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise DataError(f"{self.name}: has several columns named {listed(twice)}; rename them")


def numbered(rows: Iterable[RawRow], unit: str = "line") -> Iterator[Record | BadRow]:
    """Give each row its index and place."""
    for index, (number, content) in enumerate(rows):
        place = f"{unit} {number}"
        if isinstance(content, str):
            yield BadRow(index, place, content)
        else:
            yield Record(index, place, content)


@dataclass
class BadRows:
    """Counts bad rows and remembers the first ten, so that any number of them fits one message.

    Attributes:
        count: of all.
        first: ten of them.
        remedies: what may help with them, as the table of their source has it.
    """

    count: int = 0
    first: list[BadRow] = field(default_factory=list)
    remedies: Sequence[str] = ()

    def add(self, row: BadRow) -> None:
        self.count += 1
        if len(self.first) < MAX_SHOWN:
            self.first.append(row)

    def check(self, name: str, n_good: int) -> None:
        """Stop reading if nearly all of many rows are bad: a small file may contain billions.

        Raises:
            DataError: says so.
        """
        if self.count >= TOO_MANY and self.count > 99 * n_good:
            raise DataError(
                f"{name}: {self.count:,} of the first {self.count + n_good:,} rows are bad "
                f"({self.summary()}); is it the right file and format?"
            )

    def summary(self) -> str:
        """Places and reasons of the first ten, each reason once, and the number of further ones."""
        places: dict[str, list[str]] = {}
        for row in self.first:
            places.setdefault(row.reason, []).append(row.place)
        shown = [f"{_together(places[reason])}: {reason}" for reason in places]
        more = self.count - len(self.first)
        return "; ".join(shown + ([f"and {more} more"] if more else []))

    def error(self, name: str, *hints: str) -> DataError:
        """The error for these rows of the source `name`; `hints` are further remedies."""
        hint = "".join(f"; {hint}" for hint in hints if hint)
        if self.count == 1:
            row = self.first[0]
            return DataError(
                f"{name}, {row.place}: {row.reason}; fix it, or skip it with --skip-bad-rows{hint}"
            )
        return DataError(
            f"{name}: {self.count} bad rows: {self.summary()}; fix them, or skip them with "
            f"--skip-bad-rows{hint}"
        )


def _together(places: list[str]) -> str:
    """`lines 2, 5 and 9` for line 2, line 5 and line 9."""
    unit, _, _ = places[0].partition(" ")
    # One line may contain several objects of a list.
    *numbers, last = dict.fromkeys(place.removeprefix(f"{unit} ") for place in places)
    return f"{unit}s {', '.join(numbers)} and {last}" if numbers else places[0]
