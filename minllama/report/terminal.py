"""A summary of an evaluation that fits a terminal of 80 columns, and plain text elsewhere.

Knows nothing of pages or files.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from minllama.evaluation import ClassMetrics, Evaluation
from minllama.report.comparison import METRICS, compared, interval, systems, verdict
from minllama.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

MAX_CLASSES = 24  # rows; of more classes, those with the lowest F1


def print_summary(
    name: str,
    evaluation: Evaluation,
    others: Mapping[str, Evaluation] | None = None,
    *,
    console: "Console | None" = None,
) -> None:
    """Print the metrics beside those of other systems, and how each class fared.

    Args:
        name: of the split.
        evaluation: of the classifier.
        others: of other systems on the same rows, by name.
        console: where to print; standard output without it.
    """
    from rich import box
    from rich.console import Console

    console = console or Console(highlight=False)
    others = others or {}
    console.print(_text(f"{name}: {verdict(evaluation, others)}"))
    for table in (_systems(evaluation, others), _classes(evaluation)):
        if console.is_terminal:
            table.box = box.SIMPLE_HEAD  # has an empty line above and below
        else:
            console.print()
        console.print(table)
    hidden = len(evaluation.per_class) - MAX_CLASSES
    if hidden > 0:
        console.print(_text(f"and {hidden} more, none with a lower F1"), style="dim")


def _systems(evaluation: Evaluation, others: Mapping[str, Evaluation]) -> "Table":
    names = compared(evaluation)
    table = _table()
    table.add_column("")  # may be cut, as numbers may not
    for name in names:
        table.add_column(METRICS[name].title, justify="right", no_wrap=True)
    for system in systems(evaluation, others):
        values = [_text(value.text) for value in system.values]
        table.add_row(_text(system.name), *values, style="bold" if system.own else "")
        if system.own and evaluation.intervals:
            ends = [interval(evaluation, name) or ("", "") for name in names]
            table.add_row(_text("  95% interval from"), *(low for low, _ in ends), style="dim")
            table.add_row(_text("  to"), *(high for _, high in ends), style="dim")
    return table


def _classes(evaluation: Evaluation) -> "Table":
    table = _table()
    table.add_column("label" if evaluation.multi_label else "class")
    for title in ("F1", "precision", "recall", "gold", "predicted"):
        table.add_column(title, justify="right", no_wrap=True)
    rows = list(evaluation.per_class)
    if len(rows) > MAX_CLASSES:
        rows = sorted(rows, key=_f1_or_last)[:MAX_CLASSES]
    for row in rows:
        scores = ["-" if v is None else f"{v:.3f}" for v in (row.f1, row.precision, row.recall)]
        table.add_row(_text(row.name), *scores, f"{row.support:,}", f"{row.predicted:,}")
    return table


def _f1_or_last(metrics: ClassMetrics) -> float:
    return 2.0 if metrics.f1 is None else metrics.f1


def _table() -> "Table":
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="dim")


def _text(words: str) -> "Text":
    """A name from a file: neither rich's markup nor what would steer the terminal."""
    from rich.text import Text

    return Text(printable(words), no_wrap=True, overflow="ellipsis")
