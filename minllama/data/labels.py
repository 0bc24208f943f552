"""Cells of a label column -> classes, numbered 0..n-1.

A cell holds a class's name or its number; numbers get names from a file, from the data set itself,
or from the classes of a classifier. Knows nothing of files of rows.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minllama.data.records import listed, shown
from minllama.errors import DataError

MAX_NAMES_BYTES = 2**24
UNLABELLED = -1  # the number that stands for no label in data sets without gold labels

Cell = str | int  # a label as it is written


class LabelReader:
    """Reads the label cells of one source.

    Args:
        known: names of all classes, in order; None to learn them from the cells (`class_names`).
        numbers: which name a number stands for; None for positions in `known`.
        separator: between the labels of one cell; None where a row has one label.

    Attributes:
        known: as given, or the names of `numbers`.
        index_of: the class of each of them.
        hint: what else may help with labels that were refused; empty where nothing does.
        by_position: numbers that were taken for names by their places among `known`, and the names.
    """

    def __init__(
        self,
        known: Sequence[str] | None = None,
        numbers: dict[int, str] | None = None,
        *,
        separator: str | None = None,
    ) -> None:
        self._names_are_given = numbers is not None
        self.by_position: dict[int, str] = {}
        if known is None and numbers is not None:
            known = [numbers[number] for number in sorted(numbers)]
        elif known is not None and numbers is None and not any(map(_is_integer, known)):
            # Classes that are called 1 to 5 are meant by these names, never by position.
            numbers = dict(enumerate(known))
        self.known = None if known is None else list(known)
        self.index_of: dict[Cell, int] = {name: i for i, name in enumerate(known or ())}
        self._numbers = numbers or {}
        self._separator = separator
        self.hint = ""

    def read(self, value: Any) -> list[Cell] | None:
        """The labels that a cell holds, names wherever they are known; None for no label at all.

        Raises:
            ValueError: the cell is no label, or not one of the known classes; says why.
        """
        if isinstance(value, list):
            cells = [_cell(element) for element in value]
            if None in cells:
                raise ValueError(f"{shown(value)} holds an empty label")
        elif self._separator is not None and isinstance(value, str):
            parts = (part.strip() for part in value.split(self._separator))
            cells = [part for part in parts if part]
        else:
            cells = [_cell(value)]
            if cells[0] is None:
                return None
        if len(cells) == 1 and self._is_unlabelled(cells[0]):
            return None
        labels = [self._named(cell) for cell in cells if cell is not None]
        if len(set(labels)) < len(labels):
            raise ValueError(f"{shown(value)} holds a label twice; give each name or number once")
        return labels

    def is_placeholder(self, value: Any) -> bool:
        """Whether a cell is the number that stands for no label."""
        cells = value if isinstance(value, list) else [value]
        return len(cells) == 1 and self._is_unlabelled(_cell(cells[0]))

    def _is_unlabelled(self, cell: Cell | None) -> bool:
        return (
            cell is not None
            and _is_integer(cell)
            and _integer(cell) == UNLABELLED
            and UNLABELLED not in self._numbers
            and str(UNLABELLED) not in self.index_of
        )

    def _named(self, cell: Cell) -> Cell:
        if self.known is None:
            return cell
        name = str(cell)
        if _is_integer(cell):
            # A number first: classes that are called 1 to 5 may be numbered 0 to 4.
            number = _integer(cell)
            same = name if name in self.index_of else str(number)
            name = self._numbers.get(number, same)
            if number in self._numbers and not self._names_are_given:
                self.by_position[number] = name
        if name not in self.index_of:
            no_number_is_a_name = not any(map(_is_integer, self.known))
            if _is_integer(cell) and no_number_is_a_name and not self._names_are_given:
                self.hint = "--label-names FILE says which names the numbers have"
            meant = "" if name == str(cell) else f" ({shown(name)})"
            raise ValueError(f"label {shown(cell)}{meant} is not one of {listed(self.known)}")
        return name


def class_names(cells: Iterable[Cell]) -> tuple[list[str], dict[Cell, int]]:
    """The classes that `cells` have, and the class of each.

    Integers, written as numbers or as text, are sorted by value; everything else by name.
    """
    found = set(cells)
    if all(map(_is_integer, found)):
        numbers = sorted({_integer(cell) for cell in found})
        position = {number: index for index, number in enumerate(numbers)}
        return [str(number) for number in numbers], {c: position[_integer(c)] for c in found}
    names = sorted({str(cell) for cell in found})
    by_name = {name: index for index, name in enumerate(names)}
    return names, {cell: by_name[str(cell)] for cell in found}


def _cell(value: Any) -> Cell | None:
    """A scalar as a label; None for an empty one."""
    match value:
        case None | "":
            return None
        case str():
            return value.strip() or None
        case bool():
            return str(value).lower()
        case int():
            return value
        case float() if math.isnan(value):  # how tables of numbers mark what is missing
            return None
        case float() if value.is_integer():
            return int(value)
    raise ValueError(f"label {shown(value)} is neither a name nor a whole number")


def _is_integer(cell: Cell) -> bool:
    # Whole numbers become 1.0 in a CSV file when some of their column are missing.
    return isinstance(cell, int) or re.fullmatch(r"[+-]?[0-9]{1,18}(\.0+)?", cell) is not None


def _integer(cell: Cell) -> int:
    return cell if isinstance(cell, int) else int(cell.partition(".")[0])


def read_label_names(path: str | os.PathLike[str]) -> dict[int, str]:
    """The file of `--label-names`: the name of each number, in the order of the numbers.

    It holds a list of names in order, or an object {name: number} or {number: name}.

    Raises:
        DataError: it cannot be read, or is not of that form.
    """
    name = str(path) if str(path).isprintable() else shown(str(path))
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_NAMES_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:  # no such file, ~nobody, a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{name}: {reason}; name a file of label names") from error
    if len(data) > MAX_NAMES_BYTES:
        raise DataError(f"{name}: too large for a file of label names")
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise DataError(f"{name}: not JSON ({error})") from error
    except RecursionError as error:
        raise DataError(f"{name}: JSON that is nested too deeply") from error
    return _checked_names(content, name)


def _checked_names(content: Any, where: str) -> dict[int, str]:
    form = 'a list such as ["bad", "good"], or an object such as {"bad": 0, "good": 1}'
    match content:
        case list():
            pairs = list(enumerate(content))
        case dict() if all(type(number) is int for number in content.values()):
            pairs = [(number, name) for name, number in content.items()]
        case dict() if all(_is_integer(number) for number in content):
            pairs = [(_integer(number), name) for number, name in content.items()]
        case _:
            raise DataError(f"{where}: does not name classes; write {form}")
    if wrong := [name for _, name in pairs if not isinstance(name, str) or not name.strip()]:
        raise DataError(f"{where}: {shown(wrong[0])} is not a name; write {form}")
    numbers = {number: name.strip() for number, name in pairs}
    if not numbers:
        raise DataError(f"{where}: names no class; write {form}")
    if len(numbers) < len(pairs) or len(set(numbers.values())) < len(pairs):
        raise DataError(f"{where}: has a name or a number twice")
    for number, name in numbers.items():
        if _is_integer(name) and numbers.get(_integer(name), name) != name:
            raise DataError(
                f"{where}: number {number} is called {name!r}, which is the number of another "
                "class; call them otherwise"
            )
    return dict(sorted(numbers.items()))
