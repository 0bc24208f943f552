"""Weights of a product of experts: log-probabilities that are added and normalized again.

Experts are chosen one after the other, and weighted together, by the log-loss of rows that they
were not fitted to (Hinton 2002, eq. 1; selection as in Caruana et al. 2004, sec. 2). Such weights
are also the experts' temperatures, so the product is calibrated. As in Platt 1999 (sec. 2.2), rows
have soft targets, so that a few rows that are all told apart do not give certainty.
`minllama.classification.frozen` calls it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from minllama.errors import optional_import

Matrix = NDArray[np.float64]
Name = TypeVar("Name")

MOST_EXPERTS = 6
NEWTON_STEPS = 6  # of the two weights by which one more expert is judged
SMALLEST_WEIGHT = 0.01  # below which an expert is left out
LARGEST_WEIGHT = 10.0
WRONG_ROWS = 2  # beside those that are there
SMALLEST_SPREAD = 1e-6  # of the logits of an expert that says nothing


@dataclass(frozen=True)
class Product(Generic[Name]):
    """Chosen experts.

    Attributes:
        weights: expert -> what its logits are multiplied by.
        log_probs: (N, C), of the product.
        losses: (N,), the cross-entropy of the rows' soft targets under it, in nats.
    """

    weights: Mapping[Name, float]
    log_probs: Matrix
    losses: Matrix

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


def log_softmax(logits: Matrix) -> Matrix:
    """Over the last axis."""
    shifted: Matrix = logits - logits.max(-1, keepdims=True)
    result: Matrix = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def soft_targets(gold: NDArray[np.int64], n_classes: int) -> Matrix:
    """(N, C): 1 - 2 / (N + 2) for the class, the others alike; as if two more rows were wrong.

    N rows that are all right do not show more (Laplace's rule of succession has 1 / (N + 2)), and
    logits of rows that heads are fitted to are farther apart than those of rows left out.
    """
    wrong = WRONG_ROWS / (len(gold) + WRONG_ROWS)
    targets: Matrix = np.full((len(gold), n_classes), wrong / max(1, n_classes - 1))
    targets[np.arange(len(gold)), gold] = 1 - wrong
    return targets


def choose_experts(
    experts: Mapping[Name, Matrix], gold: NDArray[np.int64], most: int = MOST_EXPERTS
) -> Product[Name]:
    """Add experts to a product as long as one lowers its loss by more than a standard error.

    Args:
        experts: name -> (N, C) logits of rows that it was not fitted to, of any scale.
        gold: (N,), the classes.
        most: experts.
    """
    factors = {name: _alone(logits, gold)[0] for name, logits in experts.items()}
    calibrated = {name: logits * factors[name] for name, logits in experts.items()}
    product = _chosen(calibrated, gold, most)
    weights = {name: weight * factors[name] for name, weight in product.weights.items()}
    return replace(product, weights=weights)


def even_product(
    experts: Mapping[Name, Matrix],
    groups: Sequence[Sequence[Sequence[Name]]],
    gold: NDArray[np.int64],
) -> Product[Name]:
    """Weights of groups of experts, where there are too few rows to choose single ones by.

    The experts of a group count alike, by logits of the same spread; so errors of heads on a few
    rows average out, and chance chooses none of them.

    Args:
        experts: as for `choose_experts`.
        groups: of names; each is given as alternatives, of which the one of least loss is taken.
        gold: (N,), the classes.
    """
    means: dict[int, Matrix] = {}
    factors: dict[int, dict[Name, float]] = {}
    for number, alternatives in enumerate(groups):
        least = math.inf
        for names in alternatives:
            units = {name: 1 / (spread(experts[name]) * len(names)) for name in names}
            logits: Matrix = np.sum([unit * experts[name] for name, unit in units.items()], axis=0)
            factor, loss = _alone(logits, gold)
            if loss < least:
                least, means[number] = loss, logits * factor
                factors[number] = {name: unit * factor for name, unit in units.items()}
    product = weighted_product(means, gold)
    weights = {
        name: weight * factor
        for number, weight in product.weights.items()
        for name, factor in factors[number].items()
    }
    return Product(weights, product.log_probs, product.losses)


def spread(logits: Matrix) -> float:
    """How far the logits of a row are apart; 1 if they are not, so that nothing is divided by 0."""
    found = float((logits - logits.mean(1, keepdims=True)).std())
    return found if found > SMALLEST_SPREAD else 1.0


def _alone(logits: Matrix, gold: NDArray[np.int64]) -> tuple[float, float]:
    """What calibrates an expert alone, and its loss then.

    The factor is searched from a scale at which its logits differ by 1.
    """
    unit = 1 / spread(logits)
    alone = weighted_product({"": logits * unit}, gold)
    return unit * alone.weights[""], alone.loss


def _chosen(experts: Mapping[Name, Matrix], gold: NDArray[np.int64], most: int) -> Product[Name]:
    """Choose among experts of temperature 1."""
    chosen: list[Name] = []
    best: Product[Name] | None = None
    while len(chosen) < min(most, len(experts)):
        others = [name for name in experts if name not in chosen]
        sums = None if best is None else best.log_probs
        tried = {name: _loss_with(sums, experts[name], gold) for name in others}
        chosen.append(min(others, key=lambda name: tried[name]))
        product = weighted_product({name: experts[name] for name in chosen}, gold)
        if best is not None and not is_clearly_better(product.losses, best.losses):
            break
        best = product
    assert best is not None, "no experts to choose among"
    return best


def is_clearly_better(losses: Matrix, than: Matrix) -> bool:
    """Whether losses are lower by more than one standard error of the difference."""
    gains = than - losses
    return float(gains.mean()) > float(gains.std()) / math.sqrt(len(gains))


def _loss_with(sums: Matrix | None, logits: Matrix, gold: NDArray[np.int64]) -> float:
    """The loss with an expert beside the product, by Newton's method on the weights of the two."""
    parts = [log_softmax(logits)] if sums is None else [sums, log_softmax(logits)]
    weights = np.array([1.0] if sums is None else [1.0, 0.0])
    targets = soft_targets(gold, logits.shape[1])
    best = math.inf
    for _ in range(NEWTON_STEPS):
        log_probs = log_softmax(sum(w * part for w, part in zip(weights, parts, strict=True)))
        best = min(best, float(-(targets * log_probs).sum(1).mean()))
        p = np.exp(log_probs)
        means = [(p * part).sum(1) for part in parts]
        gradient = np.array([((p - targets) * part).sum(1).mean() for part in parts])
        hessian = np.array(
            [
                [((p * a * b).sum(1) - m * n).mean() for b, n in zip(parts, means, strict=True)]
                for a, m in zip(parts, means, strict=True)
            ]
        )
        hessian[np.diag_indices(len(parts))] += 1e-6
        weights = np.maximum(weights - np.linalg.solve(hessian, gradient), 0.0)
    return best


def weighted_product(experts: Mapping[Name, Matrix], gold: NDArray[np.int64]) -> Product[Name]:
    """The product of all these experts with the weights of least loss, none below zero."""
    optimize = optional_import("scipy.optimize", "fitting weights needs")
    names = list(experts)
    stacked: Sequence[Matrix] = [log_softmax(experts[name]) for name in names]
    targets = soft_targets(gold, stacked[0].shape[1])

    def mixed(weights: Matrix) -> Matrix:
        return log_softmax(sum(w * part for w, part in zip(weights, stacked, strict=True)))

    def loss(weights: Matrix) -> tuple[float, Matrix]:
        log_probs = mixed(weights)
        p = np.exp(log_probs)
        gradient = [((p - targets) * part).sum(1).mean() for part in stacked]
        return float(-(targets * log_probs).sum(1).mean()), np.array(gradient)

    found = optimize.minimize(
        loss,
        np.full(len(names), 1 / len(names)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, LARGEST_WEIGHT)] * len(names),
    )
    weights = np.asarray(found.x)
    weights[weights < SMALLEST_WEIGHT] = 0.0
    if not weights.any():
        weights[0] = SMALLEST_WEIGHT  # texts say nothing about the classes
    log_probs = mixed(weights)
    kept = {name: float(w) for name, w in zip(names, weights, strict=True) if w}
    return Product(kept, log_probs, -(targets * log_probs).sum(1))
