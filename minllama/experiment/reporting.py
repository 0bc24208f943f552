"""Write the report of an experiment: results on dev and test, baselines, settings."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.classification import LlamaEmbeddingClassifier
from minllama.classification.base import Classifier
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.data import Dataset
from minllama.data.task import Task
from minllama.evaluation.baselines import MOST_TEXTS, Baseline, fit_baselines
from minllama.evaluation.metrics import Evaluation
from minllama.evaluation.report import Report, ReportedSplit
from minllama.evaluation.report.ladder import Ladder
from minllama.experiment.build import AUTO, TRAINED, training_options
from minllama.experiment.evaluate import (
    baseline_decisions,
    evaluate_classifier,
    settings_of,
    versions,
)
from minllama.experiment.evaluate_values import evaluate_value_splits
from minllama.experiment.experiment import Experiment
from minllama.experiment.predict import score_of, shortened_texts
from minllama.experiment.reporter import Reporter
from minllama.experiment.splits import Splits


def settings_for_people(experiment: Experiment) -> dict[str, Any]:
    """The experiment's settings, for display."""
    files = {
        "train": experiment.train,
        "dev": experiment.dev or "held out of train",
        "test": experiment.test,
    }
    shown = settings_of(data=experiment.data, threshold=experiment.threshold)
    return {"files": files, **shown, **settings_of_run(experiment)}


def settings_of_run(experiment: Experiment) -> dict[str, Any]:
    """The settings of a training other than its texts."""
    options = experiment.classifier
    groups: dict[str, Any] = {
        "model": {
            "model": experiment.model or "default",
            "tokenizer": experiment.tokenizer,
            "dtype": experiment.dtype or "by method and machine",
            "quantize": experiment.quantize or "none",
            **experiment.llama_changes,
        },
        "classifier": options,
        "prompt": experiment.prompt,
    }
    method = options.method
    if method == AUTO:
        groups["ladder"], method = experiment.ladder, "lora"
    if method == "lora":
        groups["lora"] = experiment.lora
    if method in TRAINED:
        groups["training"] = training_options(
            experiment.training, method, regression=experiment.regression
        )
    else:
        groups["training"] = {"seed": experiment.training.seed}
        if method == "frozen":
            groups["training"]["class_weights"] = experiment.training.class_weights
    return settings_of(**groups)


def _chosen(classifier: Classifier) -> dict[str, Any]:
    """The results of the run that are part of the classifier."""
    chosen: dict[str, Any] = {"temperature": float(f"{classifier.temperature:.4g}")}
    if (scale := classifier.scale) is not None:
        chosen = {"mean of the targets": scale.mean, "their standard deviation": scale.std}
    if isinstance(classifier, LlamaEmbeddingClassifier):
        chosen |= {"layer": classifier.layer, "pooling": classifier.pooling}
    if isinstance(classifier, LlamaExpertsClassifier):
        heads = [f"layer {layer} {pooling}" for layer, pooling in classifier.choices]
        of_base = [f"layer {layer} {pooling}" for layer, pooling in classifier.base_choices]
        chosen |= {
            "layers": classifier.n_layers,
            "heads": heads,
            **({"heads on the base": of_base} if of_base else {}),
            "TF-IDF": classifier.tfidf is not None,
        }
    if classifier.decision is not None:
        chosen["threshold"] = classifier.thresholds
    return chosen


def measure(
    experiment: Experiment,
    splits: Splits,
    classifier: Classifier,
    dev_logits: NDArray[np.float32],
    test_logits: NDArray[np.float32] | None,
    other_systems: Mapping[str, Evaluation],
    history: Sequence[Mapping[str, Any]],
    notes: list[str],
    reporter: Reporter,
    ladder: Ladder | None = None,
    fitted_to: Dataset | None = None,
) -> Report:
    """Evaluate dev and test, with baselines fitted on train, or for test on what it was fitted to.

    Args:
        experiment: its options.
        splits: its data.
        classifier: its result.
        dev_logits: (N, C), those of dev.
        test_logits: those of test, if there is one.
        other_systems: evaluations of other systems on dev, by name.
        history: of the training's steps; empty without any.
        notes: in addition to those of the splits.
        reporter: receives messages.
        ladder: of the method auto.
        fitted_to: the rows of the classifier; None for those of train.
    """
    fitted_to = splits.train if fitted_to is None else fitted_to
    if splits.train.has_numbers:
        reported: Any = evaluate_value_splits(
            *(classifier, splits, fitted_to), dev_logits=dev_logits, test_logits=test_logits
        )
    else:
        reported = _classes_measured(
            experiment, splits, fitted_to, classifier, dev_logits, test_logits, other_systems
        )
    notes = _notes(experiment, splits, classifier, history, notes, reporter, ladder)
    return Report(
        title=f"{experiment.output.resolve().name}: {experiment.classifier.method}",
        label_names=classifier.labels,
        splits=reported,
        multi_label=classifier.multi_label,
        history=history,
        settings={"chosen": _chosen(classifier), **settings_for_people(experiment)},
        versions=versions(),
        notes=notes,
        score=score_of(classifier),
        ladder=ladder,
        thresholds=classifier.decision,
    )


def _notes(
    experiment: Experiment,
    splits: Splits,
    classifier: Classifier,
    history: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    reporter: Reporter,
    ladder: Ladder | None,
) -> list[str]:
    """The notes of the splits, given ones, and what is to be known about the figures."""
    found = [*splits.notices, *notes]
    n = len(splits.train)
    if n > MOST_TEXTS and not splits.train.has_numbers:
        found.append(f"the TF-IDF baseline was fitted to {MOST_TEXTS:,} of {n:,} training texts")
    for split in filter(None, (splits.train, splits.dev, splits.test)):
        if message := shortened_texts(classifier, split.texts, split.source):
            reporter.message(message)
            found.append(message)
    is_calibrated = isinstance(classifier, LlamaExpertsClassifier)  # on training texts
    if not (splits.train.has_numbers or experiment.classifier.no_calibration or is_calibrated):
        found.append("the temperature was fitted on dev, so calibration on dev is optimistic")
    if ladder is not None:
        found.append("dev took part in the choice of the method, so its results are optimistic")
    elif history and experiment.training.keep == "best":
        found.append("the weights were selected on dev, so results on dev are slightly optimistic")
    return found


def _classes_measured(
    experiment: Experiment,
    splits: Splits,
    fitted_to: Dataset,
    classifier: Classifier,
    dev_logits: NDArray[np.float32],
    test_logits: NDArray[np.float32] | None,
    other_systems: Mapping[str, Evaluation],
) -> list[ReportedSplit]:
    train, dev, test = splits.train, splits.dev, splits.test
    seed = experiment.training.seed

    def baselines_of(rows: Dataset) -> tuple[Baseline, ...]:
        assert rows.labels is not None
        return fit_baselines(rows.texts, rows.labels, Task.of(rows, seed=seed))

    baselines = baselines_of(train)
    measured = partial(
        evaluate_classifier,
        classifier,
        thresholds=baseline_decisions(experiment.threshold, baselines, dev),
        headline=experiment.headline,
    )
    reported = [measured(dev, "dev", logits=dev_logits, baselines=baselines, others=other_systems)]
    if test is not None:
        of_test = baselines if fitted_to is train else baselines_of(fitted_to)
        reported.append(measured(test, "test", logits=test_logits, baselines=of_test))
    return reported
