"""Confidence intervals of metrics by resampling rows (percentile bootstrap).

Follows Efron & Tibshirani 1993, ch. 13.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from minllama.evaluation import registry
from minllama.evaluation.ranking import Ranking

INTERVAL = (0.025, 0.975)
ROUNDS = 1000  # if a comparison needs draws and the evaluation had none
# Ranking costs time for each row and label, so large tasks get fewer draws.
MOST_RANKED = 1_000_000_000
FEWEST_DRAWS = 200


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """The evaluated rows of a system; R labels are ranked.

    Attributes:
        gold, predicted: (N, C), true where the row has the class.
        losses, briers: (N,), log-loss and Brier score.
        ranked: (N, R) probabilities of the labels whose ranking counts; R may be 0.
        ranked_gold: (N, R), true where the row has the label.
        rounds, seed: of the draws.
    """

    gold: NDArray[np.bool_]
    predicted: NDArray[np.bool_]
    losses: NDArray[np.float64]
    briers: NDArray[np.float64]
    ranked: NDArray[np.float64]
    ranked_gold: NDArray[np.bool_]
    rounds: int
    seed: int

    @property
    def right(self) -> NDArray[np.bool_]:
        """(N,), true if the predicted and gold label sets are equal."""
        return np.asarray((self.gold == self.predicted).all(1))

    def taken(self, indices: NDArray[np.int64]) -> "ScoredRows":
        """The rows at these indices, which may repeat."""
        return replace(
            self,
            gold=self.gold[indices],
            predicted=self.predicted[indices],
            losses=self.losses[indices],
            briers=self.briers[indices],
            ranked=self.ranked[indices],
            ranked_gold=self.ranked_gold[indices],
        )

    @cached_property
    def drawn(self) -> dict[str, NDArray[np.float64]]:
        """The result of `draws` with these rounds and seed."""
        return draws(self, rounds=self.rounds or ROUNDS, seed=self.seed)


def draws(rows: ScoredRows, *, rounds: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """The metrics of N rows drawn with replacement, `rounds` times: name -> values.

    The same seed and number of rows give the same resamples, so that two systems' values are
    paired. Ranking metrics are NaN if undefined for a resample, and may be fewer than `rounds`.

    Most metrics are functions of sums over rows, so a resample is a vector of row counts, and one
    sparse product with it gives all sums.
    """
    from scipy.sparse import csr_array, vstack

    gold, predicted = rows.gold, rows.predicted
    n, classes = gold.shape
    per_row = np.stack([rows.right, rows.losses, rows.briers])
    hits = csr_array((gold & predicted).T.astype(np.float64))  # (C, N)
    sizes = csr_array(gold.T.astype(np.float64)) + csr_array(predicted.T.astype(np.float64))
    table = vstack([csr_array(per_row), hits, sizes], format="csr")
    random = np.random.default_rng(seed)
    sums = np.empty((rounds, table.shape[0]))  # (rounds, 3 + 2 C)
    ranking = Ranking(rows.ranked, rows.ranked_gold) if rows.ranked.size else None
    n_ranked = min(rounds, max(FEWEST_DRAWS, MOST_RANKED // max(rows.ranked.size, 1)))
    ranked = np.full((n_ranked if ranking else 0, 2), np.nan)
    further: dict[str, list[float]] = {}
    for i in range(rounds):
        indices = np.asarray(random.integers(n, size=n))
        times_drawn = np.bincount(indices, minlength=n)
        for name, value in _further(rows, indices).items():
            further.setdefault(name, []).append(np.nan if value is None else value)
        sums[i] = table @ times_drawn
        if ranking is not None and i < n_ranked:
            measured = np.stack(ranking.measured(times_drawn))  # (2, R)
            defined = ~np.isnan(measured[0])  # in both measures
            if defined.any():
                ranked[i] = measured[:, defined].mean(1)
    accuracy, log_loss, brier = sums[:, :3].T / n
    hits, sizes = sums[:, 3 : 3 + classes], sums[:, 3 + classes :]
    f1 = 2 * hits / np.maximum(sizes, 1)  # a class without drawn rows has 0 hits
    values = {
        "accuracy": accuracy,
        "macro_f1": f1.sum(1) / np.maximum((sizes > 0).sum(1), 1),
        "micro_f1": 2 * hits.sum(1) / np.maximum(sizes.sum(1), 1),
        "log_loss": log_loss,
        "brier": brier,
    }
    if ranking is not None:
        values["roc_auc"], values["average_precision"] = ranked.T
    return values | {name: np.array(drawn) for name, drawn in further.items()}


def _further(rows: ScoredRows, indices: NDArray[np.int64]) -> dict[str, float | None]:
    """The metrics of drawn rows that cannot be computed from sums; usually none."""
    if not any(m.compute for m in registry.metrics(regression=False).values()):
        return {}
    return registry.computed(regression=False, arguments=(rows.taken(indices),))


def interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """The middle 95% of the resampled values; None if none is defined."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, INTERVAL)
    return float(low), float(high)


def intervals(rows: ScoredRows) -> dict[str, tuple[float, float]]:
    """The 95% interval of each metric; empty without resamples."""
    if not rows.rounds:
        return {}
    ends = {name: interval(values) for name, values in rows.drawn.items()}
    return {name: pair for name, pair in ends.items() if pair is not None}
