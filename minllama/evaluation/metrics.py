"""Metrics of predictions: accuracy, F1, calibration, and their confidence intervals.

Takes probabilities and gold labels, returns plain numbers.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from minllama.errors import MinllamaError, optional_import
from minllama.evaluation import registry
from minllama.evaluation.bootstrap import ScoredRows, intervals
from minllama.evaluation.ranking import Ranking, mean_of_defined
from minllama.evaluation.thresholds import DEFAULT, Thresholds, positive_class

CALIBRATION_BINS = 15  # as many as Guo et al. 2017
SUM_TOLERANCE = 1e-3  # tolerance of the sum of a row's float32 probabilities
# A probability of zero would have infinite loss; scikit-learn also clips float32 here.
SMALLEST = float(np.finfo(np.float32).eps)

Label: TypeAlias = int | Sequence[int] | None  # None or -1: unlabeled


@dataclass(frozen=True)
class ClassMetrics:
    """The metrics of one class; the first three are `None` if it is neither gold nor predicted."""

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int  # rows with this gold label
    predicted: int  # rows with this prediction
    # One against the rest; None if all rows or none have the class.
    roc_auc: float | None = None
    average_precision: float | None = None
    threshold: float | None = None  # None: the most likely class is predicted


@dataclass(frozen=True)
class CalibrationBin:
    """The predictions with a confidence in (low, high]; `None` if there are none."""

    low: float
    high: float
    count: int
    confidence: float | None  # their mean
    accuracy: float | None  # fraction of correct predictions


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of one set of predictions.

    Macro averages are over the classes that occur, as gold labels or as predictions: what
    scikit-learn does by default. In a multi-label task `accuracy` is the fraction of rows with the
    exact label set, and log-loss, Brier score and calibration treat each (row, label) pair as a
    binary prediction.

    ROC AUC and average precision follow scikit-learn: for two classes, of the positive one; for
    more, the mean over classes (one-vs-rest, macro), defined if each class has rows. In a
    multi-label task they are the mean over labels that some rows have and others do not.
    """

    label_names: tuple[str, ...]
    multi_label: bool
    count: int  # rows
    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    micro_f1: float  # equals accuracy if each row has one label
    log_loss: float  # nats
    brier: float  # 0 to 2: summed over classes; multi-label: 0 to 1, the mean over labels
    calibration_error: float  # expected calibration error, 0 to 1
    # 95% intervals of accuracy, macro_f1, micro_f1, log_loss and brier, or nothing.
    intervals: dict[str, tuple[float, float]]
    per_class: tuple[ClassMetrics, ...]
    # Rows. (C, C): gold by predicted. Multi-label: (C, 2, 2), each label's gold by predicted.
    confusion: NDArray[np.int64]
    bins: tuple[CalibrationBin, ...]
    roc_auc: float | None
    average_precision: float | None
    positive: str | None  # the positive class of two
    rows: ScoredRows = dataclasses.field(repr=False)  # for comparisons; not in `to_dict`
    further: dict[str, float | None]  # the registry's other metrics

    def value(self, metric: str) -> float | None:
        """A metric by its name; None where it is undefined."""
        return registry.value_of(self, metric)

    def to_dict(self) -> dict[str, Any]:
        """Everything except the rows, as plain values for JSON."""
        names = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("rows", "further")
        ]
        fields = {name: getattr(self, name) for name in names}
        fields["label_names"] = list(self.label_names)
        fields["intervals"] = {name: list(ends) for name, ends in self.intervals.items()}
        fields["per_class"] = [dataclasses.asdict(metrics) for metrics in self.per_class]
        fields["confusion"] = self.confusion.tolist()
        fields["bins"] = [dataclasses.asdict(bin_) for bin_ in self.bins]
        return fields | self.further


def evaluate(
    probabilities: NDArray[np.floating[Any]],
    labels: Sequence[Label],
    label_names: Sequence[str],
    *,
    multi_label: bool = False,
    thresholds: Thresholds | None = None,
    predicted: NDArray[np.bool_] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Compare predictions with gold labels.

    Args:
        probabilities: (N, C); each row sums to one, unless `multi_label`.
        labels: N classes, or for `multi_label` N collections of classes; 0 to C - 1.
        label_names: C different names.
        multi_label: rows may have any number of labels.
        thresholds: at which labels are predicted, and the positive class; None for the most likely
            class, or each label with at least 0.5.
        predicted: (N, C), true where the class is predicted, if already known.
        bootstrap: number of resamples for the 95% intervals; 0 for no intervals.
        seed: of those draws.

    Raises:
        MinllamaError: there are no rows, or rows without a label; probabilities are invalid;
            scikit-learn is missing.
    """
    probabilities = checked_probabilities(probabilities, len(label_names), multi_label=multi_label)
    gold = _gold(labels, probabilities.shape, multi_label=multi_label)  # (N, C)
    if predicted is None:
        predicted = predictions(probabilities, multi_label=multi_label, thresholds=thresholds)
    losses = _log_losses(probabilities, gold, multi_label=multi_label)  # (N,)
    briers = _brier_scores(probabilities, gold, multi_label=multi_label)  # (N,)
    bins = _bins(probabilities, gold, multi_label=multi_label)
    positive, ranked = _ranked_columns(label_names, thresholds, gold, multi_label=multi_label)
    ranks = probabilities[:, ranked], gold[:, ranked]
    rows = ScoredRows(gold, predicted, losses, briers, *ranks, bootstrap, seed)
    per_class = _per_class(gold, predicted, label_names)
    if multi_label or len(label_names) > 1:
        per_class = _with_ranking(per_class, probabilities, gold, thresholds, multi_label)
    return _measured(
        rows,
        per_class,
        bins,
        multi_label=multi_label,
        positive=None if positive is None else label_names[positive],
    )


def _measured(
    rows: ScoredRows,
    per_class: tuple[ClassMetrics, ...],
    bins: tuple[CalibrationBin, ...],
    *,
    multi_label: bool,
    positive: str | None,
) -> Evaluation:
    """The metrics of rows, given the metrics of classes and the calibration."""
    gold, predicted = rows.gold, rows.predicted
    occurring = [metrics for metrics in per_class if metrics.f1 is not None]
    hits, sizes = (gold & predicted).sum(), gold.sum() + predicted.sum()
    roc_auc, average_precision = Ranking(rows.ranked, rows.ranked_gold).measured()
    return Evaluation(
        label_names=tuple(metrics.name for metrics in per_class),
        multi_label=multi_label,
        count=len(gold),
        accuracy=float(rows.right.mean()),
        macro_precision=_mean([metrics.precision for metrics in occurring]),
        macro_recall=_mean([metrics.recall for metrics in occurring]),
        macro_f1=_mean([metrics.f1 for metrics in occurring]),
        micro_f1=float(2 * hits / max(sizes, 1)),
        log_loss=float(rows.losses.mean()),
        brier=float(rows.briers.mean()),
        calibration_error=calibration_error(bins),
        intervals=intervals(rows),
        per_class=per_class,
        confusion=_confusion(gold, predicted, multi_label=multi_label),
        bins=bins,
        roc_auc=mean_of_defined(roc_auc),
        average_precision=mean_of_defined(average_precision),
        positive=positive,
        rows=rows,
        further=registry.computed(regression=False, arguments=(rows,)),
    )


def predictions(
    probabilities: NDArray[np.floating[Any]],
    *,
    multi_label: bool = False,
    thresholds: Thresholds | None = None,
) -> NDArray[np.bool_]:
    """The predictions: the most likely class (the first of equals), or each label with at least
    0.5.

    Args:
        probabilities: (N, C).
        multi_label: rows may have any number of labels.
        thresholds: from which probability on labels are predicted instead.

    Returns:
        (N, C), true where the class is predicted.
    """
    if thresholds is not None:
        return thresholds.predictions(probabilities)
    if multi_label:
        return np.asarray(probabilities >= DEFAULT)
    return np.asarray(np.arange(probabilities.shape[1]) == probabilities.argmax(1)[:, None])


def _bins(
    probabilities: NDArray[np.float64], gold: NDArray[np.bool_], *, multi_label: bool
) -> tuple[CalibrationBin, ...]:
    """Calibration of each label's probability, or of that of the most likely class."""
    if multi_label:
        return calibration_bins(probabilities.ravel(), gold.ravel())
    likeliest = gold[np.arange(len(gold)), probabilities.argmax(1)]
    return calibration_bins(probabilities.max(1), likeliest)


def calibration_bins(
    confidences: NDArray[np.floating[Any]],
    correct: NDArray[np.bool_],
    *,
    bins: int = CALIBRATION_BINS,
) -> tuple[CalibrationBin, ...]:
    """Predictions in bins of equal width by confidence: the reliability diagram's bars.

    Args:
        confidences: (N,), in 0 to 1.
        correct: (N,), whether the prediction is correct.
        bins: their number; each includes its upper edge, the first one also zero.
    """
    bin_indices = np.clip(
        np.ceil(confidences.astype(np.float64) * bins).astype(np.int64) - 1, 0, None
    )
    counts = np.bincount(bin_indices, minlength=bins)
    confidence = np.bincount(bin_indices, weights=confidences, minlength=bins) / np.maximum(
        counts, 1
    )
    accuracy = np.bincount(bin_indices, weights=correct, minlength=bins) / np.maximum(counts, 1)
    return tuple(
        CalibrationBin(
            low=i / bins,
            high=(i + 1) / bins,
            count=int(counts[i]),
            confidence=float(confidence[i]) if counts[i] else None,
            accuracy=float(accuracy[i]) if counts[i] else None,
        )
        for i in range(bins)
    )


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): mean |accuracy - confidence|, 0 to 1."""
    gaps = [
        bin_.count * abs(bin_.accuracy - bin_.confidence)
        for bin_ in bins
        if bin_.accuracy is not None and bin_.confidence is not None
    ]
    return sum(gaps) / max(sum(bin_.count for bin_ in bins), 1)


def checked_probabilities(
    probabilities: NDArray[np.floating[Any]], classes: int, *, multi_label: bool
) -> NDArray[np.float64]:
    """Check (N, classes) probabilities, and return them in float64."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or probabilities.shape[1] != classes:
        raise MinllamaError(
            f"cannot evaluate: probabilities of shape {probabilities.shape} do not fit {classes} "
            "label names; give one row per text and one column per name"
        )
    not_finite = ~np.isfinite(probabilities).all(1)
    if not_finite.any():
        raise MinllamaError(
            f"cannot evaluate: {_rows(not_finite)} a probability that is not a finite number; the "
            "model has diverged: train it with a lower learning rate, or in float32"
        )
    outside = np.any((probabilities < 0) | (probabilities > 1 + SUM_TOLERANCE), axis=1)
    if outside.any():
        raise MinllamaError(
            f"cannot evaluate: {_rows(outside)} a probability outside 0 to 1; "
            "give the softmax (multi-label: the sigmoid) of the logits"
        )
    off = np.asarray(np.abs(probabilities.sum(1) - 1) > SUM_TOLERANCE)
    if off.any() and not multi_label:
        raise MinllamaError(
            f"cannot evaluate: {_rows(off)} probabilities that do not sum to one; give the "
            "softmax of the logits, or set multi_label for independent labels"
        )
    return np.asarray(np.minimum(probabilities, 1.0))


def is_labelled(label: Label) -> bool:
    """Whether a label is given; an empty collection means no labels."""
    return label is not None and not (isinstance(label, int | np.integer) and label < 0)


def _gold(
    labels: Sequence[Label], shape: tuple[int, ...], *, multi_label: bool
) -> NDArray[np.bool_]:
    """(N, C), true if the class is a gold label."""
    rows, classes = shape
    if len(labels) != rows:
        raise MinllamaError(
            f"cannot evaluate: {len(labels)} labels for {rows} rows of probabilities; give one "
            "label per row"
        )
    if rows == 0:
        raise MinllamaError("cannot evaluate: there are no rows; give at least one labeled row")
    unlabelled = np.array([not is_labelled(label) for label in labels])
    if unlabelled.any():
        raise MinllamaError(
            f"cannot evaluate: {_rows(unlabelled)} no label; remove such rows, or only predict "
            "their labels"
        )
    gold = np.zeros((rows, classes), dtype=np.bool_)
    for i, ids in enumerate(labels):
        for id_ in ids if multi_label else (ids,):  # type: ignore[union-attr]
            if not isinstance(id_, int | np.integer) or not 0 <= id_ < classes:
                raise MinllamaError(
                    f"cannot evaluate: row {i + 1} has the label {id_!r}, but the {classes} "
                    f"classes are numbered 0 to {classes - 1}; give each label by its number"
                )
            gold[i, id_] = True
    return gold


def _rows(wrong: NDArray[np.bool_]) -> str:
    """`row 3 has`, `2 of 10 rows (the first is row 3) have`."""
    first = int(wrong.argmax()) + 1
    if wrong.sum() == 1:
        return f"row {first} has"
    return f"{wrong.sum()} of {len(wrong)} rows (the first is row {first}) have"


def _mean(values: Sequence[float | None]) -> float:
    return sum(value for value in values if value is not None) / max(len(values), 1)


def _log_losses(
    probabilities: NDArray[np.float64], gold: NDArray[np.bool_], *, multi_label: bool
) -> NDArray[np.float64]:
    """(N,) nats: of the gold class, or the mean over the labels' yes-or-no predictions."""
    clipped = np.clip(probabilities, SMALLEST, 1 - SMALLEST)
    if multi_label:
        return np.asarray(-np.log(np.where(gold, clipped, 1 - clipped)).mean(1))
    return np.asarray(-np.log(clipped[gold]))


def _brier_scores(
    probabilities: NDArray[np.float64], gold: NDArray[np.bool_], *, multi_label: bool
) -> NDArray[np.float64]:
    """(N,): squared errors, summed over classes (Brier 1950), or their mean over labels."""
    squares = (probabilities - gold) ** 2
    return np.asarray(squares.mean(1) if multi_label else squares.sum(1))


def _confusion(
    gold: NDArray[np.bool_], predicted: NDArray[np.bool_], *, multi_label: bool
) -> NDArray[np.int64]:
    """(C, C) counts by gold and predicted class; multi-label: (C, 2, 2), one table per label."""
    from sklearn.metrics import confusion_matrix

    if multi_label:  # not multilabel_confusion_matrix, which reads a single column as two classes
        pairs = zip(gold.T, predicted.T, strict=True)
        return np.array([confusion_matrix(*pair, labels=[False, True]) for pair in pairs])
    classes = gold.shape[1]
    if classes == 1:  # scikit-learn would warn
        return np.array([[len(gold)]])
    table = confusion_matrix(gold.argmax(1), predicted.argmax(1), labels=range(classes))
    return np.asarray(table, dtype=np.int64)


def _per_class(
    gold: NDArray[np.bool_], predicted: NDArray[np.bool_], names: Sequence[str]
) -> tuple[ClassMetrics, ...]:
    """With scikit-learn, label by label: it would read a one-column matrix as two classes."""
    sklearn = optional_import("sklearn.metrics", "evaluation needs")
    of_label = [
        sklearn.precision_recall_fscore_support(*pair, labels=[True], average=None, zero_division=0)
        for pair in zip(gold.T, predicted.T, strict=True)
    ]
    precision, recall, f1, support = np.array(of_label)[:, :, 0].T  # (C,) each
    guesses = predicted.sum(0)
    return tuple(
        ClassMetrics(
            name=name,
            precision=float(precision[i]) if support[i] + guesses[i] else None,
            recall=float(recall[i]) if support[i] + guesses[i] else None,
            f1=float(f1[i]) if support[i] + guesses[i] else None,
            support=int(support[i]),
            predicted=int(guesses[i]),
        )
        for i, name in enumerate(names)
    )


def _ranked_columns(
    names: Sequence[str],
    thresholds: Thresholds | None,
    gold: NDArray[np.bool_],
    *,
    multi_label: bool,
) -> tuple[int | None, list[int]]:
    """The positive class of two, and the classes with ranking metrics: (N, C) gold labels."""
    if multi_label:
        return None, list(range(len(names)))
    if len(names) > 2:  # a mean over some of the classes would be a different metric
        return None, list(range(len(names))) if gold.any(0).all() else []
    positive = positive_class(names, None, multi_label=False)
    if positive is not None and thresholds is not None:
        positive = thresholds.positive
    return positive, [] if positive is None else [positive]


def _with_ranking(
    per_class: Sequence[ClassMetrics],
    probabilities: NDArray[np.float64],
    gold: NDArray[np.bool_],
    thresholds: Thresholds | None,
    multi_label: bool,
) -> tuple[ClassMetrics, ...]:
    """The metrics of each class with its ROC AUC, average precision and threshold."""
    names = [metrics.name for metrics in per_class]
    by_label = {} if thresholds is None else thresholds.by_label(names)
    measured = np.stack(Ranking(probabilities, gold).measured())  # (2, C)
    pairs = [(None, None) if np.isnan(pair[0]) else pair for pair in measured.T.tolist()]
    return tuple(
        dataclasses.replace(
            metrics,
            roc_auc=roc_auc,
            average_precision=average_precision,
            threshold=by_label.get(metrics.name, DEFAULT if multi_label else None),
        )
        for metrics, (roc_auc, average_precision) in zip(per_class, pairs, strict=True)
    )
