"""Render a report as one self-contained HTML page, without external scripts, fonts or images.

Jinja escapes all texts, names and settings.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from minllama.evaluation.metrics import Evaluation
from minllama.evaluation.report import comparison, confusion, figures
from minllama.evaluation.report.content import Report, ReportedSplit, ReportedValues
from minllama.evaluation.report.mistakes import worst_mistakes
from minllama.evaluation.report.values import shown_on_page
from minllama.evaluation.thresholds import one_line
from minllama.text import duration

FOLDER = Path(__file__).parent
MIN_BROKEN_WORD = 12  # characters: shorter words go to the next line whole


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
    environment.filters.update(
        percent=percent,
        decimal=decimal,
        breakable=breakable,
        thousands="{:,}".format,
        p_value=comparison.p_value,
    )
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
    """0.4857 -> 0.486; a dash without a value."""
    return "–" if value is None else f"{value:.3f}"


def breakable(name: str) -> Markup:
    """The escaped name, with break opportunities in long words after `_`, `.`, `/` and `-`."""

    def broken(word: re.Match[str]) -> str:
        return re.sub("([_./-])", r"\1<wbr>", word[0])

    return Markup(re.sub(rf"\S{{{MIN_BROKEN_WORD},}}", broken, str(escape(name))))


def flattened(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as (dotted name, value) strings."""
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
    if report.has_numbers:
        facts = ["a number per text"]
    if report.thresholds is not None:
        facts.append(one_line(report.thresholds, report.label_names))
    if report.created is not None:
        facts.append(f"{report.created.day} {report.created:%B %Y, %H:%M %Z}".strip())
    if report.seconds is not None:
        facts.append(duration(report.seconds))
    return facts


def _split(report: Report, split: ReportedSplit | ReportedValues) -> dict[str, Any]:
    """The template's variables for one split."""
    if isinstance(split, ReportedValues):
        return shown_on_page(split)
    evaluation, names = split.evaluation, report.label_names
    shown: dict[str, Any] = {
        "name": split.name,
        "rows": len(split.texts),
        "evaluation": evaluation,
        "template": None,
    }
    counts = report.predicted(split).sum(0).tolist()
    if evaluation is None:
        shown["counts"] = list(zip(names, counts, strict=True))
        return shown
    mistakes, wrong = worst_mistakes(report, split)
    shown_first = {*comparison.compared(evaluation), *comparison.ranking(evaluation)}
    measured = [name for name in comparison.METRICS if name in shown_first]
    return shown | {
        "verdict": split.verdict,
        "tiles": _tiles(evaluation),
        "metrics": [comparison.METRICS[name].title for name in measured],
        "systems": comparison.systems(evaluation, split.others, measured),
        "thresholds": report.thresholds is not None,
        "ranking": bool(comparison.ranking(evaluation)),
        "undefined": comparison.undefined(evaluation),
        "paired": [
            (name, {row.title: row for row in comparison.rows(evaluation, other, paired)}, paired)
            for (name, other), paired in zip(
                split.others.items(), split.paired.values(), strict=True
            )
        ],
        "matrix": confusion.matrix(evaluation),
        "upright": len(names) > 10 or max(map(len, names)) > 10,
        "with_numbers": len(names) <= confusion.MAX_CLASSES_WITH_COUNTS,
        "pairs": confusion.pairs(evaluation),
        "reliability": Markup(
            figures.reliability_diagram(evaluation.bins, multi_label=report.multi_label)
        ),
        "mistakes": mistakes,
        "wrong": wrong,
    }


def _tiles(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Title, value and a line below."""
    whole = "of complete label sets" if evaluation.multi_label else ""
    return [
        ("Accuracy", percent(evaluation.accuracy), _interval(evaluation, "accuracy") or whole),
        ("Macro F1", decimal(evaluation.macro_f1), _interval(evaluation, "macro_f1")),
        ("Log-loss", decimal(evaluation.log_loss), _interval(evaluation, "log_loss")),
        (
            "Calibration error",
            decimal(evaluation.calibration_error),
            "mean gap between confidence and accuracy",
        ),
    ]


def _interval(evaluation: Evaluation, metric: str) -> str:
    ends = comparison.interval(evaluation, metric)
    return "" if ends is None else f"95% interval {ends[0].removesuffix('%')} to {ends[1]}"
