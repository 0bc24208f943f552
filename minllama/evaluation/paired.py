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
    """The difference of a metric of the first system and the second, with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def may_be_chance(self) -> bool:
        """Whether the interval includes zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Paired:
    """A comparison of two systems on the same rows.

    Attributes:
        count: rows.
        differences: by the metric's name, without undefined ones.
        only_first, only_second: rows that only one system gets right: McNemar's b and c.
        p_value: of McNemar's exact test, two-sided: the probability that b and c differ at least
            this much by chance.
    """

    count: int
    differences: dict[str, Difference]
    only_first: int
    only_second: int
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
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

    Uses the number of resamples and the seed of the first evaluation.

    Raises:
        MinllamaError: they have different rows or classes.
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
    """The exact two-sided p-value for counts of rows that only one system gets right.

    Under the null hypothesis each such row is a fair coin toss; 1 without such rows.
    """
    from scipy.special import bdtr

    tosses = only_first + only_second
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), tosses, 0.5)))


def _differences(first: Evaluation, second: Evaluation) -> dict[str, Difference]:
    one, two = first.rows, second.rows
    drawn, other = one.drawn, two.drawn
    if (one.rounds, one.seed) != (two.rounds, two.seed):  # then the rows are not pairs
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
