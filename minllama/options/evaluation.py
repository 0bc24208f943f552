"""Options for decision thresholds and reports, and the parser of `--threshold` values.

A threshold is a number, a metric to maximize, or a precision or recall to reach.
`minllama.evaluation.thresholds` applies it.
"""

from dataclasses import dataclass
from typing import ClassVar

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, option
from minllama.options.classification import HEADLINES

THRESHOLD_METRICS = ("f1", "macro-f1", "accuracy", "balanced-accuracy")
THRESHOLD_GOALS = ("precision", "recall")


def threshold_rule(text: str) -> float | str | None:
    """Parse a threshold: a number, or a rule in normalized spelling; None for neither.

    Raises:
        OptionError: the number, precision or recall is out of range.
    """
    word = text.strip().lower().replace("_", "-")
    name, _, goal = word.partition("=")
    if word in THRESHOLD_METRICS:
        return word
    number = _number(goal if name in THRESHOLD_GOALS else word)
    if number is None:
        return None
    if name in THRESHOLD_GOALS:
        if not 0 < number <= 1:
            raise OptionError(f"threshold {text!r}: {name} must be in (0, 1], such as 0.9")
        return f"{name}={number:g}"
    if not 0 <= number <= 1:
        raise OptionError(f"threshold must be in [0, 1], not {text.strip()}")
    return number


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions(CheckedOptions):
    """At which probability a label is predicted; see `minllama.evaluation.thresholds`."""

    group: ClassVar[str] = "Evaluation"

    threshold: tuple[str, ...] = option(
        (),
        "probability at which the positive class (or, with --multi-label, each label) is "
        "predicted: a number; in training also what maximizes f1, macro-f1, accuracy or "
        "balanced-accuracy on the dev split, or precision=0.9 (with the highest recall) or "
        "recall=0.9 (with the highest precision); LABEL=0.3 for one label, repeat for more "
        "(default the classifier's own, or 0.5)",
    )
    positive: str | None = option(
        None,
        "which of two classes is the positive one (default the classifier's own, or the second)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.threshold:
            if threshold_rule(text) is None and "=" not in text:
                raise OptionError(
                    f"threshold must be a number in [0, 1], {', '.join(THRESHOLD_METRICS)}, "
                    f"precision=0.9, recall=0.9 or LABEL=0.3, not {text!r}"
                )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(CheckedOptions):
    """What a report shows first; see `minllama.evaluation.report`."""

    group: ClassVar[str] = "Evaluation"

    headline: str | None = option(
        None,
        "metric that the report states first and compares systems by (default accuracy; in "
        "training, --metric)",
        choices=HEADLINES,
    )
