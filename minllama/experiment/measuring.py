"""A classifier on a split: its evaluation, beside that of its baselines.

Knows nothing of training.
"""

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import minllama
from minllama.baselines import Baseline, fit_baselines
from minllama.classifier.base import Classifier, probabilities
from minllama.data import Dataset
from minllama.errors import CheckpointError
from minllama.evaluation import Evaluation, evaluate
from minllama.experiment.splits import Splits
from minllama.regression import ValueBaseline, evaluate_regression, fit_value_baselines
from minllama.report import ReportedSplit, ReportedValues
from minllama.report.files import METRICS_FILE

HEADLINES = ("accuracy", "macro_f1", "log_loss", "calibration_error")
OF_NUMBERS = ("mae", "rmse", "r2", "spearman")


def evaluate_classifier(
    classifier: Classifier,
    split: Dataset,
    name: str,
    *,
    logits: NDArray[np.float32] | None = None,
    others: Mapping[str, Evaluation] | None = None,
    baselines: Sequence[Baseline] = (),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ReportedSplit:
    """Predict a split and, where it has labels, evaluate the predictions.

    Args:
        classifier: what predicts.
        split: its labels are numbers of the classifier's labels; or None.
        name: of the split.
        logits: (N, C), where they were computed before; else they are.
        others: evaluations of other systems on the same rows.
        baselines: predict the same rows.
        seed: of the intervals' draws.
        progress: is told how many more texts are done.
    """
    if logits is None:
        logits = classifier.predict_logits(split.texts, progress=progress)
    assert not split.has_numbers
    many, names = classifier.multi_label, split.label_names
    predicted = probabilities(logits, classifier.temperature, multi_label=many)
    if split.labels is None:
        return ReportedSplit(name, split.texts, predicted)
    beside = dict(others or {})
    labels: Any = split.labels
    for baseline in baselines:
        p = baseline.predict_proba(split.texts)
        beside[baseline.name] = evaluate(p, labels, names, multi_label=many, seed=seed)
    evaluation = evaluate(predicted, labels, names, multi_label=many, seed=seed)
    return ReportedSplit(name, split.texts, predicted, labels, evaluation, beside)


def evaluate_values(
    classifier: Classifier,
    split: Dataset,
    name: str,
    *,
    logits: NDArray[np.float32] | None = None,
    baselines: Sequence[ValueBaseline] = (),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ReportedValues:
    """As `evaluate_classifier`, of a classifier that gives numbers.

    Args:
        classifier: what predicts.
        split: its labels are numbers; or None.
        name: of the split.
        logits: (N, 1), where they were computed before; else they are.
        baselines: predict the same rows.
        seed: of the intervals' draws.
        progress: is told how many more texts are done.
    """
    if logits is None:
        logits = classifier.predict_logits(split.texts, progress=progress)
    assert classifier.scale is not None
    values = classifier.scale.values(logits[:, 0])
    if split.labels is None:
        return ReportedValues(name, split.texts, values)
    targets = split.targets
    beside = {
        baseline.name: evaluate_regression(
            baseline.predict_values(split.texts), targets, own=values, seed=seed
        )
        for baseline in baselines
    }
    evaluation = evaluate_regression(values, targets, seed=seed)
    return ReportedValues(name, split.texts, values, targets, evaluation, beside)


def evaluate_splits(
    classifier: Classifier,
    splits: Splits,
    *,
    dev_logits: NDArray[np.float32],
    others: Mapping[str, Evaluation],
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[ReportedSplit] | list[ReportedValues]:
    """Evaluate dev, and test where there is one, beside baselines that are fitted on train.

    Args:
        classifier: what predicts.
        splits: the data of an experiment.
        dev_logits: (N, C), those of dev.
        others: evaluations of other systems on dev.
        seed: of the baselines.
        progress: is told how many more texts of test are done.
    """
    train, dev, test = splits.train, splits.dev, splits.test
    if train.has_numbers:
        regressions = fit_value_baselines(train.texts, train.targets)
        values = [evaluate_values(classifier, dev, "dev", logits=dev_logits, baselines=regressions)]
        if test is not None:
            values.append(
                evaluate_values(classifier, test, "test", baselines=regressions, progress=progress)
            )
        return values
    labels: Any = train.labels
    baselines = fit_baselines(
        *(train.texts, labels, len(train.label_names)), multi_label=train.multi_label, seed=seed
    )
    reported = [
        evaluate_classifier(
            classifier, dev, "dev", logits=dev_logits, others=others, baselines=baselines
        )
    ]
    if test is not None:
        reported.append(
            evaluate_classifier(classifier, test, "test", baselines=baselines, progress=progress)
        )
    return reported


def headlines(split: ReportedSplit | ReportedValues) -> dict[str, float]:
    """The few numbers that a model card shows."""
    if split.evaluation is None:
        return {}
    names = OF_NUMBERS if isinstance(split, ReportedValues) else HEADLINES
    found = {name: getattr(split.evaluation, name) for name in names}
    return {name: float(value) for name, value in found.items() if value is not None}


def saved_headlines(folder: Path) -> dict[str, dict[str, float]]:
    """The headlines of each split in the report that lies in `folder`; empty where none does.

    Raises:
        CheckpointError: its metrics.json is damaged.
    """
    path = folder / METRICS_FILE
    try:
        splits = json.loads(path.read_bytes())["splits"]
        measured = {n: s["evaluation"] for n, s in splits.items() if s["evaluation"] is not None}
        return {
            name: {
                metric: float(values[metric])
                for metric in (OF_NUMBERS if "mae" in values else HEADLINES)
                if values[metric] is not None
            }
            for name, values in measured.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete it, or bring it back") from error


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {
        "minllama": minllama.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def settings_of(**groups: Any) -> dict[str, Any]:
    """Option dataclasses and plain values as one nested dictionary, for reports."""
    return {
        name: dict(group) if isinstance(group, Mapping) else dataclasses.asdict(group)
        for name, group in groups.items()
    }
