"""Features of a frozen Llama: computed once, compared in cross-validation, fitted with a head.

Middle layers often separate classes better than the last one (see docs/benchmarks.md), so one
forward pass over the texts keeps the features of several layers and poolings, and the best are
selected on training data alone; `minllama.classification.layer_search` drops losing layers early.
Heads are L2-regularized logistic regressions (scikit-learn) on standardized features.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minllama.classification.base import evaluated
from minllama.classification.embedding import LlamaEmbeddingClassifier
from minllama.data.texts import checked_texts
from minllama.engine.states import Choice, Pooling, StatesRequest
from minllama.errors import optional_import

Features = dict[Choice, NDArray[np.float32]]

# Weight of |W|^2 / 2 beside the mean loss. What is best hardly depends on the number of rows.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)
FIRST_PENALTY = 0.3  # under which layers are compared
FINALISTS = 3  # choices that are compared under all penalties
FOLDS = 5
FIRST_FOLDS = 3  # of the five, on which all choices are compared
MAX_ROWS = 10_000  # of a cross-validation; more would change no choice


@dataclass(frozen=True)
class Selection:
    """The result of cross-validation.

    Attributes:
        choice: layer and pooling.
        penalty: weight of the L2 regularization, relative to the mean loss.
        accuracy: of the choice, on held-out folds.
        tried: accuracy over all folds of the finalists, under the penalties that were worth it.
    """

    choice: Choice
    penalty: float
    accuracy: float
    tried: Mapping[tuple[int, Pooling, float], float]


def candidate_choices(n_layers: int, pooling: Pooling | None = None) -> list[Choice]:
    """Layers and poolings worth comparing: every second layer from a third of the stack on."""
    layers = sorted({*range(n_layers, max(1, n_layers // 3) - 1, -2)})
    poolings: tuple[Pooling, ...] = ("last", "mean", "weighted-mean")
    return [(layer, p) for layer in layers for p in ((pooling,) if pooling else poolings)]


def extract_features(
    classifier: LlamaEmbeddingClassifier,
    texts: Sequence[str],
    choices: Iterable[Choice],
    *,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Compute features of texts for several layers and poolings in one forward pass.

    Args:
        classifier: its Llama and prompt are used; its own layer, pooling and head are not.
        texts: N strings.
        choices: layers and poolings.
        progress: receives the number of texts just completed.

    Returns:
        For each choice (N, D) float32, in the order of the texts.
    """
    texts, choices = checked_texts(texts), list(choices)
    llama = classifier.llama
    features = {
        choice: np.empty((len(texts), llama.config.dim), dtype=np.float32) for choice in choices
    }
    with classifier.steady() as scheduler, torch.inference_mode():
        encoded = [classifier.encode(text) for text in texts]
        requests = [StatesRequest(ids=prompt.ids, choices=tuple(choices)) for prompt in encoded]
        for indices, results in evaluated(scheduler, requests):
            for choice, vectors in zip(choices, zip(*results, strict=True), strict=True):
                features[choice][indices] = torch.stack(vectors).cpu().numpy()
            if progress is not None:
                progress(len(indices))
    return features


def select_features(
    features: Features,
    labels: Sequence[Any],
    n_classes: int,
    *,
    multi_label: bool = False,
    balanced: bool = False,
    seed: int = 0,
) -> Selection:
    """Compare layers, poolings and penalties by cross-validation.

    All choices are compared with one penalty, and the best few with weaker and stronger ones, in
    each direction until it gets worse.

    Args:
        features: for each choice (N, D).
        labels: N classes, or N collections of them if `multi_label`.
        n_classes: C.
        balanced: classes have equal weight, whatever their numbers of examples.
        seed: of the folds.
    """
    tried: dict[tuple[int, Pooling, float], float] = {}
    kind: Any = {"multi_label": multi_label, "balanced": balanced, "seed": seed}
    with _comparison(features, labels, n_classes, **kind) as right:

        def accuracy_of(choice: Choice, penalty: float) -> float:
            return float(right(choice, penalty, FOLDS)().mean())

        first = {choice: rows.mean() for choice, rows in _first_look(right, features).items()}
        middle = PENALTIES.index(FIRST_PENALTY)
        for choice in sorted(features, key=lambda choice: -first[choice])[:FINALISTS]:
            begin = tried[(*choice, FIRST_PENALTY)] = accuracy_of(choice, FIRST_PENALTY)
            for side in (PENALTIES[:middle][::-1], PENALTIES[middle + 1 :]):
                best = begin
                for penalty in side:
                    accuracy = tried[(*choice, penalty)] = accuracy_of(choice, penalty)
                    if accuracy < best:
                        break
                    best = accuracy
    (layer, pooling, penalty), accuracy = max(tried.items(), key=lambda item: item[1])
    return Selection((layer, pooling), penalty, accuracy, tried)


def right_in_cross_validation(
    features: Features, labels: Sequence[int], n_classes: int, *, seed: int = 0
) -> dict[Choice, NDArray[np.bool_]]:
    """Which texts each choice is right about, under one penalty, when its head has not seen them.

    Args:
        features, labels, n_classes, seed: as for `select_features`, with one label a text.

    Returns:
        For each choice the same texts in the same order: those of FIRST_FOLDS of the FOLDS.
    """
    kind: Any = {"multi_label": False, "balanced": False, "seed": seed}
    with _comparison(features, labels, n_classes, **kind) as right:
        return _first_look(right, features)


# Begins to compare a choice under a penalty on the first few folds, and gives what waits for it.
Begin = Callable[[Choice, float, int], Callable[[], NDArray[np.bool_]]]


def _first_look(right: Begin, features: Features) -> dict[Choice, NDArray[np.bool_]]:
    """All choices under one penalty on FIRST_FOLDS, side by side."""
    waiting = {choice: right(choice, FIRST_PENALTY, FIRST_FOLDS) for choice in features}
    return {choice: rows() for choice, rows in waiting.items()}


@contextlib.contextmanager
def _comparison(
    features: Features,
    labels: Sequence[Any],
    n_classes: int,
    *,
    multi_label: bool,
    balanced: bool,
    seed: int,
) -> Iterator[Begin]:
    """Cross-validation of choices, with parallel fits.

    Yields:
        Start the fits of a choice with a penalty on the first few folds; returns a function that
            waits
        for the result: which of these folds' rows are correct.
    """
    target = _target(labels, n_classes, multi_label=multi_label)
    rows = np.random.default_rng(seed).permutation(len(target))[:MAX_ROWS]
    folds = _folds(target[rows], seed)

    def right(choice: Choice, penalty: float, fold: NDArray[np.int64]) -> NDArray[np.bool_]:
        x = features[choice][rows]
        kind = {"multi_label": multi_label, "balanced": balanced}
        return _right_in_fold(x, target[rows], fold, penalty, **kind)

    with _fits_side_by_side() as pool:

        def begin(choice: Choice, penalty: float, n_folds: int) -> Callable[[], NDArray[np.bool_]]:
            parts = [pool.submit(right, choice, penalty, fold) for fold in folds[:n_folds]]
            return lambda: np.concatenate([part.result() for part in parts])

        yield begin


def fit_head(
    features: NDArray[np.float32],
    labels: Sequence[Any],
    n_classes: int,
    *,
    penalty: float = FIRST_PENALTY,
    multi_label: bool = False,
    balanced: bool = False,
    bias: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logistic regression on standardized features, as a head for the original features.

    Args:
        features: (N, D).
        labels: N classes, or N collections of them if `multi_label`.
        n_classes: C; one without an example gets a low constant.
        penalty: weight of |W|^2 / 2 relative to the mean loss.
        bias: the head has one; without, features keep their mean, along which a small weight is as
            good.

    Returns:
        Weight (C, D) and bias (C,), zero without one: the standardization is folded into
        them.

    Raises:
        MinllamaError: scikit-learn is missing.
    """
    target = _target(labels, n_classes, multi_label=multi_label)
    mean, scale = features.mean(0), np.maximum(features.std(0), 1e-6)
    shift = mean if bias else np.zeros_like(mean)
    with _fitting():
        weight, constant = _regression(
            (features - shift) / scale,
            target,
            penalty,
            multi_label=multi_label,
            balanced=balanced,
            intercept=bias,
        )
    weight = weight / scale
    if not bias:  # those of classes without examples: what they are at the mean, along it
        standing = mean / scale**2
        weight = weight + np.outer(constant, standing / (standing @ mean))
        constant = np.zeros_like(constant)
    constant = constant - weight @ shift
    return weight.astype(np.float32), constant.astype(np.float32)


UNSEEN = -20.0  # the logit of a class that no example has


def _regression(
    x: NDArray[np.float32],
    target: NDArray[Any],
    penalty: float,
    *,
    multi_label: bool,
    balanced: bool,
    intercept: bool = True,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight (C, D) and bias (C,) for (N, D) standardised features and an (N, C) 0-1 target.

    Without `intercept` only classes without examples, or with all of them, have a bias.
    """
    from sklearn.linear_model import LogisticRegression

    n_classes = target.shape[1]
    weight, bias = np.zeros((n_classes, x.shape[1])), np.full(n_classes, UNSEEN)

    def fitted(gold: NDArray[Any]) -> Any:
        regression = LogisticRegression(
            C=1 / (penalty * len(x)),
            max_iter=300,
            tol=1e-3,
            class_weight="balanced" if balanced else None,
            fit_intercept=intercept,
        )
        return regression.fit(x, gold)

    if multi_label:
        for label in range(n_classes):
            column = target[:, label]
            if column.any() and not column.all():
                regression = fitted(column)
                weight[label], bias[label] = regression.coef_[0], regression.intercept_[0]
            elif column.all():
                bias[label] = -UNSEEN
        return weight, bias
    gold = target.argmax(1)
    seen = np.unique(gold)
    if len(seen) == 1:
        bias[seen] = 0.0
        return weight, bias
    regression = fitted(gold)
    if len(seen) == 2:  # scikit-learn keeps one row for two classes
        weight[seen[1]], bias[seen] = regression.coef_[0], [0.0, regression.intercept_[0]]
    else:
        weight[seen], bias[seen] = regression.coef_, regression.intercept_
    return weight, bias


@contextlib.contextmanager
def _fits_side_by_side() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that fit heads in parallel."""
    with _fitting(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for all of them


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    """The context for `_regression`: no warnings, and one thread, since its matmuls are small.

    (SST-5's 8,544 rows on two cores: twice as fast as on two threads.)

    Raises:
        MinllamaError: scikit-learn is missing.
    """
    optional_import("sklearn", "fitting a head needs")
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _right_in_fold(
    x: NDArray[np.float32],
    target: NDArray[np.bool_],
    fold: NDArray[np.int64],
    penalty: float,
    *,
    multi_label: bool,
    balanced: bool,
) -> NDArray[np.bool_]:
    """Which held-out rows of a fold a head predicts correctly."""
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    x = (x - mean) / scale  # without the labels, so no fold learns of another's
    train = np.setdiff1d(np.arange(len(x)), fold)
    weight, bias = _regression(
        x[train], target[train], penalty, multi_label=multi_label, balanced=balanced
    )
    scores = x[fold] @ weight.T + bias
    if multi_label:
        return np.asarray(((scores >= 0) == target[fold]).all(1))
    return np.asarray(scores.argmax(1) == target[fold].argmax(1))


def _folds(target: NDArray[np.bool_], seed: int) -> list[NDArray[np.int64]]:
    """Stratified folds: each has its share of every class (or set of labels)."""
    n_folds = max(2, min(FOLDS, len(target)))
    random = np.random.default_rng(seed)
    order = random.permutation(len(target))
    kinds = [row.tobytes() for row in target]
    dealt = sorted(order, key=lambda i: kinds[i])
    # Of an only row there is a fold without one.
    folds = (np.asarray(dealt[start::n_folds], dtype=np.int64) for start in range(n_folds))
    return [np.sort(fold) for fold in folds]


def _target(labels: Sequence[Any], n_classes: int, *, multi_label: bool) -> NDArray[np.bool_]:
    """(N, C), true if the class is a label."""
    target = np.zeros((len(labels), n_classes), dtype=bool)
    for row, label in enumerate(labels):
        target[row, list(label) if multi_label else label] = True
    return target
