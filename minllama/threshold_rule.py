"""The words of `--threshold`: a number, a metric to be best by, or a precision or recall to reach.

Knows nothing of labels or probabilities.
"""

from minllama.errors import OptionError

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
