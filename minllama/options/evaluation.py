"""Options of what a classifier predicts from, and of what its report is about.

And the words of `--threshold`: a number, a metric to be best by, or a precision or recall to reach.
Knows nothing of labels or probabilities.
"""

from dataclasses import dataclass

from minllama.errors import OptionError
from minllama.options.base import CheckedOptions, option

THRESHOLD_METRICS = ("f1", "macro-f1", "accuracy", "balanced-accuracy")
THRESHOLD_GOALS = ("precision", "recall")


def threshold_rule(text: str) -> float | str | None:
    """What the words of a threshold mean: a number, or a rule as it is written; None for neither.

    Raises:
        OptionError: it is a number, or wants a precision or recall, that cannot be.
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
            raise OptionError(f"threshold {text!r}: a {name} is above 0 and at most 1, such as 0.9")
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
    """From which probability on a label is predicted; see `minllama.evaluation.thresholds`."""

    threshold: tuple[str, ...] = option(
        (),
        "predict the positive class, or each label with --multi-label, from this probability on: "
        "a number; when training also what is best on the dev texts by f1, macro-f1, accuracy or "
        "balanced-accuracy, precision=0.9 (with the highest recall) or recall=0.9 (with the "
        "highest precision); LABEL=0.3 for one label, several times for several; where not given "
        "the classifier's own, or 0.5",
    )
    positive: str | None = option(
        None,
        "which of two classes is the positive one; where not given the classifier's own, or the "
        "second",
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
    """What a report is about; see `minllama.evaluation.report`."""

    headline: str | None = option(
        None,
        "the metric of the report's first sentence, by which systems are compared; accuracy where "
        "not given, or what --metric of a training says",
        choices=("accuracy", "macro_f1", "micro_f1", "log_loss", "brier"),
    )
