"""What follows training: a temperature, thresholds, and a fit to the rows that were held out."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from minllama.classification.base import Classifier, probabilities
from minllama.classification.calibration import fit_temperature
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.experiment.evaluate import choose_decision
from minllama.experiment.experiment import Experiment
from minllama.experiment.predict import described
from minllama.experiment.reporter import Reporter
from minllama.experiment.splits import Splits


def calibrate(
    classifier: Classifier, splits: Splits, experiment: Experiment, reporter: Reporter
) -> tuple[NDArray[np.float32], list[str]]:
    """Fit the temperature on dev, unless disabled, and choose thresholds if requested.

    Returns:
        Dev's logits, (N, C), and notes for the report.
    """
    dev, options, notes = splits.dev, experiment.classifier, list[str]()
    assert dev.labels is not None
    logits = classifier.predict_logits(
        dev.texts, progress=reporter.advance("reading dev", len(dev))
    )
    if classifier.scale is not None:  # numbers have neither
        reporter.message(described(classifier))
        return logits, notes
    if options.no_calibration:
        classifier.temperature = 1.0
    elif isinstance(classifier, LlamaExpertsClassifier):
        reporter.message(
            f"temperature {classifier.temperature:.3g}, fitted on training texts left out in turn"
        )
        notes.append("the probabilities were calibrated on training texts, by cross-validation")
    else:
        classifier.temperature = fit_temperature(logits, dev.labels, multi_label=dev.multi_label)
        reporter.message(f"temperature {classifier.temperature:.3g}, fitted on {dev.source}")
    p = probabilities(logits, classifier.temperature, multi_label=dev.multi_label)
    if (chosen := choose_decision(experiment.threshold, p, dev)) is not None:
        classifier.decide_by(chosen.thresholds)
        notes += chosen.notices
        for notice in chosen.notices:
            reporter.message(notice)
        if experiment.threshold.positive is None and not dev.multi_label:
            reporter.message(
                f"the positive class is {classifier.positive!r}; --positive chooses another"
            )
        if chosen.thresholds.how:
            notes.append(
                f"thresholds were chosen on dev ({', '.join(experiment.threshold.threshold)}), "
                "so results on dev are slightly optimistic; the same holds for the baselines"
            )
    reporter.message(described(classifier))
    return logits, notes


def fit_to_all_rows(
    classifier: Classifier,
    refit: Callable[[], Classifier],
    logits: NDArray[np.float32],
    splits: Splits,
    experiment: Experiment,
) -> tuple[Classifier, NDArray[np.float32], str]:
    """A classifier of all rows in place of one that was calibrated.

    Args:
        classifier: that one; it may lose its adapters.
        refit: fits the other one.
        logits: dev's, (N, C), by the first.
        splits, experiment: of the run.

    Returns:
        It deciding as the first does; dev's logits of the first as if they were its own, with the
        same probabilities or values; and a note.
    """
    decision, temperature, scale = classifier.decision, classifier.temperature, classifier.scale
    found = refit()
    if experiment.classifier.no_calibration or not isinstance(found, LlamaExpertsClassifier):
        found.temperature = temperature
    found.decide_by(decision)
    if scale is not None and found.scale is not None:
        of_found = (scale.values(logits) - found.scale.mean) / found.scale.std
    else:
        of_found = logits.astype(np.float64) / temperature * found.temperature
    n = len(splits.train) + len(splits.dev)
    note = (
        f"in the end the classifier was fitted to all {n:,} rows; what is measured on the "
        f"{len(splits.dev):,} held-out ones is of the one before"
    )
    return found, of_found.astype(np.float32), note
