"""Measure the rungs of `--method auto` on rows that they were not fitted to, and compare them.

Rows are those of the training split and then those of dev, R in all. A rung gives scores for those
on which it could be measured, and NaN for the others.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from minllama.classification.base import probabilities
from minllama.classification.calibration import fit_temperature
from minllama.data import Dataset
from minllama.evaluation.metrics import Evaluation, evaluate
from minllama.evaluation.paired import compare
from minllama.evaluation.registry import METRICS
from minllama.evaluation.regression import TargetScale, evaluate_regression
from minllama.experiment.ladder.choice import Gain

Scores = NDArray[np.float32]
WIDTH = 2 * 1.959964  # standard errors in a 95% interval
OF_FRACTIONS = ("accuracy", "macro_f1", "micro_f1")  # metrics whose differences are in points


class Result(NamedTuple):
    """A metric on the measured rows, with its 95% interval."""

    value: float
    interval: tuple[float, float] | None
    rows: int


class Scoring(Protocol):
    """What a metric says about scores, (R, C)."""

    metric: str

    def result(self, scores: Scores) -> Result:
        """The metric on all measured rows."""

    def gain(self, one: Scores, other: Scores) -> Gain:
        """By how much one is better than another, on the rows where both were measured."""

    def loss_gain(self, one: Scores, other: Scores) -> Gain:
        """By how much lower its loss is, calibrated, on these rows."""


def scoring_of(parts: Sequence[Dataset], metric: str) -> Scoring:
    """The scoring of the rows of data sets, one after the other, by a metric."""
    first = parts[0]
    if first.has_numbers:
        return ValueScoring(first, [target for part in parts for target in part.targets], metric)
    labels = [label for part in parts for label in part.labels or ()]
    return ClassScoring(labels, first.label_names, metric, multi_label=first.multi_label)


def measured_rows(scores: Scores) -> NDArray[np.bool_]:
    """(R,): which rows have scores."""
    return np.asarray(~np.isnan(scores).any(1))


class ClassScoring:
    """Of classes. For metrics of probabilities, a temperature is fitted to each rung's scores."""

    def __init__(
        self, labels: Sequence[Any], label_names: Sequence[str], metric: str, *, multi_label: bool
    ) -> None:
        self._labels, self._names, self.metric = list(labels), list(label_names), metric
        self._multi_label = multi_label

    def result(self, scores: Scores) -> Result:
        rows = np.flatnonzero(measured_rows(scores))
        evaluation = self._evaluation(scores, rows, bootstrap=1000)
        value = evaluation.value(self.metric)
        interval = evaluation.intervals.get(self.metric)
        return Result(math.nan if value is None else float(value), interval, len(rows))

    def gain(self, one: Scores, other: Scores) -> Gain:
        rows = np.flatnonzero(measured_rows(one) & measured_rows(other))
        if not len(rows):
            return Gain(0.0, math.inf, 0)
        first, second = (self._evaluation(scores, rows) for scores in (one, other))
        if self.metric == "accuracy":
            difference = first.rows.right.astype(np.float64) - second.rows.right
            return _mean_gain(difference)
        found = compare(first, second).differences.get(self.metric)
        if found is None:  # undefined for these rows
            return Gain(0.0, math.inf, len(rows))
        sign = -1 if _less_is_better(self.metric) else 1
        return Gain(sign * found.value, (found.high - found.low) / WIDTH, len(rows))

    def loss_gain(self, one: Scores, other: Scores) -> Gain:
        rows = np.flatnonzero(measured_rows(one) & measured_rows(other))
        if not len(rows):
            return Gain(0.0, math.inf, 0)
        first, second = (
            self._evaluation(scores, rows, calibrated=True).rows.losses for scores in (one, other)
        )
        return _mean_gain(second - first)

    def _evaluation(
        self,
        scores: Scores,
        rows: NDArray[np.int64],
        *,
        bootstrap: int = 0,
        calibrated: bool = False,
    ) -> Evaluation:
        measured = np.ascontiguousarray(scores[rows])
        labels = [self._labels[row] for row in rows]
        temperature = 1.0
        if calibrated or self.metric not in OF_FRACTIONS:
            temperature = fit_temperature(measured, labels, multi_label=self._multi_label)
        return evaluate(
            probabilities(measured, temperature, multi_label=self._multi_label),
            labels,
            self._names,
            multi_label=self._multi_label,
            bootstrap=bootstrap,
        )


class ValueScoring:
    """Of numbers: by squared errors, or by absolute ones for the metric mae."""

    def __init__(self, train: Dataset, labels: Sequence[float], metric: str) -> None:
        self._scale = TargetScale.of(train.targets)
        self._targets, self.metric = np.asarray(labels, dtype=np.float64), metric

    def result(self, scores: Scores) -> Result:
        rows = measured_rows(scores)
        values = self._scale.values(scores[rows, 0])
        evaluation = evaluate_regression(values, self._targets[rows])
        value = evaluation.value(self.metric)
        interval = evaluation.intervals.get(self.metric)
        return Result(math.nan if value is None else float(value), interval, int(rows.sum()))

    def gain(self, one: Scores, other: Scores) -> Gain:
        rows = measured_rows(one) & measured_rows(other)
        if not rows.any():
            return Gain(0.0, math.inf, 0)
        return _mean_gain(self._losses(other, rows) - self._losses(one, rows))

    def loss_gain(self, one: Scores, other: Scores) -> Gain:
        return self.gain(one, other)  # which is one of losses

    def _losses(self, scores: Scores, rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The losses of rows, in standard deviations of the targets."""
        away = np.abs(self._scale.values(scores[rows, 0]) - self._targets[rows]) / self._scale.std
        return np.asarray(away if self.metric == "mae" else away**2, dtype=np.float64)


def _mean_gain(differences: NDArray[np.float64]) -> Gain:
    n = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Gain(float(differences.mean()), error, n)


def _less_is_better(metric: str) -> bool:
    return {known.name: known for known in METRICS}[metric].less_is_better
