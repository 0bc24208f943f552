"""Convert cells of a label column to class ids 0..n-1.

A cell contains a class's name or number; numbers get their names from a file, from the dataset
itself, or from a classifier's classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from minllama.data.class_names import class_text, integer_of, is_number_like, is_truth, number
from minllama.data.label_lists import read_list, split_names
from minllama.data.look_alikes import folded, look_alike_message
from minllama.data.multi_hot import vector_of
from minllama.text import first_few, listed, shown

MOST_REFUSED = 1000  # different labels that are remembered
UNLABELLED = -1  # means no label in data sets without gold labels


class WrittenVector(list[Any]):
    """A list of zeros and ones in a single-label row: a multi-hot vector, or refused.

    Other rows decide whether it is one.
    """


class LabelReader:
    """Reads the label cells of one source.

    Args:
        known: names of all classes, in order; None to learn them from the cells (`class_names`).
        number_names: the name of each number; None for positions in `known`.
        codes: the name of a text such as `01`, which is not a number.
        separator: between the labels of one cell; None for one label per row.

    Attributes:
        known: as given, or the names of `number_names`.
        index_of: the class of each of them.
        by_position: numbers that were read as positions in `known`, with the names.
        padded: how often each name had surrounding white space, as (text, name).
    """

    def __init__(
        self,
        known: Sequence[str] | None = None,
        number_names: Mapping[int, str] | None = None,
        *,
        codes: Mapping[str, str] | None = None,
        separator: str | None = None,
    ) -> None:
        self._names_are_given = number_names is not None
        self.by_position: dict[int, str] = {}
        self.padded: Counter[tuple[str, str]] = Counter()
        if known is None and number_names is not None:
            known = [number_names[number] for number in sorted(number_names)]
        elif known is not None and number_names is None and not any(map(is_number_like, known)):
            # Classes named 1 to 5, or 007, are referred to by name, never by position.
            number_names = dict(enumerate(known))
        self.set_classes(known)
        self._number_names, self._codes = number_names or {}, codes or {}
        self._separator = separator
        self._refused: Counter[str] = Counter()
        self._hint = ""

    def set_classes(self, names: Sequence[str] | None) -> None:
        """Set the names of all classes."""
        self.known = None if names is None else list(names)
        self.index_of: dict[str, int] = {name: i for i, name in enumerate(names or ())}
        self._by_value: dict[Decimal, str | None] = {}
        self._truths: dict[str, str] = {}
        for name in names or ():
            if (value := number(name)) is not None:
                self._by_value[value] = None if value in self._by_value else name
            if is_truth(name):
                self._truths[name.casefold()] = name

    def names_by_position(self) -> list[str] | None:
        """The names of the numbers 0 to n-1 in order; None if others or none are named."""
        if not self._number_names or sorted(self._number_names) != list(
            range(len(self._number_names))
        ):
            return None
        return [self._number_names[i] for i in range(len(self._number_names))]

    @property
    def hint(self) -> str:
        """More advice for refused labels; may be empty."""
        by_folded: dict[str, list[str]] = {}
        for name in self.known or ():
            by_folded.setdefault(folded(name), []).append(name)
        pairs = (
            look_alike_message([text, *by_folded[folded(text)]], self._refused)
            for text in self._refused
            if folded(text) in by_folded
        )
        return "; ".join(filter(None, (self._hint, first_few(pairs))))

    def unfolded(self, value: Any) -> Any:
        """A cell, with a list in text parsed.

        Raises:
            ValueError: it is not a valid list, or has several labels where rows have one.
        """
        if not isinstance(value, str) or value.strip() in self.index_of:
            return value
        items = read_list(value, bare_words=self._separator is not None)
        if self._separator is not None:
            if items is None and len(parts := self._split(value)) > 1 and {*parts} <= {"0", "1"}:
                return [int(part) for part in parts]  # which may be a vector
            return value if items is None else items
        if items is None:
            return value
        if not items:
            raise ValueError(
                f"an empty list of labels, {value.strip()}; use --multi-label to allow it"
            )
        if vector_of(items) is not None:
            return WrittenVector(items)
        if len(items) > 1:
            raise _several(items, value)
        return items[0]

    def read(self, value: Any) -> list[str] | None:
        """The labels of a cell, as names if known; None without a label.

        Raises:
            ValueError: the cell is not a label, or not a known class; the message says why.
        """
        if isinstance(value, WrittenVector):
            raise _several(value, value)
        cells: list[Any] = value if isinstance(value, list) else [value]
        if self._separator is not None and isinstance(value, str):
            if not value.strip():
                return None
            cells = [part for part in self._split(value) if part]
            texts: list[str | None] = list(cells)
        else:
            texts = [class_text(cell) for cell in cells]
            if None in texts:
                if isinstance(value, list):
                    raise ValueError(f"{shown(value)} contains an empty label")
                return None
        if len(texts) == 1 and self._is_unlabelled(texts[0]):
            return None
        pairs = list(zip((text for text in texts if text is not None), cells, strict=True))
        labels = [self._named(text, cell) for text, cell in pairs]
        # A number and its text are one label; two known labels must not be the same.
        different = set(labels) if self.known is not None else {(type(c), t) for t, c in pairs}
        if len(different) < len(labels):
            raise ValueError(
                f"{shown(value)} contains a label twice; give each name or number once (or, for "
                "multi-hot vectors of equal length, --label-lists multi-hot)"
                if all(text in ("0", "1", "0.0", "1.0") for text in texts)
                else f"{shown(value)} contains a label twice; give each name or number once"
            )
        if isinstance(value, str) and self._separator is None and value != labels[0]:
            self.padded[value, labels[0]] += value.strip() != value
        return labels

    def is_placeholder(self, value: Any) -> bool:
        """Whether a cell is the number that means no label."""
        cells = value if isinstance(value, list) else [value]
        return len(cells) == 1 and self._is_unlabelled(class_text(cells[0]))

    def _split(self, value: str) -> list[str]:
        assert self._separator is not None
        try:
            return split_names(value, self._separator)
        except ValueError:  # a lone quote is text
            return [part.strip() for part in value.split(self._separator)]

    def _is_unlabelled(self, text: str | None) -> bool:
        return (
            text is not None
            and integer_of(text) == UNLABELLED
            and UNLABELLED not in self._number_names
            and str(UNLABELLED) not in self.index_of
        )

    def _named(self, text: str, cell: Any) -> str:
        if self.known is None:
            return text
        name, integer = text, integer_of(text)
        if integer is not None and integer in self._number_names:
            # Numbers take precedence: classes named 1 to 5 may be numbered 0 to 4.
            name = self._number_names[integer]
            if not self._names_are_given:
                self.by_position[integer] = name
        elif text in self._codes:
            name = self._codes[text]
        elif text not in self.index_of:
            name = self._same(text, cell) or text
        if name not in self.index_of:
            if integer is not None and not self._names_are_given and not self._has_numbers():
                self._hint = "--label-names FILE sets the names of the numbers"
            if len(self._refused) < MOST_REFUSED or name in self._refused:
                self._refused[name] += 1
            read_as = "" if name == text else f" ({shown(name)})"
            raise ValueError(f"label {shown(cell)}{read_as} is not one of {listed(self.known)}")
        return name

    def _has_numbers(self) -> bool:
        return any(map(is_number_like, self.known or ()))

    def _same(self, text: str, cell: Any) -> str | None:
        """The one known name that is another spelling of the same number or truth value.

        A number in JSON or Parquet has a value and no spelling; in a text, only `1.0` is `1`.
        """
        if is_truth(text):
            return self._truths.get(text.casefold())
        if isinstance(cell, str) and integer_of(text) is None:
            return None
        value = number(text)
        return None if value is None else self._by_value.get(value)


def _several(items: Sequence[Any], value: Any) -> ValueError:
    return ValueError(
        f"a list of {len(items)} labels, {shown(value)}; use --multi-label to allow several"
    )
