"""Regression: scaling of targets, metrics, and baselines without a Llama."""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from minllama.errors import MinllamaError, optional_import
from minllama.evaluation import registry
from minllama.evaluation.bootstrap import INTERVAL

Values = NDArray[np.float64]

METRICS = registry.metrics(regression=True)
LARGEST_TARGET = 1e100  # sums of squares of such values still fit into a float
RIDGE_PENALTY = 1.0  # of |w|^2 relative to the summed squared errors, as in Ridge


@dataclass(frozen=True)
class TargetScale:
    """The scale of a head's output: value = mean + std * output.

    Attributes:
        mean, std: of the training targets; 0 and 1 for a head that predicts values directly.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        limit = LARGEST_TARGET
        if not (abs(self.mean) <= limit and 0 < self.std <= limit):  # false for NaN, too
            raise ValueError(f"a scale cannot have mean {self.mean} and std {self.std}"[:200])

    @classmethod
    def of(cls, targets: Sequence[float]) -> Self:
        """The scale on which targets have mean 0 and standard deviation 1 (0 if all are equal)."""
        values = np.asarray(targets, dtype=np.float64)
        largest = float(np.abs(values).max(initial=0.0)) or 1.0
        # Divided first: squares of large numbers would overflow.
        std = float((values / largest).std()) * largest
        return cls(float((values / largest).mean() * largest), std or 1.0)

    def standardized(self, targets: Sequence[float] | Values) -> Values:
        """Targets in the scale of the head's output."""
        return (np.asarray(targets, dtype=np.float64) - self.mean) / self.std

    def values(self, outputs: NDArray[np.floating[Any]]) -> Values:
        """A head's output, in the unit of the targets."""
        return self.mean + self.std * np.asarray(outputs, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class RegressionEvaluation:
    """The metrics of a regression, in the unit of the targets.

    Attributes:
        count: of the rows.
        mae: mean absolute error.
        rmse: root of the mean squared error.
        r2: the explained fraction of the targets' variance; None if all targets are equal.
        pearson, spearman: correlation of values, and of their ranks; None if predictions or targets
            are all equal.
        target_mean, target_std: of the rows' targets.
        intervals: metric -> 95% interval, or nothing.
        difference: for another system: its mean absolute error minus the classifier's, with the
            paired 95% interval; None if not compared.
        further: metrics of the registry that are not fields.
    """

    count: int
    mae: float
    rmse: float
    r2: float | None
    pearson: float | None
    spearman: float | None
    target_mean: float
    target_std: float
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    difference: tuple[float, float, float] | None = None
    further: dict[str, float | None] = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """A metric by its name; None where it is undefined."""
        return registry.value_of(self, metric)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        values = dataclasses.asdict(self)
        values["intervals"] = {name: list(ends) for name, ends in self.intervals.items()}
        del values["further"]
        return {**values, **self.further}


def evaluate_regression(
    predicted: NDArray[np.floating[Any]],
    targets: Sequence[float] | Values,
    *,
    own: NDArray[np.floating[Any]] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> RegressionEvaluation:
    """Compare predicted numbers with targets.

    Args:
        predicted: (N,), in the unit of the targets.
        targets: N finite numbers.
        own: (N,), predictions to compare with, row by row.
        bootstrap: number of resamples for the 95% intervals; 0 for no intervals.
        seed: of those draws.

    Raises:
        MinllamaError: there are no rows, different numbers of each, or non-finite values.
    """
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if p.shape != y.shape or p.ndim != 1:
        raise MinllamaError(
            f"cannot evaluate: predictions of shape {p.shape} do not fit {len(y)} targets; give "
            "one number per row"
        )
    if not len(y):
        raise MinllamaError("cannot evaluate: there are no rows; give at least one with a target")
    for what, values in (("a prediction", p), ("a target", y)):
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).argmax()) + 1
            raise MinllamaError(
                f"cannot evaluate: row {row} has {what} that is not a finite number"
            )
    rows = _Rows(p, y)
    metrics = rows.metrics(np.ones(len(y)))
    return RegressionEvaluation(
        count=len(y),
        target_mean=float(y.mean()),
        target_std=float(y.std()),
        intervals=_intervals(rows, metrics, bootstrap, seed) if bootstrap else {},
        difference=None if own is None else _difference(own, p, y, bootstrap, seed),
        mae=metrics["mae"] or 0.0,
        rmse=metrics["rmse"] or 0.0,
        r2=metrics["r2"],
        pearson=metrics["pearson"],
        spearman=metrics["spearman"],
        further={name: metrics[name] for name in metrics if METRICS[name].compute is not None},
    )


class _Rows:
    """Predictions and targets (N,), and their metrics for weighted rows."""

    def __init__(self, p: Values, y: Values) -> None:
        order = np.argsort(p, kind="stable")  # sequential reads are faster
        p, y = p[order], y[order]
        self.n, self._p, self._y = len(y), p, y
        # The index of each value among the distinct ones, which determines ranks in any draw.
        self._value_indices = [np.unique(values, return_inverse=True)[1] for values in (p, y)]
        errors = p - y
        self._unit_of_y = _unit(y)
        p, y = (p - p.mean()) / _unit(p), (y - y.mean()) / self._unit_of_y
        # Sums over a draw are one product with the rows' counts.
        columns = (np.abs(errors), errors**2, p, p**2, y, y**2, p * y)
        self._columns = np.stack(columns, axis=1)

    def metrics(self, counts: Values) -> dict[str, float | None]:
        """All metrics of N rows; None for undefined ones."""
        n = self.n
        absolute, squared, *moments = (counts @ self._columns).tolist()
        drawn_counts = [
            np.bincount(value_indices, weights=counts) for value_indices in self._value_indices
        ]
        p_varies, y_varies = (np.count_nonzero(drawn) > 1 for drawn in drawn_counts)
        p_scatter, y_scatter, shared = _scatters(n, *moments)
        varies = p_varies and y_varies
        return {
            "mae": absolute / n,
            "rmse": math.sqrt(squared / n),
            "r2": self._r2(squared, y_scatter) if y_varies else None,
            "pearson": _share(shared, p_scatter, y_scatter) if varies else None,
            "spearman": self._spearman(counts, drawn_counts) if varies else None,
            **self._further(counts),
        }

    def _further(self, counts: Values) -> dict[str, float | None]:
        """The metrics that cannot be computed from sums; usually none."""
        if not any(metric.compute for metric in METRICS.values()):
            return {}
        drawn = np.repeat(np.arange(self.n), counts.astype(np.int64))
        return registry.computed(regression=True, arguments=(self._p[drawn], self._y[drawn]))

    def _r2(self, squared: float, scatter: float) -> float | None:
        scatter *= self._unit_of_y**2
        return 1 - squared / scatter if scatter else None

    def _spearman(self, counts: Values, drawn_counts: list[NDArray[Any]]) -> float:
        """Pearson's correlation of ranks, whose mean is (N + 1) / 2 in any resample."""
        middle = (self.n + 1) / 2
        ranked = [_ranks_of_counts(drawn) - middle for drawn in drawn_counts]
        rows = [
            ranks[value_indices]
            for ranks, value_indices in zip(ranked, self._value_indices, strict=True)
        ]
        scatters = (
            float(drawn @ ranks**2) for drawn, ranks in zip(drawn_counts, ranked, strict=True)
        )
        return _share(float((counts * rows[0]) @ rows[1]), *scatters)


def _unit(values: Values) -> float:
    """The factor that scales the largest deviation from the mean to 1; 1 without deviation."""
    return float(np.abs(values - values.mean()).max()) or 1.0


def _scatters(
    n: int, p: float, pp: float, y: float, yy: float, py: float
) -> tuple[float, float, float]:
    """Sums of squared deviations of p and of y, and of their products, from sums over n rows."""
    return max(pp - p * p / n, 0.0), max(yy - y * y / n, 0.0), py - p * y / n


def _share(shared: float, a: float, b: float) -> float:
    """A correlation, from sums of deviations' products."""
    norm = math.sqrt(a) * math.sqrt(b)
    return min(max(shared / norm, -1.0), 1.0) if norm else 0.0


def _ranks_of_counts(counts: NDArray[Any]) -> Values:
    """The mean rank of each value, given the counts of values in ascending order."""
    return np.asarray(np.cumsum(counts) - (counts - 1) / 2, dtype=np.float64)


def ranks(values: Values) -> Values:
    """(N,), 1 for the least; equal values share the mean of their ranks."""
    _, value_indices, counts = np.unique(values, return_inverse=True, return_counts=True)
    return _ranks_of_counts(counts)[value_indices]


def _draws(n: int, rounds: int, seed: int) -> Iterator[Values]:
    """The row counts of resamples of n rows."""
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        yield np.bincount(random.integers(n, size=n), minlength=n).astype(np.float64)


def _intervals(
    rows: _Rows, metrics: Mapping[str, float | None], rounds: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap over rows (Efron & Tibshirani 1993, ch. 13).

    A resample for which a metric is undefined still counts for the others; a metric that is
    undefined for all rows, or for half of the resamples, has no interval.
    """
    drawn: dict[str, list[float]] = {name: [] for name in metrics}
    for counts in _draws(rows.n, rounds, seed):
        for name, value in rows.metrics(counts).items():
            if value is not None:
                drawn[name].append(value)
    ends = {
        name: np.quantile(values, INTERVAL)
        for name, values in drawn.items()
        if metrics[name] is not None and 2 * len(values) > rounds
    }
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def _difference(
    own: NDArray[np.floating[Any]], p: Values, y: Values, rounds: int, seed: int
) -> tuple[float, float, float]:
    """The mean difference of absolute errors, p's minus `own`'s, and its 95% interval.

    Both systems use the same resampled rows, so rows that are hard for both do not affect the
    difference.
    """
    gains = np.abs(p - y) - np.abs(np.asarray(own, dtype=np.float64) - y)
    means = [float(counts @ gains) / len(y) for counts in _draws(len(y), rounds, seed)]
    low, high = np.quantile(means, INTERVAL) if means else (gains.mean(), gains.mean())
    return float(gains.mean()), float(low), float(high)


class ValueBaseline(Protocol):
    """A baseline that predicts numbers for texts after fitting."""

    @property
    def name(self) -> str:
        """Its name for display."""

    def predict_values(self, texts: Sequence[str]) -> Values:
        """(N,), in the unit of the targets."""


def fit_value_baselines(texts: Sequence[str], targets: Sequence[float]) -> list[ValueBaseline]:
    """Fit every baseline.

    Args:
        texts: N training texts.
        targets: N numbers.

    Raises:
        MinllamaError: there are no texts, or scikit-learn is missing.
    """
    if not texts:
        raise MinllamaError("cannot fit baselines: there are no training texts; give at least one")
    return [MeanBaseline(targets), RidgeBaseline(texts, targets)]


class MeanBaseline:
    """Predicts the mean of the training targets."""

    name = "mean of the training rows"

    def __init__(self, targets: Sequence[float]) -> None:
        self._mean = TargetScale.of(targets).mean

    def predict_values(self, texts: Sequence[str]) -> Values:
        return np.full(len(texts), self._mean)


class RidgeBaseline:
    """Ridge regression on sublinear TF-IDF of words and pairs of words."""

    name = "TF-IDF + ridge"

    def __init__(self, texts: Sequence[str], targets: Sequence[float]) -> None:
        of_text = optional_import("sklearn.feature_extraction.text", "baselines need")
        from sklearn.linear_model import Ridge

        self._scale = TargetScale.of(targets)
        self._vectorizer = of_text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        words_of = self._vectorizer.build_analyzer()
        self._ridge: Any = None
        if any(words_of(text) for text in texts):
            features = self._vectorizer.fit_transform(texts)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about an uninformative matrix
                self._ridge = Ridge(alpha=RIDGE_PENALTY).fit(
                    features, self._scale.standardized(targets)
                )

    def predict_values(self, texts: Sequence[str]) -> Values:
        if self._ridge is None or not texts:
            return self._scale.values(np.zeros(len(texts)))
        return self._scale.values(self._ridge.predict(self._vectorizer.transform(texts)))
