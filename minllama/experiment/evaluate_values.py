"""Evaluate a regression on a split, and its baselines on the same rows.

`minllama.experiment.evaluate` does the same for classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.classification.base import Classifier
from minllama.data import Dataset
from minllama.evaluation.registry import on_card
from minllama.evaluation.regression import ValueBaseline, evaluate_regression, fit_value_baselines
from minllama.evaluation.report import ReportedValues
from minllama.experiment.splits import Splits


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
    """Predict a split and, if it has targets, evaluate the predictions.

    Args:
        classifier: to evaluate.
        split: with numbers or None as labels.
        name: of the split.
        logits: (N, 1), if already computed.
        baselines: to evaluate on the same rows.
        seed: of the intervals' draws.
        progress: receives the number of texts just completed.
    """
    if logits is None:
        logits = classifier.predict_logits(split.texts, progress=progress)
    assert classifier.scale is not None
    values = classifier.scale.values(logits[:, 0])
    if split.labels is None:
        return ReportedValues(name, split.texts, values)
    targets = split.targets
    other_systems = {
        baseline.name: evaluate_regression(
            baseline.predict_values(split.texts), targets, own=values, seed=seed
        )
        for baseline in baselines
    }
    evaluation = evaluate_regression(values, targets, seed=seed)
    return ReportedValues(name, split.texts, values, targets, evaluation, other_systems)


def evaluate_value_splits(
    classifier: Classifier,
    splits: Splits,
    fitted_to: Dataset,
    *,
    dev_logits: NDArray[np.float32],
    test_logits: NDArray[np.float32] | None = None,
) -> list[ReportedValues]:
    """Evaluate dev and, if given, test, with baselines fitted on train.

    Args:
        classifier: to evaluate.
        splits: the data of an experiment.
        fitted_to: the rows that the classifier, and the baselines on test, were fitted to.
        dev_logits: (N, 1), those of dev.
        test_logits: those of test, if already computed.
    """
    baselines = fit_value_baselines(splits.train.texts, splits.train.targets)
    reported = [
        evaluate_values(classifier, splits.dev, "dev", logits=dev_logits, baselines=baselines)
    ]
    if splits.test is not None:
        if fitted_to is not splits.train:
            baselines = fit_value_baselines(fitted_to.texts, fitted_to.targets)
        reported.append(
            evaluate_values(
                classifier, splits.test, "test", logits=test_logits, baselines=baselines
            )
        )
    return reported


def value_headlines(evaluation: Any) -> dict[str, float]:
    """The metrics for a model card, from an evaluation or a report."""
    found = {
        name: evaluation[name] if isinstance(evaluation, Mapping) else evaluation.value(name)
        for name in on_card(regression=True)
    }
    return {name: float(value) for name, value in found.items() if value is not None}
