"""Layer search: features of some texts decide which layers the other texts need.

Deep layers cost most and are seldom better than middle ones. So some texts run through all layers,
and the others only through the remaining candidates, of which there are fewer as evidence comes in
(Hoeffding races, Maron & Moore 1993). The remaining candidates surround the cheapest layer within
one standard error of the best (one-standard-error rule, Breiman et al. 1984, sec. 3.4.3), and all
texts decide between them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.classification.features import (
    Features,
    extract_features,
    right_in_cross_validation,
)
from minllama.data.task import Task
from minllama.distributed.ranks import current
from minllama.engine.states import Choice

# Texts that run through all layers. With 1,500 of SST-5's 8,544, two samples of eight dropped the
# layers that are best on all; with 2,500 none of six did.
SEARCH_TEXTS = 2500
MARGIN = 1  # candidates on either side of the shallowest good layer that remain


def searched_features(
    classifier: LlamaEmbeddingClassifier,
    texts: Sequence[str],
    labels: Sequence[Any],
    choices: Sequence[Choice],
    task: Task,
    *,
    progress: Callable[[int], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Features:
    """Features of texts for the choices that remain in the layer search.

    For all choices if there are less than twice SEARCH_TEXTS texts, or one layer, or with
    several labels per text or class weights, since the search counts correct predictions.

    Args:
        classifier, texts, choices, progress: as for `extract_features`.
        labels, task: as for `select_features`.
        report: receives a message about the remaining layers.
    """
    n_texts, layers = len(texts), {layer for layer, _ in choices}
    if n_texts < 2 * SEARCH_TEXTS or len(layers) == 1 or task.multi_label or task.balanced:
        return extract_features(classifier, texts, choices, progress=progress)
    order = np.random.default_rng(task.seed).permutation(n_texts)
    first, others = np.sort(order[:SEARCH_TEXTS]), np.sort(order[SEARCH_TEXTS:])
    early = extract_features(classifier, [texts[i] for i in first], choices, progress=progress)
    good, remaining = current().first(
        lambda: remaining_layers(early, [labels[i] for i in first], task)
    )
    left = [choice for choice in choices if choice[0] in remaining]
    late = extract_features(classifier, [texts[i] for i in others], left, progress=progress)
    report(
        f"after {SEARCH_TEXTS:,} texts no layer was clearly better than layer {good}: continuing "
        f"with layers {', '.join(map(str, remaining))}"
    )
    features: Features = {}
    for choice in left:
        rows = np.empty((n_texts, late[choice].shape[1]), dtype=np.float32)
        rows[first], rows[others] = early[choice], late[choice]
        features[choice] = rows
    return features


def remaining_layers(
    features: Features,
    labels: Sequence[Any],
    task: Task,
) -> tuple[int, list[int]]:
    """The shallowest layer within one standard error of the best, and the remaining layers.

    A layer is clearly worse if the best is right more often on texts that neither was fitted to, by
    more than one standard error of that difference; its best pooling counts.

    Args:
        features, labels, task: as for `select_features`.
    """
    right = right_in_cross_validation(features, labels, task)
    best_of: dict[int, Choice] = {}
    for choice in sorted(right, key=lambda choice: right[choice].mean()):
        best_of[choice[0]] = choice
    best = right[max(right, key=lambda choice: right[choice].mean())].astype(np.float64)
    layers = sorted(best_of)
    for index, layer in enumerate(layers):
        less = best - right[best_of[layer]]
        if less.mean() <= less.std() / math.sqrt(len(less)):
            return layer, layers[max(0, index - MARGIN) : index + MARGIN + 1]
    raise AssertionError("the best layer is as good as the best")
