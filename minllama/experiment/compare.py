"""Evaluate another system on the same rows, for a comparison row by row.

The other system is a saved classifier, or a file of its predictions.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from minllama.classification.base import Classifier, probabilities
from minllama.classification.storage.manifest import CLASSIFIER_FILE
from minllama.classification.storage.save_load import load_classifier_with
from minllama.data import Dataset
from minllama.data.class_names import same_classes
from minllama.errors import DataError, MinllamaError
from minllama.evaluation.metrics import Evaluation, evaluate, predictions
from minllama.evaluation.report.files import PREDICTIONS_FILE
from minllama.evaluation.thresholds import DEFAULT, Thresholds
from minllama.options.loading import LoadOptions
from minllama.text import listed

Predicted: TypeAlias = tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]
Progress: TypeAlias = Callable[[int], None] | None
REMEDY = "compare on the file that they were made from, or name the classifier's folder"


@dataclass(frozen=True, eq=False)
class ComparedSystem:
    """Another system that has been opened and found to be comparable.

    Attributes:
        name: the folder or file.
        predict: how many more texts are done -> (N, C) probabilities and what is predicted, in the
            order of the rows and label names that it will be compared on.
    """

    name: str
    predict: Callable[[Progress], Predicted]

    def evaluate(
        self, split: Dataset, own: Evaluation, *, seed: int = 0, progress: Progress = None
    ) -> Evaluation:
        """Its evaluation on the rows of `split`, with the positive class of `own`."""
        assert split.labels is not None
        p, predicted = self.predict(progress)
        decision = None
        if own.positive is not None:
            decision = Thresholds((DEFAULT,), split.label_names.index(own.positive))
        return evaluate(
            p,
            split.labels,
            split.label_names,
            multi_label=split.multi_label,
            thresholds=decision,
            predicted=predicted,
            seed=seed,
        )


def open_compared(other: str, split: Dataset, *, loading: LoadOptions) -> ComparedSystem:
    """Open the other system for the rows of `split`.

    Args:
        other: the folder of a classifier or of a report, or a file of predictions: lines of JSON as
            `evaluate`, `train` and `classify` write them.
        split: the rows, with labels as ids of its `label_names`.
        loading: how a classifier is opened.

    Raises:
        MinllamaError: it cannot be opened, or its classes or texts differ.
    """
    path = Path(other)
    if path.is_dir() and not (path / CLASSIFIER_FILE).exists():
        report = path / PREDICTIONS_FILE  # as written by `evaluate --output`
        path, other = (report, str(report)) if report.is_file() else (path, other)
    if path.is_dir():
        classifier = load_classifier_with(path, loading)
        if classifier.scale is not None:
            raise MinllamaError(
                f"{other}: predicts numbers, but the other classifier predicts classes; compare "
                "classifiers of the same kind"
            )
        matched = _matched(other, classifier.labels, classifier.multi_label, split)
        return ComparedSystem(
            other, lambda progress: _predicted(classifier, split, matched, progress)
        )
    if not path.is_file():
        raise DataError(
            f"{other}: no such file or folder; name a classifier's folder, or predictions that "
            "evaluate or classify wrote as JSON Lines"
        )
    read = _read(other, split)
    return ComparedSystem(other, lambda progress: read)


def _matched(other: str, labels: Sequence[str], multi_label: bool, split: Dataset) -> list[str]:
    """The other system's names of the split's classes, in order; refuses other classes."""
    if multi_label != split.multi_label:
        kinds = "one label", "any number of labels"
        raise MinllamaError(
            f"{other}: predicts {kinds[multi_label]} per text, but the other classifier "
            f"{kinds[not multi_label]}; compare classifiers of the same kind"
        )
    called = same_classes(split.label_names, labels)
    if called is not None:
        return [called[name] for name in split.label_names]
    lacks = [name for name in split.label_names if name not in labels]
    adds = [name for name in labels if name not in split.label_names]
    parts = [f"lacks {listed(lacks)}"] * bool(lacks) + [f"has {listed(adds)}"] * bool(adds)
    raise MinllamaError(
        f"{other}: different classes: it {' and '.join(parts)}; compare classifiers that were "
        "trained with the same class names"
    )


def _predicted(
    classifier: Classifier, split: Dataset, matched: Sequence[str], progress: Progress
) -> Predicted:
    many, logits = classifier.multi_label, classifier.predict_logits(split.texts, progress=progress)
    p = probabilities(logits, classifier.temperature, multi_label=many)
    predicted = predictions(p, multi_label=many, thresholds=classifier.decision)
    order = [classifier.labels.index(name) for name in matched]
    return p[:, order], predicted[:, order]


def _read(other: str, split: Dataset) -> Predicted:
    """Probabilities and predictions of a file's rows, which must be those of the split.

    If a file contains several splits, the one with these texts is used.
    """
    splits: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(other):
        splits.setdefault(str(row.get("split", "")), []).append(row)
    found = [rows for rows in splits.values() if _unlike(rows, split) is None]
    if not found:
        closest = min(splits.values(), key=lambda rows: abs(len(rows) - len(split)), default=[])
        raise DataError(f"{other}: {_unlike(closest, split)}; {REMEDY}")
    rows = found[0]
    names = list(rows[0]["probabilities"])
    matched = _matched(other, names, isinstance(_prediction_of(rows[0]), list), split)
    p = np.empty((len(rows), len(names)))
    predicted = np.zeros(p.shape, dtype=np.bool_)
    class_index = {name: i for i, name in enumerate(matched)}
    for i, row in enumerate(rows):
        predicted_names = _prediction_of(row)
        try:
            p[i] = [row["probabilities"][name] for name in matched]
            for name in predicted_names if isinstance(predicted_names, list) else [predicted_names]:
                predicted[i, class_index[name]] = True
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{other}: row {i + 1} has different classes than earlier rows ({error}); {REMEDY}"
            ) from error
    return p, predicted


def _prediction_of(row: Mapping[str, Any]) -> Any:
    """The prediction in a row, in `predicted` where `label` is the gold label."""
    return row["predicted"] if "predicted" in row else row.get("label")


def _rows(other: str) -> Iterator[dict[str, Any]]:
    """The records of a file of predictions."""
    for number, line in enumerate(_lines(other), start=1):
        try:
            row = json.loads(line)
            is_row = isinstance(row["text"], str) and isinstance(row["probabilities"], dict)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_row = False
        if not is_row:
            raise DataError(
                f"{other}: line {number} is not a prediction (JSON with text, label and "
                "probabilities); give predictions.jsonl of evaluate, or JSON Lines of classify"
            )
        yield row


def _lines(other: str) -> Iterator[bytes]:
    try:
        with Path(other).open("rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{other}: cannot be read ({error.strerror})") from error


def _unlike(rows: Sequence[Mapping[str, Any]], split: Dataset) -> str | None:
    """A message about how a file's rows differ from the split's; None if they are equal."""
    if len(rows) != len(split):
        return f"has predictions of {len(rows):,} texts, but {split.source} has {len(split):,}"
    for i, (row, text) in enumerate(zip(rows, split.texts, strict=True)):
        if row["text"] != text:
            return f"its texts differ from those of {split.source}, from row {i + 1:,} on"
    return None
