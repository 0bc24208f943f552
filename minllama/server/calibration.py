"""What is known of how well a classifier's probabilities are calibrated, from its own files."""

from pathlib import Path
from typing import Any

from minllama.classification.base import Classifier
from minllama.classification.experts import LlamaExpertsClassifier
from minllama.evaluation.report.files import METRICS_FILE
from minllama.text import read_json


def calibration_of(classifier: Classifier, folder: Path) -> dict[str, Any] | None:
    """Whether it is calibrated, on how many texts, and the error that was measured.

    Args:
        classifier: loaded.
        folder: its own, where its report may be.

    Returns:
        `is_calibrated`; `temperature`; `n_texts` of dev that it was fitted on, None where
        cross-validation fitted it; `ece`, the expected calibration error on `ece_n_texts` texts of
        the split `ece_split` (on dev it is optimistic where the temperature was fitted there). What
        is not known is None. None for a regression, which has no probabilities.
    """
    if classifier.scale is not None:
        return None
    is_calibrated = classifier.is_calibrated
    found: dict[str, Any] = {
        "is_calibrated": is_calibrated,
        "temperature": classifier.temperature,
        "n_texts": None,
        "ece": None,
        "ece_split": None,
        "ece_n_texts": None,
    }
    try:
        splits = read_json(folder / METRICS_FILE)["splits"]
        if is_calibrated and "dev" in splits and not isinstance(classifier, LlamaExpertsClassifier):
            found["n_texts"] = int(splits["dev"]["evaluation"]["count"])
        name = next(name for name in ("test", "dev") if name in splits)
        evaluation = splits[name]["evaluation"]
        ece, count = float(evaluation["calibration_error"]), int(evaluation["count"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, StopIteration):
        return found  # a classifier works without its report
    return found | {"ece": ece, "ece_split": name, "ece_n_texts": count}
