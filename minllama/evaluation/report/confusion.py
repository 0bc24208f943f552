"""Confusion matrix as table cells, and its largest off-diagonal entries."""

from dataclasses import dataclass

from minllama.evaluation.metrics import Evaluation

MAX_CLASSES_WITH_COUNTS = 25  # classes; above, a cell has only its color
MAX_WITH_CELLS = 100  # classes; above, only the pairs are shown
MAX_PAIRS = 12
MIN_PAIRS_CLASSES = 7  # with fewer classes the matrix suffices


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix."""

    count: int
    share: float  # of the rows with that gold class, 0 to 1
    right: bool  # on the diagonal
    title: str  # all of it as text


@dataclass(frozen=True)
class Pair:
    """A class that is confused with another."""

    gold: str
    predicted: str
    count: int
    share: float  # of the rows with that gold class, 0 to 1


def matrix(evaluation: Evaluation) -> list[list[Cell]] | None:
    """Cells by gold and predicted class; `None` if there are too many."""
    names, table = evaluation.label_names, evaluation.confusion
    if evaluation.multi_label or len(names) > MAX_WITH_CELLS:
        return None
    cells = []
    for i, row in enumerate(table.tolist()):
        total = sum(row)
        cells.append(
            [
                Cell(
                    count=count,
                    share=count / max(total, 1),
                    right=i == j,
                    title=f"{names[i]} → {names[j]}: {count:,} of {total:,}",
                )
                for j, count in enumerate(row)
            ]
        )
    return cells


def pairs(evaluation: Evaluation) -> list[Pair]:
    """The most frequent confusions, most frequent first; empty for few classes."""
    names, table = evaluation.label_names, evaluation.confusion
    if evaluation.multi_label or len(names) < MIN_PAIRS_CLASSES:
        return []
    totals = table.sum(1)
    found = [
        Pair(names[i], names[j], count, count / int(totals[i]))
        for i, row in enumerate(table.tolist())
        for j, count in enumerate(row)
        if i != j and count
    ]
    # Sorting is stable: equal counts keep the order of the classes.
    return sorted(found, key=lambda pair: -pair.count)[:MAX_PAIRS]
