"""A race between layers: features of some texts tell which layers the other texts need not reach.

Deep layers cost the most and seldom say more than the middle of the stack. So a part of the texts
goes through all of them, and the others only as far as it was worth it: fewer candidates as the
evidence comes in, as in a race (Maron & Moore 1993), and of those that cannot be told apart the
cheapest (the one-standard-error rule of Breiman et al. 1984, sec. 3.4.3).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minllama.classifier.embedding import LlamaEmbeddingClassifier
from minllama.classifier.features import (
    Choice,
    Features,
    extract_features,
    right_in_cross_validation,
)

RACE_ROWS = 2500  # texts that go through all layers; on fewer, single folds decide
MARGIN = 1  # candidate layers beside the shallowest good one that stay: all rows will tell


def raced_features(
    classifier: LlamaEmbeddingClassifier,
    texts: Sequence[str],
    labels: Sequence[Any],
    choices: Sequence[Choice],
    *,
    multi_label: bool = False,
    balanced: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Features:
    """Features of texts, for the choices whose layers may be the best and are worth reaching.

    Where there are less than twice RACE_ROWS texts, or one layer, those of all choices.

    Args:
        classifier, texts, choices, progress: as for `extract_features`.
        labels: as for `select_features`, as are `multi_label`, `balanced` and `seed`.
        say: hears what is left out, and why.
    """
    n_texts, layers = len(texts), {layer for layer, _ in choices}
    if n_texts < 2 * RACE_ROWS or len(layers) == 1:
        return extract_features(classifier, texts, choices, progress=progress)
    order = np.random.default_rng(seed).permutation(n_texts)
    first, others = np.sort(order[:RACE_ROWS]), np.sort(order[RACE_ROWS:])
    early = extract_features(classifier, [texts[i] for i in first], choices, progress=progress)
    good, stay = worthwhile_layers(
        early,
        [labels[i] for i in first],
        len(classifier.labels),
        multi_label=multi_label,
        balanced=balanced,
        seed=seed,
    )
    if max(stay) < max(layers):
        say(
            f"after {RACE_ROWS:,} texts no layer is clearly better than layer {good}: the others "
            f"are read up to layer {max(stay)}"
        )
    kept = [choice for choice in choices if choice[0] in stay]
    late = extract_features(classifier, [texts[i] for i in others], kept, progress=progress)
    features: Features = {}
    for choice in kept:
        rows = np.empty((n_texts, late[choice].shape[1]), dtype=np.float32)
        rows[first], rows[others] = early[choice], late[choice]
        features[choice] = rows
    return features


def worthwhile_layers(
    features: Features,
    labels: Sequence[Any],
    n_classes: int,
    *,
    multi_label: bool = False,
    balanced: bool = False,
    seed: int = 0,
) -> tuple[int, list[int]]:
    """The shallowest layer that is not clearly worse than the best, and those to go on with.

    A layer is clearly worse if the best is right more often on texts that neither was fitted to, by
    more than one standard error of that difference; its best pooling counts.

    Args:
        features, labels, n_classes, multi_label, balanced, seed: as for `select_features`.
    """
    right = right_in_cross_validation(
        features, labels, n_classes, multi_label=multi_label, balanced=balanced, seed=seed
    )
    best_of: dict[int, Choice] = {}
    for choice in sorted(right, key=lambda choice: right[choice].mean()):
        best_of[choice[0]] = choice
    best = right[max(right, key=lambda choice: right[choice].mean())].astype(np.float64)
    layers = sorted(best_of)
    for place, layer in enumerate(layers):
        less = best - right[best_of[layer]]
        if less.mean() <= less.std() / math.sqrt(len(less)):
            return layer, layers[max(0, place - MARGIN) : place + MARGIN + 1]
    raise AssertionError("the best layer is as good as the best")
