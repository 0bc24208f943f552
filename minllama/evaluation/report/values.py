"""The report of a regression: on the page, in the terminal, in files."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from minllama.evaluation.registry import on_card
from minllama.evaluation.regression import METRICS, RegressionEvaluation
from minllama.evaluation.report.comparison import THIS_SYSTEM
from minllama.evaluation.report.content import ReportedValues
from minllama.evaluation.report.mistakes import folded
from minllama.evaluation.report.value_comparison import (
    TITLES,
    in_unit,
    interval,
    systems,
    verdict,
    written,
)
from minllama.text import printable

if TYPE_CHECKING:
    from rich.console import Console

MAX_MISSES = 20
MAX_POINTS = 1000  # of the scatter plot: more would be invisible and make the page large
QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}


class Miss(NamedTuple):
    """One text with a large error."""

    row: int  # counted from 1
    target: str
    value: str
    error: str
    excerpt: str
    text: str
    omitted: int


def shown_on_page(split: ReportedValues) -> dict[str, Any]:
    """The template's variables for one split."""
    evaluation = split.evaluation
    shown: dict[str, Any] = {
        "name": split.name,
        "rows": len(split.texts),
        "evaluation": evaluation,
        "template": "values.html.jinja",
        "spread": _spread(split.values),
    }
    if evaluation is None:
        return shown
    return shown | {
        "verdict": split.verdict,
        "tiles": [
            (TITLES[name], written(evaluation.value(name), name), _range(evaluation, name))
            for name in on_card(regression=True)
        ],
        "metrics": [TITLES[name] for name in METRICS],
        "systems": systems(evaluation, split.others),
        "scatter": Markup(scatter(split)),
        "misses": worst_misses(split),
    }


def _range(evaluation: RegressionEvaluation, metric: str) -> str:
    ends = interval(evaluation, metric)
    return "" if ends is None else f"95% interval {ends[0]} to {ends[1]}"


def _spread(values: NDArray[np.float64]) -> list[tuple[str, str]]:
    """Quantiles of predicted numbers, as text."""
    named = {**QUANTILES, "greatest": 1.0}
    if not len(values):
        return []
    found = np.quantile(values, list(named.values()))
    return [(name, in_unit(float(value))) for name, value in zip(named, found, strict=True)]


def scatter(split: ReportedValues) -> str:
    """Predicted numbers against targets, as SVG."""
    from minllama.evaluation.report.figures import ACCENT, MUTED, drawn

    targets = np.asarray(split.targets, dtype=np.float64)
    rows = np.linspace(0, len(targets) - 1, min(len(targets), MAX_POINTS)).round().astype(int)
    x, y = targets[rows], split.values[rows]
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    with drawn() as drawing:
        axes = drawing.axes
        axes.plot(ends, ends, color=MUTED, linewidth=0.8, dashes=(4, 3))
        axes.plot(x, y, "o", color=ACCENT, markersize=3.2, alpha=0.6, markeredgewidth=0)
        axes.set(xlabel="target", ylabel="predicted")
    return drawing.svg


def worst_misses(split: ReportedValues) -> list[Miss]:
    """The rows with the largest errors."""
    targets = np.asarray(split.targets, dtype=np.float64)
    errors = split.values - targets
    order = np.argsort(-np.abs(errors), kind="stable")[:MAX_MISSES]
    misses = []
    for i in order.tolist():
        if errors[i]:
            excerpt, text, omitted = folded(split.texts[i])
            columns = in_unit(targets[i]), in_unit(float(split.values[i])), f"{errors[i]:+.3g}"
            misses.append(Miss(i + 1, *columns, excerpt, text, omitted))
    return misses


def value_lines(split: ReportedValues) -> Iterator[str]:
    """One JSON line per text: its target as `label` (null without), and the prediction."""
    for i, text in enumerate(split.texts):
        row = {
            "split": split.name,
            "text": text,
            "label": None if split.targets is None else split.targets[i],
            "predicted": rounded(float(split.values[i])),
        }
        yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def rounded(value: float) -> float:
    """With float32's digits."""
    return float(f"{value:.8g}")


def print_values(
    name: str,
    evaluation: RegressionEvaluation,
    others: Mapping[str, RegressionEvaluation],
    console: "Console",
) -> None:
    """Print the metrics and those of other systems, as `print_summary` does for classes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(printable(f"{name}: {verdict(evaluation, others)}")))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")  # may be cut, as numbers may not
    for metric in METRICS:
        table.add_column(TITLES[metric], justify="right", no_wrap=True)
    for title, cells in systems(evaluation, others):
        shown = Text(printable(title), no_wrap=True, overflow="ellipsis")
        own = title == THIS_SYSTEM
        table.add_row(shown, *(cell.text for cell in cells), style="bold" if own else "")
        if own and evaluation.intervals:
            ends = [interval(evaluation, metric) or ("", "") for metric in METRICS]
            table.add_row("  95% interval from", *(low for low, _ in ends), style="dim")
            table.add_row("  to", *(high for _, high in ends), style="dim")
    if console.is_terminal:
        table.box = box.SIMPLE_HEAD  # has an empty line above and below
    else:
        console.print()
    console.print(table)
