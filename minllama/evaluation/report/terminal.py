"""Print a summary of an evaluation: 80 columns in a terminal, plain text elsewhere."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minllama.evaluation.metrics import ClassMetrics, Evaluation
from minllama.evaluation.paired import Paired
from minllama.evaluation.regression import RegressionEvaluation
from minllama.evaluation.report.comparison import (
    METRICS,
    MISSING,
    THIS_SYSTEM,
    compared,
    compared_with,
    interval,
    p_value,
    ranking,
    rows,
    systems,
    undefined,
    verdict,
)
from minllama.evaluation.report.values import print_values
from minllama.evaluation.thresholds import DEFAULT
from minllama.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

MAX_CLASSES = 24  # rows; of more classes, those with the lowest F1


def print_summary(
    name: str,
    evaluation: Evaluation | RegressionEvaluation,
    others: Mapping[str, Any] | None = None,
    *,
    headline: str = "accuracy",
    console: "Console | None" = None,
) -> None:
    """Print the metrics, those of other systems, and the metrics of each class.

    Args:
        name: of the split.
        evaluation: of the classifier.
        others: of other systems on the same rows, by name.
        headline: the metric of the first sentence.
        console: for the output; None for standard output.
    """
    from rich.console import Console

    console = console or Console(highlight=False)
    others = others or {}
    if isinstance(evaluation, RegressionEvaluation):
        print_values(name, evaluation, others, console)
        return
    console.print(_words(f"{name}: {verdict(evaluation, others, headline)}"))
    _print_table(console, _systems(evaluation, others))
    if ranking(evaluation):
        _print_table(console, _rankings(evaluation, others))
    if message := undefined(evaluation):
        console.print(_words(message), style="dim")
    _print_table(console, _classes(evaluation))
    hidden = len(evaluation.per_class) - MAX_CLASSES
    if hidden > 0:
        console.print(_text(f"and {hidden} more, none with a lower F1"), style="dim")


def print_paired(
    names: tuple[str, str],
    first: Evaluation,
    second: Evaluation,
    paired: Paired,
    *,
    headline: str = "accuracy",
    console: "Console | None" = None,
) -> None:
    """Print a comparison of two systems on the same rows.

    Args:
        names: of the two.
        first, second: their evaluations.
        paired: their comparison.
        headline: the metric that the sentence is about.
        console: for the output; None for standard output.
    """
    from rich.console import Console

    console = console or Console(highlight=False)
    table = _table()
    table.add_column("row by row")
    for title in ("this", "other", "difference"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("paired 95% interval", justify="right", no_wrap=True)
    for row in rows(first, second, paired):
        low, high = row.interval
        table.add_row(row.title, row.first, row.second, row.difference, f"{low} to {high}")
    console.print()
    console.print(_text(f"this: {names[0]}"))
    console.print(_text(f"other: {names[1]}"))
    _print_table(console, table)
    counts = (
        f"Of {paired.count:,} texts {paired.only_first:,} are correct only here and "
        f"{paired.only_second:,} only with the other"
    )
    if headline != "accuracy":  # reported in a sentence instead
        counts += f" (McNemar's exact {p_value(paired.p_value)})"
    console.print()
    console.print(_words(f"{counts}."))
    console.print(_words(compared_with(paired, "the other", headline, among=1)))


def _print_table(console: "Console", table: "Table") -> None:
    from rich import box

    if console.is_terminal:
        table.box = box.SIMPLE_HEAD  # has an empty line above and below
    else:
        console.print()
    console.print(table)


def _rankings(evaluation: Evaluation, others: Mapping[str, Evaluation]) -> "Table":
    names = ranking(evaluation)
    table = _table()
    positive = evaluation.positive
    of = "mean over labels" if evaluation.multi_label else "one-vs-rest, macro"
    table.add_column(_text(of if positive is None else f"positive: {positive}"))
    for name in names:
        table.add_column(METRICS[name].title, justify="right", no_wrap=True)
        table.add_column("95% interval", justify="right", no_wrap=True)
    all_of_them = {THIS_SYSTEM: evaluation, **others}
    for system in systems(evaluation, others, names):
        cells: list[Text | str] = []
        for name, value in zip(names, system.values, strict=True):
            ends = interval(all_of_them[system.name], name)
            cells += [
                _text(value.text.replace(MISSING, "-")),
                "" if ends is None else f"{ends[0]} to {ends[1]}",
            ]
        table.add_row(_text(system.name), *cells, style="bold" if system.own else "")
    return table


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
    has_ranking = bool(ranking(evaluation))
    has_threshold = any(row.threshold not in (None, DEFAULT) for row in evaluation.per_class)
    titles = ["from"] * has_threshold + ["AUC", "AP"] * has_ranking
    for title in (*titles, "F1", "precision", "recall", "gold", "predicted"):
        table.add_column(title, justify="right", no_wrap=True)
    shown = list(evaluation.per_class)
    if len(shown) > MAX_CLASSES:
        shown = sorted(shown, key=_f1_or_last)[:MAX_CLASSES]
    for row in shown:
        cells = [_score(row.threshold)] * has_threshold
        cells += [_score(row.roc_auc), _score(row.average_precision)] * has_ranking
        cells += [_score(row.f1), _score(row.precision), _score(row.recall)]
        table.add_row(_text(row.name), *cells, f"{row.support:,}", f"{row.predicted:,}")
    return table


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _f1_or_last(metrics: ClassMetrics) -> float:
    return 2.0 if metrics.f1 is None else metrics.f1


def _table() -> "Table":
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="dim")


def _words(words: str) -> "Text":
    """A sentence with names from a file, wrapped if needed."""
    from rich.text import Text

    return Text(printable(words))


def _text(words: str) -> "Text":
    """A name from a file, without rich markup or terminal control characters."""
    from rich.text import Text

    return Text(printable(words), no_wrap=True, overflow="ellipsis")
