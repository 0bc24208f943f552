"""Linear discriminant analysis with a shrunken covariance, in closed form.

Beside few rows of many classes it is better than logistic regression, and one eigendecomposition
serves all shrinkages (Hastie, Tibshirani & Friedman 2009, sec. 4.3; Ledoit & Wolf 2004, eq. 14,
whose shrinkage is chosen by cross-validation here). Where classes are ordered, as stars are, a head
may look along one direction only (the stereotype model; Anderson 1984, sec. 3), which fewer rows
tell. `minllama.classification.frozen` calls it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minllama.data.task import Task

# The part of the covariance that is replaced by its mean variance.
SHRINKAGES = (0.03, 0.1, 0.2, 0.4, 0.7, 0.9)
SMALLEST_SCALE = 1e-6  # of a feature that is almost constant
PRIOR_ROWS = 0.5  # of a class without a row

Matrix = NDArray[np.float64]


class HeadKind(NamedTuple):
    """A head that the same moments give.

    Attributes:
        shrinkage: 0 to 1.
        is_ordinal: all classes are on one line.
    """

    shrinkage: float
    is_ordinal: bool = False


class Discriminant:
    """The moments of rows and classes, from which a head follows for each shrinkage.

    Args:
        features: (N, D).
        gold: (N, C), one true value a row.
        task: whether classes are balanced.
    """

    def __init__(self, features: NDArray[np.float32], gold: NDArray[np.bool_], task: Task) -> None:
        n = len(features)
        self._mean = features.mean(0, dtype=np.float64)
        self._scale = np.maximum(features.std(0, dtype=np.float64), SMALLEST_SCALE)
        x = ((features - self._mean) / self._scale).astype(np.float32)
        counts = gold.sum(0).astype(np.float64)
        sums = (gold.T.astype(np.float32) @ x).astype(np.float64)
        means = sums / np.maximum(counts, 1)[:, None]  # a class without a row is in the middle
        within = (x.T @ x).astype(np.float64) - (means * counts[:, None]).T @ means
        values, self._axes = np.linalg.eigh(within / n)
        self._variances = np.maximum(values, 0)
        self._means = means @ self._axes  # (C, D), along the axes
        prior = np.maximum(counts, PRIOR_ROWS)
        if task.balanced:
            prior = np.where(counts > 0, 1.0, PRIOR_ROWS / n)
        self._log_prior = np.log(prior / prior.sum())

    def head(self, kind: HeadKind) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight (C, D) and bias (C,) for the features as they are."""
        average = max(float(self._variances.mean()), SMALLEST_SCALE)
        precision = 1 / ((1 - kind.shrinkage) * self._variances + kind.shrinkage * average)
        means, along = self._means, self._means * precision
        if kind.is_ordinal:
            # Along the direction that tells a class's number: of each class its mean there, beside
            # the variance that all have in common.
            prior, numbers = np.exp(self._log_prior), np.arange(len(means))
            direction = (prior * (numbers - prior @ numbers)) @ along
            variance = max(float((direction**2 / precision).sum()), SMALLEST_SCALE**2)
            places = means @ direction
            along = np.outer(places / variance, direction)
            bias = self._log_prior - 0.5 * places**2 / variance
        else:
            bias = self._log_prior - 0.5 * (means * along).sum(1)
        weight = (along @ self._axes.T) / self._scale
        bias = bias - weight @ self._mean
        return weight.astype(np.float32), bias.astype(np.float32)


def out_of_fold_logits(
    features: NDArray[np.float32],
    gold: NDArray[np.bool_],
    task: Task,
    folds: Sequence[NDArray[np.int64]],
    kinds: Sequence[HeadKind],
) -> dict[HeadKind, Matrix]:
    """Logits (N, C) of each row by a head that was not fitted to it, for each kind of head.

    Args:
        features, gold, task: as for `Discriminant`.
        folds: rows that are left out together.
        kinds: to try.
    """
    found = {kind: np.zeros(gold.shape) for kind in kinds}
    for fold in folds:
        train = np.setdiff1d(np.arange(len(features)), fold)
        fitted = Discriminant(features[train], gold[train], task)
        for kind, logits in found.items():
            weight, bias = fitted.head(kind)
            logits[fold] = features[fold] @ weight.T + bias
    return found
