"""A data set, and what there is to be said about it. `minllama.data.dataset` reads one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal, Self, cast

from minllama.data.rows import CLASS, CLASSES, NUMBER, TEXT, Column, Rows, row_numbers, stored
from minllama.data.texts import checked_texts

Labels = Sequence[int] | Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Notice:
    """Something that the user should know, but that is not an error.

    Attributes:
        kind: its topic, for programs.
        message: one line, for people.
        count: of the rows, texts or classes concerned.
    """

    kind: Literal[
        "skipped",
        "unlabelled",
        "numbers",
        "case",
        "look-alikes",
        "white-space",
        "multi-hot",
        "conflicts",
        "absent",
        "duplicates",
        "one-class",
        "no-labels",
    ]
    message: str
    count: int

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Dataset:
    """Texts and their labels, of which memory holds a few megabytes: see `minllama.data.rows`.

    Attributes:
        texts: N strings, none of them blank.
        labels: N class ids, 0..len(label_names)-1, or N tuples of them; None without labels.
            Numbers for a regression: see `targets`.
        label_names: the names of the classes, in order.
        source: the name of its source.
        multi_label: whether a text has any number of labels, as a tuple, rather than one.
        notices: about skipped rows and the like.
        label_column: the source's label column; None if labels are not in a column.
        part: which of the source's rows these are, if not all.
        has_numbers: labels are numbers, the targets of a regression.

    Raises:
        DataError: a text is not a string.
    """

    texts: Sequence[str]
    labels: Labels | None
    label_names: list[str]
    source: str
    multi_label: bool = False
    notices: tuple[Notice, ...] = ()
    label_column: str | None = field(default=None, compare=False)
    part: str = field(default="", compare=False)
    has_numbers: bool = False

    def __post_init__(self) -> None:
        values: dict[str, Rows[Any]] = {}
        if not isinstance(self.texts, Rows):
            values["texts"] = stored(TEXT, checked_texts(self.texts, f"{self.source}: texts"))
        if self.labels is not None and not isinstance(self.labels, Rows):
            kind: Any = CLASSES if self.multi_label else CLASS
            values["labels"] = stored(NUMBER if self.has_numbers else kind, self.labels)
        for name, rows in values.items():
            object.__setattr__(self, name, rows)  # the data set is frozen from here on

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def text_hashes(self) -> "memoryview[int]":
        """(N,) of 64 bits: equal for equal texts, in every process, and hardly ever for others."""
        hashes = Column("Q")
        for text in self.texts:
            data = text.encode("utf-8", "surrogatepass")
            hashes.extend(blake2b(data, digest_size=8).digest())
        return hashes.mapped()

    @property
    def called(self) -> str:
        """The name of these rows in notices."""
        return f"{self.source} ({self.part})" if self.part else self.source

    @property
    def targets(self) -> Sequence[float]:
        """The labels of a regression."""
        assert self.has_numbers
        assert self.labels is not None
        targets: Any = self.labels
        return targets  # type: ignore[no-any-return]

    def classes_of(self, index: int) -> tuple[int, ...]:
        """The classes of one text, whether it may have several or not."""
        assert self.labels is not None
        assert not self.has_numbers
        label = self.labels[index]
        return label if isinstance(label, tuple) else (label,)

    def class_counts(self) -> list[int]:
        """The number of texts of each class."""
        counts = [0] * len(self.label_names)
        for label in self.labels or ():
            for one in label if isinstance(label, tuple) else (label,):
                counts[one] += 1
        return counts

    def select(self, indices: Iterable[int]) -> Self:
        """The examples at `indices`, in that order, without the notices."""
        texts, labels = cast(Rows[str], self.texts), cast(Rows[Any] | None, self.labels)
        rows = row_numbers(indices, len(self))
        chosen: Any = None if labels is None else labels.at(rows)
        return replace(self, texts=texts.at(rows), labels=chosen, notices=())
