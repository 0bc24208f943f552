"""Evaluate a classifier on a split, and its baselines on the same rows."""

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.classification.base import Classifier, probabilities
from minllama.data import Dataset
from minllama.data.task import Task
from minllama.errors import CheckpointError
from minllama.evaluation.baselines import Baseline
from minllama.evaluation.metrics import Evaluation, evaluate
from minllama.evaluation.registry import may_be_missing, on_card
from minllama.evaluation.report import ReportedSplit, ReportedValues
from minllama.evaluation.report.files import METRICS_FILE
from minllama.evaluation.thresholds import Chosen, Thresholds, choose_thresholds
from minllama.experiment.evaluate_values import value_headlines
from minllama.options.evaluation import ThresholdOptions
from minllama.text import VERSION, printable

T = TypeVar("T")


def evaluate_classifier(
    classifier: Classifier,
    split: Dataset,
    name: str,
    *,
    logits: NDArray[np.float32] | None = None,
    others: Mapping[str, Evaluation] | None = None,
    baselines: Sequence[Baseline] = (),
    thresholds: Mapping[str, Thresholds] | None = None,
    headline: str = "accuracy",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ReportedSplit:
    """Predict a split and, if it has labels, evaluate the predictions.

    Args:
        classifier: to evaluate.
        split: with ids of the classifier's labels, or None as labels.
        name: of the split.
        logits: (N, C), if already computed.
        others: evaluations of other systems on the same rows.
        baselines: to evaluate on the same rows.
        thresholds: of baselines, by their names; the classifier has its own.
        headline: the metric that the verdict is about.
        seed: of the intervals' draws.
        progress: receives the number of texts just completed.
    """
    if logits is None:
        logits = classifier.predict_logits(split.texts, progress=progress)
    many, names = classifier.multi_label, split.label_names
    predicted = probabilities(logits, classifier.temperature, multi_label=many)
    if split.labels is None:
        return ReportedSplit(name, split.texts, predicted)
    measured = partial(
        evaluate, labels=split.labels, label_names=names, multi_label=many, seed=seed
    )
    other_systems = dict(others or {})
    for baseline in baselines:
        p, decision = baseline.predict_proba(split.texts), (thresholds or {}).get(baseline.name)
        other_systems[baseline.name] = measured(p, thresholds=decision)
    evaluation = measured(predicted, thresholds=classifier.decision)
    return ReportedSplit(
        name, split.texts, predicted, split.labels, evaluation, other_systems, headline=headline
    )


def choose_decision(
    options: ThresholdOptions, probabilities: NDArray[np.floating[Any]], dev: Dataset
) -> Chosen | None:
    """Thresholds by the options, chosen on dev: (N, C) probabilities; None without options.

    Raises:
        OptionError: such thresholds cannot be; see
        `minllama.evaluation.thresholds.check_thresholds`.
    """
    assert dev.labels is not None
    gold = Task.of(dev).target(dev.labels)
    return choose_thresholds(
        options,
        probabilities,
        gold,
        dev.label_names,
        multi_label=dev.multi_label,
        source=printable(str(dev.source)),
    )


def baseline_decisions(
    options: ThresholdOptions, baselines: Sequence[Baseline], dev: Dataset
) -> dict[str, Thresholds]:
    """The baselines' thresholds, chosen on dev by the classifier's rule; numbers do not apply.

    Returns:
        Name -> thresholds; empty without options.
    """
    found = {}
    for baseline in baselines:
        p = baseline.predict_proba(dev.texts)
        chosen = choose_decision(options, p, dev)
        if chosen is not None and not chosen.thresholds.how:
            chosen = choose_decision(dataclasses.replace(options, threshold=()), p, dev)
        if chosen is not None:
            found[baseline.name] = chosen.thresholds
    return found


def headlines(split: ReportedSplit | ReportedValues) -> dict[str, float]:
    """The metrics for a model card."""
    if split.evaluation is None:
        return {}
    if isinstance(split, ReportedValues):
        return value_headlines(split.evaluation)
    values = {name: split.evaluation.value(name) for name in on_card(regression=False)}
    return {name: float(value) for name, value in values.items() if value is not None}


def saved_headlines(folder: Path) -> dict[str, dict[str, float]]:
    """The main metrics of each split in the report in `folder`; empty without one.

    Raises:
        CheckpointError: its metrics.json is damaged.
    """

    def read(splits: dict[str, Any]) -> dict[str, dict[str, float]]:
        measured = {n: s["evaluation"] for n, s in splits.items() if s["evaluation"] is not None}
        if any("mae" in values for values in measured.values()):
            return {name: value_headlines(values) for name, values in measured.items()}
        return {
            name: {
                metric: float(values[metric])
                for metric in on_card(regression=False)
                if not may_be_missing(metric) or values.get(metric) is not None
            }
            for name, values in measured.items()
        }

    return _of_saved_splits(folder, read)


def saved_verdicts(folder: Path) -> dict[str, str]:
    """The verdict on each split in the report in `folder`; empty without one.

    Raises:
        CheckpointError: its metrics.json is damaged.
    """

    def read(splits: dict[str, Any]) -> dict[str, str]:
        verdicts = {name: split.get("verdict") for name, split in splits.items()}
        return {name: v for name, v in verdicts.items() if v and isinstance(v, str)}

    return _of_saved_splits(folder, read)


def _of_saved_splits(folder: Path, read: Callable[[dict[str, Any]], dict[str, T]]) -> dict[str, T]:
    """What `read` finds in the splits of the report in `folder`; empty without one.

    Raises:
        CheckpointError: its metrics.json is damaged.
    """
    path = folder / METRICS_FILE
    try:
        return read(json.loads(path.read_bytes())["splits"])
    except FileNotFoundError:
        return {}
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError),
        *(OverflowError, RecursionError),
    ) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete it, or restore the original"
        ) from error


def versions() -> dict[str, str]:
    """The versions of software and hardware."""
    return {
        "minllama": VERSION,
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
