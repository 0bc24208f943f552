"""A classifier beside the baselines: which metrics are compared, how they are written, who is best.

Knows nothing of pages or terminals.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from minllama.evaluation import Evaluation

OWN = "this classifier"


@dataclass(frozen=True)
class Metric:
    """How a field of `Evaluation` is shown."""

    title: str
    form: str = "{:.3f}"
    less_is_better: bool = False


METRICS = {
    "accuracy": Metric("Accuracy", "{:.1%}"),
    "macro_f1": Metric("Macro F1"),
    "micro_f1": Metric("Micro F1"),
    "log_loss": Metric("Log-loss", less_is_better=True),
    "brier": Metric("Brier", less_is_better=True),
    "calibration_error": Metric("ECE", less_is_better=True),
}


@dataclass(frozen=True)
class Value:
    """One metric of one system."""

    text: str
    best: bool  # of the systems compared


@dataclass(frozen=True)
class System:
    """The classifier, or something that it is compared with."""

    name: str
    own: bool  # the classifier
    accuracy: tuple[float, float, float]  # low end of the interval, value, high end: 0 to 1
    values: list[Value]  # of the metrics compared


def compared(evaluation: Evaluation) -> list[str]:
    """The metrics that are shown. With one label a text, micro F1 is the accuracy once more."""
    return [name for name in METRICS if name != "micro_f1" or evaluation.multi_label]


def written(evaluation: Evaluation, metric: str) -> str:
    """The metric as people read it."""
    return METRICS[metric].form.format(getattr(evaluation, metric))


def interval(evaluation: Evaluation, metric: str) -> tuple[str, str] | None:
    """Both ends of the 95% interval as people read them, or `None` where there is none."""
    ends = evaluation.intervals.get(metric)
    if ends is None:
        return None
    form = METRICS[metric].form
    return form.format(ends[0]), form.format(ends[1])


def systems(evaluation: Evaluation, others: Mapping[str, Evaluation]) -> list[System]:
    """The classifier and the others, the best of each metric marked."""
    rows = {OWN: evaluation, **others}
    best = {
        name: (min if METRICS[name].less_is_better else max)(
            _as_written(row, name) for row in rows.values()
        )
        for name in compared(evaluation)
    }
    return [
        System(
            name=title,
            own=row is evaluation,
            accuracy=_accuracy_range(row),
            values=[
                Value(written(row, name), _as_written(row, name) == value)
                for name, value in best.items()
            ],
        )
        for title, row in rows.items()
    ]


def verdict(evaluation: Evaluation, others: Mapping[str, Evaluation]) -> str:
    """The accuracy in a sentence, and in a second one whether it beats the best of the others."""
    right = round(evaluation.accuracy * evaluation.count)
    what = "All labels are right for" if evaluation.multi_label else "Right on"
    sentence = f"{what} {right:,} of {evaluation.count:,} texts."
    if not others:
        return sentence
    name, best = max(others.items(), key=lambda item: item[1].accuracy)
    points = 100 * (evaluation.accuracy - best.accuracy)
    if abs(points) < 0.05:
        return f"{sentence} The best of the others, {name}, is level with it."
    side = "more" if points > 0 else "less"
    sentence += f" That is {abs(points):.1f} points {side} than the best of the others, {name}"
    low, _, high = _accuracy_range(evaluation)
    other_low, _, other_high = _accuracy_range(best)
    if low <= other_high and other_low <= high:
        return f"{sentence}; the intervals overlap, so chance may have a part in it."
    return f"{sentence}."


def _as_written(evaluation: Evaluation, metric: str) -> float:
    """What looks equal is equally good."""
    return round(float(getattr(evaluation, metric)), 3)


def _accuracy_range(evaluation: Evaluation) -> tuple[float, float, float]:
    at = evaluation.accuracy
    low, high = evaluation.intervals.get("accuracy", (at, at))
    return low, at, high
