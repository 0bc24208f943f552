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
from minllama.baselines import Baseline
from minllama.classifier.base import Classifier, probabilities
from minllama.data import Dataset
from minllama.errors import CheckpointError
from minllama.evaluation import Evaluation, evaluate
from minllama.experiment.value_measuring import value_headlines
from minllama.report import ReportedSplit, ReportedValues
from minllama.report.files import METRICS_FILE

HEADLINES = ("accuracy", "macro_f1", "log_loss", "calibration_error")


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
    many, names = classifier.multi_label, split.label_names
    predicted = probabilities(logits, classifier.temperature, multi_label=many)
    if split.labels is None:
        return ReportedSplit(name, split.texts, predicted)
    beside = dict(others or {})
    for baseline in baselines:
        p = baseline.predict_proba(split.texts)
        beside[baseline.name] = evaluate(p, split.labels, names, multi_label=many, seed=seed)
    evaluation = evaluate(predicted, split.labels, names, multi_label=many, seed=seed)
    return ReportedSplit(name, split.texts, predicted, split.labels, evaluation, beside)


def headlines(split: ReportedSplit | ReportedValues) -> dict[str, float]:
    """The few numbers that a model card shows."""
    if split.evaluation is None:
        return {}
    if isinstance(split, ReportedValues):
        return value_headlines(split.evaluation)
    return {name: float(getattr(split.evaluation, name)) for name in HEADLINES}


def saved_headlines(folder: Path) -> dict[str, dict[str, float]]:
    """The headlines of each split in the report that lies in `folder`; empty where none does.

    Raises:
        CheckpointError: its metrics.json is damaged.
    """
    path = folder / METRICS_FILE
    try:
        splits = json.loads(path.read_bytes())["splits"]
        measured = {n: s["evaluation"] for n, s in splits.items() if s["evaluation"] is not None}
        if any("mae" in values for values in measured.values()):
            return {name: value_headlines(values) for name, values in measured.items()}
        return {
            name: {metric: float(values[metric]) for metric in HEADLINES}
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
