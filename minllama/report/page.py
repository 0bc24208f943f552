"""A report as one HTML page that needs nothing else: no script, no font, no image from elsewhere.

Texts, names and settings are data, never markup: Jinja escapes them all. Knows nothing of files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from minllama.evaluation import Evaluation
from minllama.report import confusion, figures
from minllama.report.content import Report, ReportedSplit
from minllama.report.mistakes import worst_mistakes

FOLDER = Path(__file__).parent

# Fields of Evaluation that are compared: title, whether less is better, how they are written.
METRICS = {
    "accuracy": ("Accuracy", False, "{:.1%}"),
    "macro_f1": ("Macro F1", False, "{:.3f}"),
    "micro_f1": ("Micro F1", False, "{:.3f}"),
    "log_loss": ("Log-loss", True, "{:.3f}"),
    "brier": ("Brier", True, "{:.3f}"),
    "calibration_error": ("ECE", True, "{:.3f}"),
}


@dataclass(frozen=True)
class System:
    """One row of the comparison."""

    name: str
    own: bool  # the classifier that is reported on, not a baseline
    accuracy: tuple[float, float, float]  # low end, value, high end: 0 to 1
    values: list[tuple[str, bool]]  # as written, and whether it is the best of its column


def render_page(report: Report) -> str:
    """The whole page.

    Raises:
        MinllamaError: matplotlib is missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, decimal=decimal, thousands="{:,}".format)
    curves = (
        ("Loss", figures.loss_curve(report.history)),
        ("Metrics on dev", figures.metric_curve(report.history)),
    )
    return environment.get_template("page.html.jinja").render(
        report=report,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        facts=_facts(report),
        splits=[_split(report, split) for split in report.splits],
        curves=[(title, Markup(svg)) for title, svg in curves if svg is not None],
        settings=flattened(report.settings),
    )


def percent(value: float) -> str:
    """0.4857 -> 48.6%."""
    return f"{value:.1%}"


def decimal(value: float | None) -> str:
    """0.4857 -> 0.486; a dash where there is no value."""
    return "–" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def flattened(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as (dotted name, value) in words."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flattened(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _in_words(value)))
    return rows


def _in_words(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value)) or "–"
    return str(value)


def _facts(report: Report) -> list[str]:
    classes = len(report.label_names)
    facts = [f"{classes} {'labels' if report.multi_label else 'classes'}"]
    if report.created is not None:
        facts.append(f"{report.created:%d %B %Y, %H:%M %Z}".strip())
    if report.seconds is not None:
        facts.append(duration(report.seconds))
    return facts


def _split(report: Report, split: ReportedSplit) -> dict[str, Any]:
    """What the template shows of one split."""
    evaluation = split.evaluation
    shown: dict[str, Any] = {"name": split.name, "rows": len(split.texts), "evaluation": evaluation}
    counts = report.predicted(split).sum(0).tolist()
    if evaluation is None:
        shown["counts"] = list(zip(report.label_names, counts, strict=True))
        return shown
    mistakes, wrong = worst_mistakes(report, split)
    return shown | {
        "verdict": verdict(evaluation, split.others),
        "tiles": _tiles(evaluation),
        "metrics": [METRICS[name][0] for name in _compared(evaluation)],
        "systems": systems(evaluation, split.others),
        "matrix": confusion.matrix(evaluation),
        "with_numbers": len(report.label_names) <= confusion.MAX_WITH_NUMBERS,
        "pairs": confusion.pairs(evaluation),
        "reliability": Markup(figures.reliability_diagram(evaluation.bins)),
        "mistakes": mistakes,
        "wrong": wrong,
    }


def _compared(evaluation: Evaluation) -> list[str]:
    # With one label a row, micro F1 is the accuracy once more.
    return [name for name in METRICS if name != "micro_f1" or evaluation.multi_label]


def _tiles(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Title, value and a line below."""
    whole = "of whole label sets" if evaluation.multi_label else ""
    return [
        ("Accuracy", percent(evaluation.accuracy), _interval(evaluation, "accuracy") or whole),
        ("Macro F1", decimal(evaluation.macro_f1), _interval(evaluation, "macro_f1")),
        ("Log-loss", decimal(evaluation.log_loss), _interval(evaluation, "log_loss")),
        (
            "Calibration error",
            decimal(evaluation.calibration_error),
            "mean gap of confidence and accuracy",
        ),
    ]


def _interval(evaluation: Evaluation, metric: str) -> str:
    ends = evaluation.intervals.get(metric)
    if ends is None:
        return ""
    low, high = (METRICS[metric][2].format(end) for end in ends)
    return f"95% interval {low.removesuffix('%')} to {high}"


def systems(evaluation: Evaluation, others: Mapping[str, Evaluation]) -> list[System]:
    """The classifier and what it is compared with, the best of each metric marked."""
    names = _compared(evaluation)
    rows = {"This classifier": evaluation, **others}
    best = {
        name: (min if METRICS[name][1] else max)(_written(row, name) for row in rows.values())
        for name in names
    }
    return [
        System(
            name=title,
            own=row is evaluation,
            accuracy=_accuracy_range(row),
            values=[
                (METRICS[name][2].format(getattr(row, name)), _written(row, name) == best[name])
                for name in names
            ],
        )
        for title, row in rows.items()
    ]


def _written(evaluation: Evaluation, metric: str) -> float:
    """The metric as precisely as it is written: what looks equal is equally good."""
    return round(float(getattr(evaluation, metric)), 3)


def _accuracy_range(evaluation: Evaluation) -> tuple[float, float, float]:
    at = evaluation.accuracy
    low, high = evaluation.intervals.get("accuracy", (at, at))
    return low, at, high


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
        return f"{sentence} Level with the best of the others, {name}."
    side = "ahead of" if points > 0 else "behind"
    sentence += f" {abs(points):.1f} points {side} the best of the others, {name}"
    low, _, high = _accuracy_range(evaluation)
    other_low, _, other_high = _accuracy_range(best)
    if low <= other_high and other_low <= high:
        return f"{sentence}; the intervals overlap, so chance may have a part in it."
    return f"{sentence}."
