"""ROC AUC and average precision, also for rows resampled with replacement."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Scores(NamedTuple):
    """Both metrics of C labels, each (C,); NaN if all rows or none have the label."""

    roc_auc: NDArray[np.float64]
    average_precision: NDArray[np.float64]


class Ranking:
    """The rows of each label, sorted by probability once, to evaluate many weightings quickly.

    Rows of equal probability are one step of the curves, as in scikit-learn, so their order does
    not matter.

    Args:
        scores: (N, C) probabilities.
        gold: (N, C), true if the row has the label.
    """

    def __init__(self, scores: NDArray[np.float64], gold: NDArray[np.bool_]) -> None:
        self._rows = len(scores)
        self._labels = [_Ranked(*columns) for columns in zip(scores.T, gold.T, strict=True)]

    def measured(self, weights: NDArray[np.number] | None = None) -> Scores:
        """Both metrics with weights of rows, (N,), or weight 1."""
        w = np.ones(self._rows, dtype=np.int64) if weights is None else weights
        pairs = [label.measured(w) for label in self._labels]
        roc_auc, average_precision = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        return Scores(roc_auc, average_precision)


class _Ranked:
    """One label: the ranks of the rows that have it, by probability.

    Both metrics are sums over those P rows, of the weight ranked no lower than each.
    """

    def __init__(self, scores: NDArray[np.float64], gold: NDArray[np.bool_]) -> None:
        self._order = np.argsort(-scores, kind="stable")  # (N,): the most likely first
        ranked = scores[self._order]
        self._positive_ranks = np.flatnonzero(gold[self._order])  # (P,)
        # Each row with the label is in a group of equal probabilities: places first to last of all
        # rows, and the number of rows with the label up to its end and before its beginning.
        positive_scores = -ranked[self._positive_ranks]
        self._ends = np.searchsorted(-ranked, positive_scores, side="right") - 1
        self._starts = np.searchsorted(-ranked, positive_scores, side="left")
        self._own_ends = np.searchsorted(positive_scores, positive_scores, side="right") - 1
        self._own_starts = np.searchsorted(positive_scores, positive_scores, side="left")

    def measured(self, weights: NDArray[np.number]) -> tuple[float, float]:
        """ROC AUC and average precision, with row i of N counted `weights[i]` times."""
        w = weights[self._order]
        up_to = w.cumsum()  # (N,): the weight of all rows down to each
        positive = w[self._positive_ranks]
        hits = positive.cumsum()  # (P,)
        n_positive = hits[-1] if len(hits) else 0
        n_negative = up_to[-1] - n_positive
        if not (n_positive and n_negative):
            return float("nan"), float("nan")
        hits_at_end = hits[self._own_ends]
        alarms_at_end = up_to[self._ends] - hits_at_end
        hits_before = hits[self._own_starts] - positive[self._own_starts]
        alarms_before = up_to[self._starts] - w[self._starts] - hits_before
        # Of the pairs with a row without the label, those lost, half of them where both are equal.
        lost = (positive * (alarms_before + alarms_at_end)).sum() / 2
        precision = hits_at_end / np.maximum(hits_at_end + alarms_at_end, 1)
        found = (positive * precision).sum()
        return float(1 - lost / (n_positive * n_negative)), float(found / n_positive)


def mean_of_defined(values: NDArray[np.float64]) -> float | None:
    """The mean of the defined values; None if none is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None
