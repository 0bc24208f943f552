"""Fit regression heads: ridge regressions on features of a frozen Llama, in closed form.

Layers, poolings and penalties are compared by leave-one-out errors, which need only one
decomposition of the features (Allen 1974, PRESS; Golub, Heath & Wahba 1979, eq. 1.5).
`minllama.classification.features` does the same for classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.classification.features import Features
from minllama.engine.states import Choice

Matrix = NDArray[np.float64]

# Weight of |w|^2 beside the mean squared error, for standardized features and targets.
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
SMALLEST_SCALE = 1e-6  # of a feature that is almost constant
CHUNK = 4096  # rows that are converted to float64 at a time


@dataclass(frozen=True)
class ValueSelection:
    """The result of leave-one-out cross-validation.

    Attributes:
        choice: layer and pooling.
        penalty: weight of the L2 regularization, relative to the mean squared error.
        r2: of each target by a head that was not fitted to it.
    """

    choice: Choice
    penalty: float
    r2: float


def select_value_features(features: Features, targets: Matrix) -> ValueSelection:
    """The layer, pooling and penalty with the least squared leave-one-out error.

    Args:
        features: for each choice (N, D).
        targets: (N,), standardized or not.
    """
    best: tuple[float, Choice, float] | None = None
    for choice, rows in features.items():
        for penalty, error in zip(PENALTIES, _left_out_errors(rows, targets), strict=True):
            if best is None or error < best[0]:
                best = error, choice, penalty
    assert best is not None, "no features to choose among"
    error, choice, penalty = best
    scatter = float(targets.var())
    return ValueSelection(choice, penalty, 1 - error / scatter if scatter else 0.0)


def _left_out_errors(features: NDArray[np.float32], targets: Matrix) -> list[float]:
    """Mean squared leave-one-out error under each of PENALTIES.

    With residuals e and the diagonal h of the hat matrix, the error of a left-out row is e / (1 -
    h); the intercept contributes 1 / N to h.
    """
    x, _, _ = _standardized(features)
    y = targets - targets.mean()
    n = len(y)
    u, s = _left_vectors(x)
    along = u.T @ y
    errors = []
    for penalty in PENALTIES:
        shrunk = s**2 / (s**2 + penalty * n)
        residuals = y - u @ (shrunk * along)
        leverage = (u**2) @ shrunk + 1 / n
        errors.append(float(((residuals / np.maximum(1 - leverage, 1e-9)) ** 2).mean()))
    return errors


def _left_vectors(x: Matrix) -> tuple[Matrix, Matrix]:
    """The left singular vectors (N, R) and the singular values (R,) of x, by its smaller side."""
    n, dim = x.shape
    values, vectors = np.linalg.eigh(x.T @ x if dim <= n else x @ x.T)
    nonzero = values > values[-1] * 1e-12
    s: Matrix = np.sqrt(values[nonzero])
    vectors = vectors[:, nonzero]
    return (x @ vectors / s if dim <= n else vectors), s


def fit_value_head(
    features: NDArray[np.float32], targets: Matrix, penalty: float
) -> tuple[NDArray[np.float32], float]:
    """Ridge regression on standardized features, as a head for the original features.

    Args:
        features: (N, D).
        targets: (N,).
        penalty: weight of |w|^2 relative to the mean squared error.

    Returns:
        Weight (D,) and bias: the standardization is folded into them.
    """
    n, dim = features.shape
    mean, scale = _moments(features)
    squares, along = np.zeros((dim, dim)), np.zeros(dim)
    y = targets - targets.mean()
    for start in range(0, n, CHUNK):
        x = (features[start : start + CHUNK] - mean) / scale
        squares += x.T @ x
        along += x.T @ y[start : start + CHUNK]
    squares[np.diag_indices(dim)] += penalty * n
    weight = np.linalg.solve(squares, along) / scale
    return weight.astype(np.float32), float(targets.mean() - weight @ mean)


def _standardized(features: NDArray[np.float32]) -> tuple[Matrix, Matrix, Matrix]:
    mean, scale = _moments(features)
    return (features - mean) / scale, mean, scale


def _moments(features: NDArray[Any]) -> tuple[Matrix, Matrix]:
    """Mean and scale of each feature, (D,) in float64."""
    mean = features.mean(0, dtype=np.float64)
    scale = np.maximum(features.std(0, dtype=np.float64), SMALLEST_SCALE)
    return mean, scale
