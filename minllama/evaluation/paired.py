"""Compare two systems row by row on the same texts.

The difference between two systems on the same texts is less uncertain than either result, since
most texts are easy or hard for both. So rows are resampled for both at once (paired bootstrap;
Berg-Kirkpatrick et al. 2012), and rows that only one of them gets right are counted (McNemar 1947,
exact).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from minllama.errors import MinllamaError
from minllama.evaluation.bootstrap import ROUNDS, draws, interval
from minllama.evaluation.metrics import Evaluation


@dataclass(frozen=True)
class Difference:
    """One metric of the first system less that of the second, with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def may_be_chance(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Paired:
    """The first of two systems beside the second, on the same rows.

    Attributes:
        count: rows.
        differences: by the metric's name; what is undefined is not there.
        only_first, only_second: rows that one alone gets right: McNemar's b and c.
        p_value: of McNemar's exact test, two-sided: how likely b and c are to be at least as
            unequal if each such row were a coin's toss.
    """

    count: int
    differences: dict[str, Difference]
    only_first: int
    only_second: int
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold."""
        return {
            "count": self.count,
            "differences": {
                name: {"difference": d.value, "interval": [d.low, d.high]}
                for name, d in self.differences.items()
            },
            "only_first_right": self.only_first,
            "only_second_right": self.only_second,
            "p_value": self.p_value,
        }


def compare(first: Evaluation, second: Evaluation) -> Paired:
    """Compare two evaluations of the same rows.

    Draws are as many as for the intervals of the first, with its seed.

    Raises:
        MinllamaError: they are not of the same rows, or not of the same classes.
    """
    one, two = first.rows, second.rows
    if first.label_names != second.label_names or first.multi_label != second.multi_label:
        raise MinllamaError(
            "cannot compare row by row: the evaluations have different classes; evaluate both "
            "with the same label names in the same order"
        )
    if not np.array_equal(one.gold, two.gold):
        raise MinllamaError(
            "cannot compare row by row: the evaluations have different rows; evaluate both on "
            "the same texts in the same order"
        )
    only_first = int((one.right & ~two.right).sum())
    only_second = int((two.right & ~one.right).sum())
    return Paired(
        count=first.count,
        differences=_differences(first, second),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p value of that many rows that one system alone gets right.

    Under the hypothesis of equal accuracy each such row is a coin's toss; 1 where there is none.
    """
    from scipy.special import bdtr

    tosses = only_first + only_second
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), tosses, 0.5)))


def _differences(first: Evaluation, second: Evaluation) -> dict[str, Difference]:
    one, two = first.rows, second.rows
    drawn, other = one.drawn, two.drawn
    if (one.rounds, one.seed) != (two.rounds, two.seed):  # then these are no pairs
        other = draws(two, rounds=one.rounds or ROUNDS, seed=one.seed)
    found = {}
    names = drawn.keys() & other.keys()
    if first.positive != second.positive:
        names -= {"roc_auc", "average_precision"}
    for name in names:
        own, others = first.value(name), second.value(name)
        ends = interval(drawn[name] - other[name])
        if ends is not None and own is not None and others is not None:
            found[name] = Difference(own - others, *ends)
    return {name: found[name] for name in drawn if name in found}  # in the order of the metrics
