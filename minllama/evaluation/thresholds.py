"""Decision thresholds: given, or chosen on labeled rows.

For two classes, and for multi-label classifiers. Takes probabilities, labels and the values of
`--threshold`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minllama.data.class_names import is_truth
from minllama.errors import MinllamaError, OptionError
from minllama.options.evaluation import THRESHOLD_METRICS, ThresholdOptions, threshold_rule
from minllama.text import printable

DEFAULT = 0.5
MOST_NAMED = 4  # labels whose thresholds are listed individually
FEW = 10  # with fewer texts with or without a label, its threshold is little more than a guess
DIGITS = range(2, 9)  # of a chosen threshold: as few as separate the rows


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of a task of two classes, or of one with any number of labels.

    Attributes:
        values: of each label in order, or only of the positive class; 0 to 1.
        positive: the id of the positive class of two; None for multi-label.
        how: their origin, for display; "" if they were given.
    """

    values: tuple[float, ...]
    positive: int | None = None
    how: str = ""

    def predictions(self, probabilities: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """(N, C), true if the class's probability reaches its threshold.

        Both are compared as float32, which probabilities are: 0.3 is reached by 0.3.
        """
        ends, p = np.array(self.values, dtype=np.float32), probabilities.astype(np.float32)
        if self.positive is None:
            return np.asarray(p >= ends)
        is_positive = p[:, self.positive] >= ends[0]
        columns = np.arange(probabilities.shape[1]) == self.positive
        return np.asarray(is_positive[:, None] == columns)

    def by_label(self, labels: Sequence[str]) -> dict[str, float]:
        """Label -> its threshold; of two classes only the positive one has one."""
        if self.positive is not None:
            return {labels[self.positive]: self.values[0]}
        return dict(zip(labels, self.values, strict=True))


class Chosen(NamedTuple):
    """Thresholds, and notices on how they were chosen."""

    thresholds: Thresholds
    notices: tuple[str, ...]


def positive_class(labels: Sequence[str], name: str | None, *, multi_label: bool) -> int | None:
    """The id of the positive class: the given one, or the second of two; None without one.

    Raises:
        OptionError: one is named that is no label, or the task has no positive class.
    """
    is_binary = len(labels) == 2 and not multi_label
    if name is None:
        return 1 if is_binary else None
    if not is_binary:
        kind = "multi-label texts" if multi_label else f"{len(labels)} classes"
        raise OptionError(f"--positive is for two classes, and these are {kind}; omit it")
    name = _as_labelled(name, labels)
    if name not in labels:
        known = " and ".join(map(repr, labels))
        raise OptionError(
            f"--positive {name!r} is not one of the classes {known}; name one of them"
        )
    return labels.index(name)


def _as_labelled(name: str, labels: Sequence[str]) -> str:
    """A label's name in the task's spelling: `True` means the class `true`, as in files."""
    same = [label for label in labels if is_truth(label) and label.casefold() == name.casefold()]
    return same[0] if len(same) == 1 and name not in labels else name


def _of_two(
    options: ThresholdOptions, labels: Sequence[str], *, multi_label: bool
) -> ThresholdOptions:
    """The options, in which `praise=0.3` with two classes also selects the positive one.

    Raises:
        OptionError: --positive names another one.
    """
    if multi_label or len(labels) != 2 or len(options.threshold) != 1:
        return options
    label, rule = _rule(options.threshold[0], labels)
    if label is None:
        return options
    if options.positive is not None and _as_labelled(options.positive, labels) != label:
        raise OptionError(
            f"--threshold {options.threshold[0]!r} is for {label!r}, but --positive is "
            f"{options.positive!r}; give the threshold of the positive class"
        )
    return replace(options, threshold=(str(rule),), positive=label)


def check_thresholds(
    options: ThresholdOptions, labels: Sequence[str], *, multi_label: bool, can_choose: bool
) -> None:
    """Refuse thresholds that do not suit this task, before any work.

    Args:
        options: as given.
        labels: C names.
        multi_label: each text has any number of them.
        can_choose: there are held-out rows to choose on.

    Raises:
        OptionError: an option is invalid.
    """
    options = _of_two(options, labels, multi_label=multi_label)
    positive = positive_class(labels, options.positive, multi_label=multi_label)
    if not options.threshold:
        return
    if positive is None and not multi_label:
        raise OptionError(
            f"--threshold is for two classes or --multi-label, not for {len(labels)} classes; "
            "omit it"
        )
    for rule in _rules(options.threshold, labels, multi_label=multi_label):
        if isinstance(rule, str) and not can_choose:
            raise OptionError(
                f"--threshold {rule} is chosen on the dev split in training, not on evaluated or "
                "classified texts; give a number"
            )


def fixed_thresholds(
    options: ThresholdOptions,
    labels: Sequence[str],
    *,
    multi_label: bool,
    own: Thresholds | None = None,
) -> Thresholds | None:
    """The thresholds that the options give as numbers, or a classifier's own.

    Args:
        options: as given.
        labels: C names.
        multi_label: each text has any number of them.
        own: the classifier's thresholds, kept for labels without an option.

    Raises:
        OptionError: they need rows to choose on; see `check_thresholds`.
    """
    check_thresholds(options, labels, multi_label=multi_label, can_choose=False)
    options = _of_two(options, labels, multi_label=multi_label)
    positive = positive_class(labels, options.positive, multi_label=multi_label)
    if not options.threshold:
        if options.positive is None or (own is not None and own.positive == positive):
            return own
        value = DEFAULT if own is None else 1 - own.values[0]  # as the other class has it
        return Thresholds((value,), positive, "" if own is None else own.how)
    if options.positive is None and own is not None:
        positive = own.positive
    rules = _rules(options.threshold, labels, multi_label=multi_label, own=own)
    return Thresholds(tuple(float(rule) for rule in rules), positive)


def choose_thresholds(
    options: ThresholdOptions,
    probabilities: NDArray[np.floating[Any]],
    gold: NDArray[np.bool_],
    labels: Sequence[str],
    *,
    multi_label: bool,
    source: str,
) -> Chosen | None:
    """The thresholds that the options give, or that are best on these rows.

    Args:
        options: as given.
        probabilities: (N, C), of rows that are not evaluated.
        gold: (N, C), true if the row has the class.
        labels: C names.
        multi_label: each text has any number of them; each has a threshold of its own.
        source: of the rows, for messages.

    Returns:
        None without such options.

    Raises:
        OptionError: see `check_thresholds`.
    """
    check_thresholds(options, labels, multi_label=multi_label, can_choose=True)
    options = _of_two(options, labels, multi_label=multi_label)
    positive = positive_class(labels, options.positive, multi_label=multi_label)
    if not options.threshold and options.positive is None:
        return None
    columns = range(len(labels)) if positive is None else [positive]
    rules = _rules(options.threshold, labels, multi_label=multi_label) or [DEFAULT]
    values, notices, chosen = [], [], dict[str, None]()
    for rule, column in zip(rules, columns, strict=True):
        if isinstance(rule, float):
            values.append(rule)
            continue
        # The mean over labels is best where each label's own F1 is; of two classes both count.
        of_label = "f1" if multi_label and rule == "macro-f1" else rule
        best = _best(of_label, probabilities[:, column], gold[:, column])
        values.append(best.threshold)
        chosen[rule] = None
        if best.complaint:
            notices.append(f"threshold of {labels[column]!r}: {best.complaint.format(source)}")
    how = f"{' and '.join(chosen)} on {source}" if chosen else ""
    if len(notices) > MOST_NAMED + 1:
        more = f"thresholds of {len(notices) - MOST_NAMED} more labels: equally uncertain"
        notices = [*notices[:MOST_NAMED], more]
    return Chosen(Thresholds(tuple(values), positive, how), tuple(notices))


class _Best(NamedTuple):
    threshold: float
    complaint: str  # in which {} is the source; "" where all is well


def _best(rule: str, probabilities: NDArray[np.floating[Any]], gold: NDArray[np.bool_]) -> _Best:
    """The threshold of one label that is best by the rule: (N,) probabilities and gold."""
    n_positive = int(gold.sum())
    if n_positive in (0, len(gold)):
        which = "no text" if n_positive == 0 else "every text"
        complaint = f"{which} of {{}} has this label, so {rule} cannot be applied; using {DEFAULT}"
        return _Best(DEFAULT, complaint)
    cuts, hits, alarms = _cuts(probabilities, gold)
    precision, recall = hits / np.maximum(hits + alarms, 1), hits / n_positive
    fewer, which = min((n_positive, "with it"), (len(gold) - n_positive, "without it"))
    few = "" if fewer >= FEW else f"chosen on {{}} from only {fewer} texts {which}"
    name, _, goal_text = rule.partition("=")
    if not goal_text:
        quality = _QUALITIES[name](hits, alarms, n_positive, len(gold) - n_positive)
        return _Best(cuts[_first_best(quality, cuts)], few)
    goal = float(goal_text)
    target, other = (precision, recall) if name == "precision" else (recall, precision)
    reached = target >= goal - 1e-12  # 9 of 10 are 0.9
    reached &= hits + alarms > 0  # without predictions, precision is undefined
    if reached.any():
        # Of those that reach the goal, the best in the other metric, then in this one.
        order = np.lexsort((target, np.where(reached, other, -1.0)))
        return _Best(cuts[order[-1]], few)
    at = int(np.lexsort((other, target))[-1])
    complaint = (
        f"{name} {goal:g} is not reached on {{}}; the best is {target[at]:.3f}, with a "
        f"{'recall' if name == 'precision' else 'precision'} of {other[at]:.3f}, from "
        f"{cuts[at]:g} on, which is used"
    )
    return _Best(cuts[at], complaint)


def _cuts(
    probabilities: NDArray[np.floating[Any]], gold: NDArray[np.bool_]
) -> tuple[list[float], NDArray[np.float64], NDArray[np.float64]]:
    """All thresholds with different predictions, with their true and false positives.

    Each is between two occurring probabilities, or above all of them.
    """
    values, groups = np.unique(probabilities.astype(np.float32), return_inverse=True)
    hits = np.bincount(groups, weights=gold)[::-1].cumsum()  # from the most likely group on
    alarms = np.bincount(groups, weights=~gold)[::-1].cumsum()
    falling = values[::-1].tolist()
    cuts = [_between(low, high) for high, low in zip(falling, [*falling[1:], 0.0], strict=True)]
    if falling[0] < 1:  # nothing is predicted
        cuts = [_between(falling[0], 1.0), *cuts]
        hits, alarms = np.insert(hits, 0, 0.0), np.insert(alarms, 0, 0.0)
    return cuts, hits, alarms


def _between(low: float, high: float) -> float:
    """A short number in (low, high], near the middle, in float32."""
    middle = (low + high) / 2
    for digits in DIGITS:
        rounded = round(middle, digits)
        if low < np.float32(rounded) <= high:
            return rounded
    return high


def _first_best(quality: NDArray[np.float64], cuts: Sequence[float]) -> int:
    """The index of the best threshold; of equal ones, the nearest to the default."""
    best = np.flatnonzero(quality >= quality.max() - 1e-12)
    return min(best.tolist(), key=lambda i: abs(cuts[i] - DEFAULT))


def _f1(hits: Any, alarms: Any, positive: int, negative: int) -> Any:
    return 2 * hits / (hits + alarms + positive)


def _macro_f1(hits: Any, alarms: Any, positive: int, negative: int) -> Any:
    # For the other class, hits are rejections, and false positives are misses.
    other = _f1(negative - alarms, positive - hits, negative, positive)
    return (_f1(hits, alarms, positive, negative) + other) / 2


def _accuracy(hits: Any, alarms: Any, positive: int, negative: int) -> Any:
    return (hits + negative - alarms) / (positive + negative)


def _balanced_accuracy(hits: Any, alarms: Any, positive: int, negative: int) -> Any:
    return (hits / positive + 1 - alarms / negative) / 2


_QUALITIES = {
    "f1": _f1,
    "macro-f1": _macro_f1,
    "accuracy": _accuracy,
    "balanced-accuracy": _balanced_accuracy,
}
assert tuple(_QUALITIES) == THRESHOLD_METRICS


def _rules(
    given: Sequence[str],
    labels: Sequence[str],
    *,
    multi_label: bool,
    own: Thresholds | None = None,
) -> list[float | str]:
    """A number or rule for each threshold: of each label, or of the positive class.

    Labels without an option keep their own threshold, or 0.5.

    Raises:
        OptionError: a label is unknown, given twice, or also the name of a rule.
    """
    shared: list[float | str] = []
    of_label: dict[str, float | str] = {}
    for text in given:
        label, rule = _rule(text, labels if multi_label else ())
        if label is None:
            shared.append(rule)
        elif label in of_label:
            raise OptionError(f"--threshold is given twice for {label!r}; give one")
        else:
            of_label[label] = rule
    if len(shared) > 1:
        more = ", or LABEL=THRESHOLD for each label" if multi_label else ""
        raise OptionError(f"--threshold is given {len(shared)} times; give one{more}")
    if not multi_label:
        return shared
    others = [DEFAULT] * len(labels) if own is None else own.values
    rest = shared * len(labels) if shared else others
    return [of_label.get(label, rule) for label, rule in zip(labels, rest, strict=True)]


def _rule(text: str, labels: Sequence[str]) -> tuple[str | None, float | str]:
    """The label of a threshold, None for all, and its number or rule.

    Raises:
        OptionError: it is neither, or both.
    """
    shared = threshold_rule(text)
    typed, equals, rest = text.partition("=")
    if equals and is_truth(typed.strip()):
        text = f"{_as_labelled(typed.strip(), labels)}={rest}"
    rests = [(label, text[len(label) :].lstrip()) for label in labels if text.startswith(label)]
    rules = [(label, threshold_rule(rest[1:])) for label, rest in rests if rest[:1] == "="]
    named = [(label, rule) for label, rule in rules if rule is not None]
    if shared is None and named:
        return max(named, key=lambda pair: len(pair[0]))
    if shared is None:
        known = f"LABEL=0.3 with one of {', '.join(labels)}" if labels else "a number or a rule"
        raise OptionError(f"--threshold {text!r}: no such label or rule; give {known}")
    if named:
        label = named[0][0]
        raise OptionError(
            f"--threshold {text!r} is ambiguous, since {label!r} is also a label; give "
            f"{label}={text} for that label, or a number for all"
        )
    return None, shared


def saved(thresholds: Thresholds, labels: Sequence[str]) -> dict[str, Any]:
    """Thresholds as a value for JSON."""
    return {
        "values": thresholds.by_label(labels),
        "positive": None if thresholds.positive is None else labels[thresholds.positive],
        "how": thresholds.how,
    }


def read(content: Mapping[str, Any], labels: Sequence[str], *, multi_label: bool) -> Thresholds:
    """Thresholds from the result of `saved`.

    Raises:
        KeyError, TypeError, ValueError: it is not such a value.
    """
    values, positive, how = content["values"], content["positive"], content["how"]
    if not isinstance(values, dict) or not isinstance(how, str):
        raise TypeError("thresholds must be numbers by label, with a string for their origin")
    if printable(how) != how:
        raise ValueError("the origin of thresholds is not a line of text")
    if multi_label:
        names, at = list(labels), None
    else:
        if len(labels) != 2 or positive not in labels:
            raise ValueError(f"{positive!r} is not the positive class of two")
        names, at = [positive], labels.index(positive)
    if sorted(values) != sorted(names):
        raise ValueError(
            f"a threshold is missing; there must be one for each of {', '.join(names)}"
        )
    checked = tuple(values[name] for name in names)
    if not all(type(n) in (int, float) and 0 <= n <= 1 for n in checked):
        raise ValueError("a threshold is not a number in [0, 1]")
    return Thresholds(tuple(map(float, checked)), at, how)


def one_line(thresholds: Thresholds, labels: Sequence[str], *, every: bool = False) -> str:
    """The thresholds for display: `threshold 0.31 for 'praise' (f1 on dev.csv)`.

    Args:
        thresholds: of the labels.
        labels: all of them.
        every: list all of them, even if there are many.
    """
    named = thresholds.by_label(labels)
    how = f" ({thresholds.how})" if thresholds.how else ""
    if thresholds.positive is None and len(set(named.values())) == 1:
        return f"threshold {thresholds.values[0]:g} for each label{how}"
    if len(named) > MOST_NAMED and not every:
        low, high = min(thresholds.values), max(thresholds.values)
        return f"thresholds from {low:g} to {high:g} by label{how}"
    listed = ", ".join(f"{value:g} for {label!r}" for label, value in named.items())
    return f"threshold{'s' * (len(named) > 1)} {listed}{how}"


def as_thresholds(
    value: float | Mapping[str, float], labels: Sequence[str], positive: int | None
) -> Thresholds:
    """Thresholds from Python values: one number, or numbers by label.

    Raises:
        MinllamaError: it is not in [0, 1], or names a label without threshold.
    """
    names = list(labels) if positive is None else [labels[positive]]
    given = dict(value) if isinstance(value, Mapping) else dict.fromkeys(names, value)
    if unknown := [name for name in given if name not in names]:
        raise MinllamaError(
            f"no label {unknown[0]!r} to set a threshold for; the labels are {', '.join(names)}"
        )
    checked = [given.get(name, DEFAULT) for name in names]
    for number in checked:
        if isinstance(number, bool) or not isinstance(number, int | float | np.number):
            raise MinllamaError(f"a threshold must be a number in [0, 1], not {number!r}")
        if not 0 <= number <= 1:
            raise MinllamaError(f"a threshold must be a number in [0, 1], not {number!r}")
    return Thresholds(tuple(map(float, checked)), positive)
