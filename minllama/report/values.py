"""The report of predicted numbers: what is shown of a split, on the page, in a terminal, in files.

Plain values only. What the rest of this package does for classes.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from minllama.data.records import printable
from minllama.regression import METRICS, RegressionEvaluation
from minllama.report.comparison import OWN
from minllama.report.content import ReportedValues
from minllama.report.mistakes import folded

if TYPE_CHECKING:
    from rich.console import Console

TITLES = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "pearson": "Pearson", "spearman": "Spearman"}
IN_UNIT = ("mae", "rmse")  # the others are shares and correlations
MAX_MISSES = 20
MAX_POINTS = 1000  # of the scatter plot: more would not be seen, and make the page heavy
DIGITS = 4  # significant ones of what is in the unit of the targets
QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95}


class Cell(NamedTuple):
    """One metric of one system."""

    text: str
    best: bool  # of the systems compared


class Miss(NamedTuple):
    """One text whose number was missed by much."""

    row: int  # counted from 1
    target: str
    value: str
    error: str
    excerpt: str
    text: str
    omitted: int


def written(value: float | None, metric: str = "mae") -> str:
    """A number for people: to some significant digits in the unit, else to three decimals."""
    if value is None:
        return "–"
    return in_unit(value) if metric in IN_UNIT else f"{value:.3f}"


def in_unit(value: float) -> str:
    """0.00123456 -> 0.001235, 123456.7 -> 123457: whole digits stay."""
    if value and math.isfinite(value) and 1e-4 <= abs(value) < 1e15:
        decimals = max(0, DIGITS - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"
    return f"{value:.{DIGITS}g}"


def systems(
    evaluation: RegressionEvaluation, others: Mapping[str, RegressionEvaluation]
) -> list[tuple[str, list[Cell]]]:
    """The regression and the others, the best of each metric marked."""
    rows = {OWN: evaluation, **others}
    cells: dict[str, list[Cell]] = {title: [] for title in rows}
    for metric, less_is_better in METRICS.items():
        values = {title: getattr(row, metric) for title, row in rows.items()}
        known = [value for value in values.values() if value is not None]
        best = written((min if less_is_better else max)(known), metric) if known else None
        for title, value in values.items():
            text = written(value, metric)
            cells[title].append(Cell(text, value is not None and text == best))
    return list(cells.items())


def interval(evaluation: RegressionEvaluation, metric: str) -> tuple[str, str] | None:
    """Both ends of the 95% interval as people read them, or None where there is none."""
    ends = evaluation.intervals.get(metric)
    return None if ends is None else (written(ends[0], metric), written(ends[1], metric))


def verdict(evaluation: RegressionEvaluation, others: Mapping[str, RegressionEvaluation]) -> str:
    """The mean error in a sentence, and in a second one whether it is less than that of others."""
    off = in_unit(evaluation.mae)
    sentence = f"Off by {off} on average on {evaluation.count:,} texts."
    if not others:
        return sentence
    name, best = min(others.items(), key=lambda item: item[1].mae)
    sentence += f" The best of the others, {name}, is off by {in_unit(best.mae)}"
    if best.difference is None:
        return f"{sentence}."
    less, low, high = best.difference
    between = f"(95% interval, row by row: {in_unit(low)} to {in_unit(high)})"
    if low <= 0 <= high:
        return f"{sentence}; a difference of {in_unit(less)} {between} may be chance."
    side = "less" if less > 0 else "more"
    low, high = sorted((abs(low), abs(high)))
    between = f"(95% interval, row by row: {in_unit(low)} to {in_unit(high)})"
    return f"{sentence}: this is {in_unit(abs(less))} {side} {between}."


def shown_on_page(split: ReportedValues) -> dict[str, Any]:
    """What the template shows of one split."""
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
        "verdict": verdict(evaluation, split.others),
        "tiles": [
            (TITLES[name], written(getattr(evaluation, name), name), _range(evaluation, name))
            for name in ("mae", "rmse", "r2", "spearman")
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
    """Quantiles of predicted numbers, in words."""
    named = {**QUANTILES, "greatest": 1.0}
    if not len(values):
        return []
    found = np.quantile(values, list(named.values()))
    return [(name, in_unit(float(value))) for name, value in zip(named, found, strict=True)]


def scatter(split: ReportedValues) -> str:
    """Predicted numbers against targets, as SVG."""
    from minllama.report.figures import ACCENT, MUTED, drawn

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
    """The rows that are off by most."""
    targets = np.asarray(split.targets, dtype=np.float64)
    errors = split.values - targets
    order = np.argsort(-np.abs(errors), kind="stable")[:MAX_MISSES]
    misses = []
    for i in order.tolist():
        if errors[i]:
            excerpt, text, omitted = folded(split.texts[i])
            numbers = in_unit(targets[i]), in_unit(float(split.values[i])), f"{errors[i]:+.3g}"
            misses.append(Miss(i + 1, *numbers, excerpt, text, omitted))
    return misses


def value_lines(split: ReportedValues) -> Iterator[str]:
    """For each text a line of JSON: its target as `label` (null without), and what is predicted."""
    for i, text in enumerate(split.texts):
        row = {
            "split": split.name,
            "text": text,
            "label": None if split.targets is None else split.targets[i],
            "predicted": rounded(float(split.values[i])),
        }
        yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def rounded(value: float) -> float:
    """As float32 knows it, and no further digits."""
    return float(f"{value:.8g}")


def print_values(
    name: str,
    evaluation: RegressionEvaluation,
    others: Mapping[str, RegressionEvaluation],
    console: "Console",
) -> None:
    """Print the metrics beside those of other systems, as `print_summary` does for classes."""
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
        own = title == OWN
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
