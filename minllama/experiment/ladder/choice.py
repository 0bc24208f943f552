"""Choose among measured classifiers: the best, or a cheaper one that cannot be told apart.

Two are compared on the rows on which both were measured, row by row, since most texts are easy or
hard for both. The cheaper one is taken where the difference is within one standard error
(one-standard-error rule, Breiman et al. 1984, sec. 3.4.3), unless the probabilities tell what the
metric does not: a right answer counts the same whether it was a near thing or not, and log-loss
sees the difference. A few rows tell hardly anything apart: there the one that combines the others
is taken, unless another is better by more than that error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

ROUNDING = 1e-9  # a difference of just one standard error is within it
POINT = 0.01  # what `--prefer speed` gives up at most
CLEARLY = 2.0  # standard errors by which log-loss is lower, to count against a cheaper one


class Gain(NamedTuple):
    """By how much one is better than another, with the standard error of that difference.

    Attributes:
        value: positive if the first is better.
        error: its standard error.
        rows: that both were measured on.
    """

    value: float
    error: float
    rows: int


# By how much the first of two names is better than the second.
Compare = Callable[[str, str], Gain]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why each of the others was not.

    Attributes:
        chosen: its name.
        best: the name of the best by the metric.
        reasons: for each name a phrase.
    """

    chosen: str
    best: str
    reasons: Mapping[str, str]


def choose(
    names: Sequence[str],
    compare: Compare,
    *,
    speeds: Mapping[str, float] | None = None,
    losses: Compare | None = None,
    points: bool = True,
) -> Choice:
    """Choose one of several.

    Args:
        names: cheapest first; at least one.
        compare: of two names.
        speeds: texts per second; given, the fastest within a POINT of the best is chosen, otherwise
            the cheapest within one standard error of it.
        losses: compares log-losses; those within one standard error of the best by the metric are
            left out where the log-loss of one of them is lower by CLEARLY.
        points: the metric is a fraction, so differences are in points.
    """
    best = _best(names, compare)
    lacks = {name: compare(best, name) for name in names if name != best}
    if speeds is None:
        near = [n for n in names if n == best or lacks[n].value <= lacks[n].error + ROUNDING]
        within, near = near, near if losses is None else _of_least_loss(near, losses)
        if near[0] != within[0]:
            return _by_losses(names, near[0], best, compare, lacks, points)
        chosen = near[0]
    else:
        near = [
            n for n in names if n == best or lacks[n].value <= _most(lacks[n], points) + ROUNDING
        ]
        chosen = max(near, key=lambda name: speeds[name])
    reasons = {
        name: _reason(name, chosen, best, lacks, compare, speeds is not None, points)
        for name in names
    }
    return Choice(chosen, best, reasons)


def _of_least_loss(names: Sequence[str], losses: Compare) -> list[str]:
    """Those of which none has a clearly lower log-loss."""
    best = _best(names, losses)
    lacks = {name: losses(best, name) for name in names if name != best}
    return [n for n in names if n == best or lacks[n].value <= CLEARLY * lacks[n].error + ROUNDING]


def _by_losses(
    names: Sequence[str],
    chosen: str,
    best: str,
    compare: Compare,
    lacks: Mapping[str, Gain],
    points: bool,
) -> Choice:
    """The choice of one whose probabilities are clearly better than those of a cheaper one."""
    reasons = {name: _difference(name, chosen, compare, points) for name in names if name != chosen}
    why = "its log-loss is clearly below that of cheaper ones"
    if chosen == best:
        reasons[chosen] = f"the best of those that could be measured, and {why}"
    else:
        near = f"within one standard error of the best ({best}, {in_points(lacks[chosen], points)}"
        reasons[chosen] = f"{near} better), and {why}"
    return Choice(chosen, best, reasons)


def choose_for_few(
    names: Sequence[str], compare: Compare, default: str, *, points: bool = True
) -> Choice:
    """Choose where there are few rows to compare by.

    Args:
        names, compare, points: as for `choose`.
        default: the one that combines the others.
    """
    best = _best(names, compare)
    chosen, is_better = default, False
    if best != default:
        gain = compare(best, default)
        is_better = gain.value > gain.error + ROUNDING
        chosen = best if is_better else default
    reasons = {name: _difference(name, chosen, compare, points) for name in names if name != chosen}
    why = "the others are combined in it, and so few rows tell hardly anything apart"
    reasons[chosen] = "better than the rest by more than one standard error" if is_better else why
    return Choice(chosen, best, reasons)


def _difference(name: str, chosen: str, compare: Compare, points: bool) -> str:
    """How one compares with the chosen one."""
    gain = compare(name, chosen)
    words = in_points(Gain(abs(gain.value), gain.error, gain.rows), points)
    place = "above" if gain.value > 0 else "below"
    return f"{words} {place} {chosen}" if gain.value else f"no better than {chosen}"


def _best(names: Sequence[str], compare: Compare) -> str:
    """The first of the best."""
    best = names[0]
    for name in names[1:]:
        if compare(name, best).value > 0:
            best = name
    return best


def _most(lack: Gain, points: bool) -> float:
    """How much `--prefer speed` gives up."""
    return POINT if points else lack.error


def _reason(
    name: str,
    chosen: str,
    best: str,
    lacks: Mapping[str, Gain],
    compare: Compare,
    by_speed: bool,
    points: bool,
) -> str:
    if name == chosen:
        if name == best:
            return "the best of those that could be measured" if lacks else "the only one left"
        lack = in_points(lacks[name], points)
        if by_speed:
            return f"the fastest within a point of the best ({best}, {lack} better)"
        return f"the cheapest within one standard error of the best ({best}, {lack} better)"
    gain = compare(name, chosen)
    words = in_points(Gain(abs(gain.value), gain.error, gain.rows), points)
    if gain.value <= 0:
        return f"{words} below {chosen}" if gain.value else f"no better than {chosen}"
    if by_speed:
        return f"{words} above {chosen}, but slower"
    return f"{words} above {chosen}, which is cheaper and within one standard error of the best"


def in_points(gain: Gain, points: bool) -> str:
    """0.0123 and 0.005 -> 1.2 ± 0.5 points."""
    if points:
        return f"{100 * gain.value:.1f} ± {100 * gain.error:.1f} points"
    return f"{gain.value:.3g} ± {gain.error:.2g}"
