"""Temperature scaling (Guo et al. 2017, sec. 4.2): fit one temperature to logits and labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.errors import MinllamaError, optional_import

RANGE = (0.01, 1000.0)  # sums over long labels are hundreds of nats apart
# A few rows that are all predicted correctly would have a temperature of zero, that is, certainty.
# A log-normal prior of this width, with the weight of one row, prevents it.
PRIOR_WIDTH = 0.5


def fit_temperature(
    logits: NDArray[np.float32], labels: Sequence[Any], *, multi_label: bool = False
) -> float:
    """The temperature that maximizes the likelihood of the labels; predictions do not change.

    With few rows it stays near 1: see PRIOR_WIDTH.

    With several labels per text, probabilities stay on their side of 0.5.

    Args:
        logits: (N, C).
        labels: N classes, or N collections of them if `multi_label`.
        multi_label: a sigmoid for each label instead of one softmax.

    Raises:
        MinllamaError: scikit-learn's scipy is missing, or there are no rows.
    """
    optional_import("scipy", "calibration needs")
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    scores = np.asarray(logits, dtype=np.float64)
    if not len(scores):
        raise MinllamaError("there are no rows to fit a temperature on; give labeled texts")
    if multi_label:
        gold = np.zeros(scores.shape, dtype=bool)
        for row, classes in enumerate(labels):
            gold[row, list(classes)] = True
        signed = np.where(gold, scores, -scores)

        def loss(log_temperature: float) -> float:
            return float(np.logaddexp(0, -signed / np.exp(log_temperature)).mean())
    else:
        rows, gold_ids = np.arange(len(scores)), np.asarray(labels)

        def loss(log_temperature: float) -> float:
            log_probs = log_softmax(scores / np.exp(log_temperature), axis=-1)
            return float(-log_probs[rows, gold_ids].mean())

    def penalized(log_temperature: float) -> float:
        return loss(log_temperature) + (log_temperature / PRIOR_WIDTH) ** 2 / (2 * len(scores))

    # In log T the loss is unimodal: it is convex in 1 / T, which is monotonic in it.
    found = minimize_scalar(penalized, bounds=tuple(np.log(RANGE)), method="bounded")
    return float(np.exp(found.x))
