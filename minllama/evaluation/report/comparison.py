"""Compare a classifier with the baselines: metrics, their formatting, and a verdict.

The page and the terminal summary show the results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minllama.evaluation.metrics import Evaluation
from minllama.evaluation.paired import Difference, Paired, compare
from minllama.evaluation.registry import Metric, metrics
from minllama.text import first_few

THIS_SYSTEM = "this classifier"


METRICS = metrics(regression=False)
RANKING = tuple(name for name, metric in METRICS.items() if metric.is_ranking)
MISSING = "–"  # a value that is not defined
SURE = 0.05  # from this p value on an exact test is not sure


@dataclass(frozen=True)
class Value:
    """One metric of one system."""

    text: str
    best: bool  # of the systems compared


@dataclass(frozen=True)
class System:
    """The classifier, or a system that it is compared with."""

    name: str
    own: bool  # the classifier
    accuracy: tuple[float, float, float]  # low end of the interval, value, high end: 0 to 1
    values: list[Value]  # of the metrics compared


@dataclass(frozen=True)
class Row:
    """One metric of two systems, and their difference, formatted."""

    title: str
    first: str
    second: str
    difference: str  # of the first from the second
    interval: tuple[str, str]
    may_be_chance: bool


def compared(evaluation: Evaluation) -> list[str]:
    """The metrics of decisions that are shown."""
    shown = [metric for metric in METRICS.values() if not metric.is_ranking]
    return [m.name for m in shown if evaluation.multi_label or not m.only_multi_label]


def ranking(evaluation: Evaluation) -> list[str]:
    """The ranking metrics to show; for three classes or more only if defined."""
    is_shown = evaluation.multi_label or evaluation.positive is not None
    return [*RANKING] if is_shown or evaluation.roc_auc is not None else []


def undefined(evaluation: Evaluation) -> str | None:
    """A sentence about labels with undefined ranking metrics; None if all are defined."""
    many = evaluation.multi_label
    names = [metrics.name for metrics in evaluation.per_class if metrics.roc_auc is None]
    if not names or (len(evaluation.per_class) == 1 and not many):
        return None
    if len(names) == len(evaluation.per_class) and not many:
        return "ROC AUC and AP are undefined: all texts have the same class."
    listed = first_few(names, 3)
    if not many:
        return f"ROC AUC and AP are undefined: there are no texts of {listed}."
    return f"ROC AUC and AP are undefined for {listed}: all texts have the label, or none has."


def written(evaluation: Evaluation, metric: str) -> str:
    """The formatted metric."""
    value = evaluation.value(metric)
    return MISSING if value is None else METRICS[metric].number_format.format(value)


def interval(evaluation: Evaluation, metric: str) -> tuple[str, str] | None:
    """Both ends of the 95% interval, formatted; `None` without one."""
    ends = evaluation.intervals.get(metric)
    if ends is None:
        return None
    number_format = METRICS[metric].number_format
    return number_format.format(ends[0]), number_format.format(ends[1])


def systems(
    evaluation: Evaluation,
    others: Mapping[str, Evaluation],
    names: Sequence[str] | None = None,
) -> list[System]:
    """The classifier and the others, with the best of each metric marked.

    Args:
        evaluation: of the classifier.
        others: of other systems on the same rows, by name.
        names: of the metrics; None for the decision metrics.
    """
    rows = {THIS_SYSTEM: evaluation, **others}
    best: dict[str, float | None] = {}
    for name in compared(evaluation) if names is None else names:
        values = [it for row in rows.values() if (it := _as_written(row, name)) is not None]
        best[name] = (min if METRICS[name].less_is_better else max)(values, default=None)
    return [
        System(
            name=title,
            own=row is evaluation,
            accuracy=_accuracy_range(row),
            values=[
                Value(written(row, name), value is not None and _as_written(row, name) == value)
                for name, value in best.items()
            ],
        )
        for title, row in rows.items()
    ]


def verdict(
    evaluation: Evaluation, others: Mapping[str, Evaluation], metric: str = "accuracy"
) -> str:
    """A sentence with the metric, and one with the comparison to the best of the others.

    The difference is called due to chance only if its paired 95% interval includes zero.

    Args:
        evaluation: of the classifier.
        others: of other systems on the same rows, by name.
        metric: the headline, a name of `METRICS`.

    Raises:
        MinllamaError: the best of the others was evaluated on different rows.
    """
    sentence = _alone(evaluation, metric)
    if not others:
        return sentence
    sign = -1 if METRICS[metric].less_is_better else 1
    name, best = max(others.items(), key=lambda item: sign * (item[1].value(metric) or 0.0))
    paired = compare(evaluation, best)
    if metric not in paired.differences:  # undefined for one of the two
        return sentence
    return f"{sentence} {compared_with(paired, name, metric, among=len(others))}"


def compared_with(paired: Paired, name: str, metric: str = "accuracy", *, among: int = 2) -> str:
    """A sentence that compares the first system with the second.

    Args:
        paired: the comparison.
        name: of the second.
        metric: of METRICS.
        among: how many systems the second is the best of.
    """
    if among > 1:
        name = f"the best of the others, {name}"
    of, found = METRICS[metric], paired.differences[metric]
    size = of.difference(abs(found.value), sign=False)
    unit = " points" if of.number_format == "{:.1%}" else ""
    is_level = float(size) == 0
    if is_level:
        sentence = f"That equals {name}"
    else:
        sentence = f"That is {size}{unit} {'more' if found.value > 0 else 'less'} than {name}"
    sentence += f" (paired 95% interval {_ends(found, of)}{unit}"
    if metric == "accuracy":
        sentence += f"; McNemar's exact {p_value(paired.p_value)}"
    if found.may_be_chance:
        what = "what differs" if is_level else "this"
        return f"{sentence}); the interval includes zero, so {what} may be due to chance."
    if metric == "accuracy" and paired.p_value > SURE:
        return f"{sentence}), based on few texts."
    return f"{sentence})."


def rows(first: Evaluation, second: Evaluation, paired: Paired) -> list[Row]:
    """Each metric of two systems, for a table."""
    names = [name for name in METRICS if name in {*compared(first), *ranking(first)}]
    return [
        Row(
            METRICS[name].title,
            written(first, name),
            written(second, name),
            METRICS[name].difference(found.value),
            (METRICS[name].difference(found.low), METRICS[name].difference(found.high)),
            found.may_be_chance,
        )
        for name in names
        if (found := paired.differences.get(name)) is not None
    ]


def p_value(p: float) -> str:
    """P = 0.035; p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _alone(evaluation: Evaluation, metric: str) -> str:
    if metric != "accuracy":
        return (
            f"{METRICS[metric].title} {written(evaluation, metric)} on {evaluation.count:,} texts."
        )
    right = round(evaluation.accuracy * evaluation.count)
    what = "All labels are correct for" if evaluation.multi_label else "Right on"
    return f"{what} {right:,} of {evaluation.count:,} texts."


def _ends(found: Difference, metric: Metric) -> str:
    return f"{metric.difference(found.low)} to {metric.difference(found.high)}"


def _as_written(evaluation: Evaluation, metric: str) -> float | None:
    """Values that are formatted equally count as equal."""
    value = evaluation.value(metric)
    return None if value is None else round(float(value), 3)


def _accuracy_range(evaluation: Evaluation) -> tuple[float, float, float]:
    at = evaluation.accuracy
    low, high = evaluation.intervals.get("accuracy", (at, at))
    return low, at, high
