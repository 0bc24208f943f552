"""Compare regression results of several systems, and state a verdict.

`minllama.evaluation.report.comparison` does the same for classes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from minllama.evaluation.regression import METRICS, RegressionEvaluation
from minllama.evaluation.report.comparison import THIS_SYSTEM

TITLES = {name: metric.title for name, metric in METRICS.items()}
DIGITS = 4  # significant ones of what is in the unit of the targets


class Cell(NamedTuple):
    """One metric of one system."""

    text: str
    best: bool  # of the systems compared


def written(value: float | None, metric: str = "mae") -> str:
    """A formatted number: with some significant digits in the unit, else three decimals."""
    if value is None:
        return "–"
    return in_unit(value) if METRICS[metric].in_unit else f"{value:.3f}"


def in_unit(value: float) -> str:
    """0.00123456 -> 0.001235, 123456.7 -> 123457: whole digits stay."""
    if value and math.isfinite(value) and 1e-4 <= abs(value) < 1e15:
        decimals = max(0, DIGITS - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"
    return f"{value:.{DIGITS}g}"


def systems(
    evaluation: RegressionEvaluation, others: Mapping[str, RegressionEvaluation]
) -> list[tuple[str, list[Cell]]]:
    """The regression and the others, with the best of each metric marked."""
    rows = {THIS_SYSTEM: evaluation, **others}
    cells: dict[str, list[Cell]] = {title: [] for title in rows}
    for metric, about in METRICS.items():
        values = {title: row.value(metric) for title, row in rows.items()}
        known = [value for value in values.values() if value is not None]
        best = written((min if about.less_is_better else max)(known), metric) if known else None
        for title, value in values.items():
            text = written(value, metric)
            cells[title].append(Cell(text, value is not None and text == best))
    return list(cells.items())


def interval(evaluation: RegressionEvaluation, metric: str) -> tuple[str, str] | None:
    """Both ends of the 95% interval, formatted; None without one."""
    ends = evaluation.intervals.get(metric)
    return None if ends is None else (written(ends[0], metric), written(ends[1], metric))


def verdict(evaluation: RegressionEvaluation, others: Mapping[str, RegressionEvaluation]) -> str:
    """A sentence with the mean error, and one with the comparison to others."""
    off = in_unit(evaluation.mae)
    sentence = f"The mean absolute error is {off} on {evaluation.count:,} texts."
    if not others:
        return sentence
    name, best = min(others.items(), key=lambda item: item[1].mae)
    sentence += f" That of the best other, {name}, is {in_unit(best.mae)}"
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
