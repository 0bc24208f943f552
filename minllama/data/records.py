"""What every kind of file is reduced to: a table of numbered records, good and bad.

Knows nothing of formats, nor of which column holds what.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from minllama.errors import DataError

MAX_SHOWN = 10  # bad rows, or names, that an error spells out

# One row of a file before it is numbered: its line, and its cells or what is wrong with it.
RawRow = tuple[int, dict[str, Any] | str]


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    Attributes:
        index: how many rows, good and bad, come before it.
        place: where it stands, as people say it: `line 3`, or `row 3` of a file without lines.
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
        class_names: of columns that hold numbers of named classes: names, in order of the numbers.
        rows: may be iterated once.
    """

    name: str
    columns: list[str] | None
    rows: Iterator[Record | BadRow]
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = Counter(self.columns)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise DataError(f"{self.name}: has several columns called {listed(twice)}; rename them")


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
    """Counts bad rows and remembers the first ten, so that any number of them fits one message."""

    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        self.count += 1
        if len(self.first) < MAX_SHOWN:
            self.first.append(row)

    def summary(self) -> str:
        """Place and reason of the first ten, and how many more there are."""
        shown = [f"{row.place}: {row.reason}" for row in self.first]
        more = self.count - len(shown)
        return "; ".join(shown + ([f"and {more} more"] if more else []))

    def error(self, name: str, hint: str = "") -> DataError:
        """The refusal of the source `name` because of these rows; `hint` is one more remedy."""
        hint = f"; {hint}" if hint else ""
        if self.count == 1:
            row = self.first[0]
            return DataError(
                f"{name}, {row.place}: {row.reason}; mend it, or leave it out with --skip-bad-rows"
                f"{hint}"
            )
        return DataError(
            f"{name}: {self.count} bad rows: {self.summary()}; "
            f"mend them, or leave them out with --skip-bad-rows{hint}"
        )


def shown(value: object) -> str:
    """`value` in a message: quoted, on one line, and short."""
    text = repr(value[:100] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str]) -> str:
    """The first few of `names`, quoted."""
    return first_few(map(shown, names))


def first_few(items: Iterable[str]) -> str:
    """The first few of them, and how many more there are."""
    items = iter(items)
    few = list(itertools.islice(items, MAX_SHOWN))
    more = sum(1 for _ in items)
    return ", ".join(few) + (f" and {more} more" if more else "")
