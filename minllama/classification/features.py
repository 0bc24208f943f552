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
from torch import Tensor

from minllama.classification.base import Classifier, evaluated
from minllama.classification.prompts import EncodedPrompt
from minllama.data.task import Task
from minllama.data.texts import checked_texts
from minllama.distributed.ranks import current
from minllama.engine.states import Choice, Pooling, StatesRequest, states_of
from minllama.errors import optional_import

Features = dict[Choice, NDArray[np.float32]]

# Weight of |W|^2 / 2 beside the mean loss. What is best hardly depends on the number of rows.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)
FIRST_PENALTY = 0.3  # at which layers are compared
FINALISTS = 3  # choices that are compared at all penalties
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
        tried: accuracy over all folds of the finalists, at the penalties that were tried.
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
    classifier: Classifier,
    texts: Sequence[str],
    choices: Iterable[Choice],
    *,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Compute features of texts for several layers and poolings in one forward pass.

    Several processes that train together divide the texts among them.

    Args:
        classifier: its Llama and prompt are used; its own layers and heads are not.
        texts: N strings.
        choices: layers and poolings.
        progress: receives the number of texts just completed.

    Returns:
        For each choice (N, D) float32, in the order of the texts.
    """
    # In the same order in all processes, which sets are not.
    every, choices, ranks = checked_texts(texts), sorted(choices), current()
    llama, total, texts = classifier.llama, len(every), ranks.part_of_texts(every)
    progress = ranks.advanced(progress, total)
    features = {
        choice: np.empty((len(texts), llama.config.dim), dtype=np.float32) for choice in choices
    }
    encoded = [classifier.encode(text) for text in texts]
    for indices, vectors in _vectors(classifier, encoded, choices, progress):
        for choice, of_choice in zip(choices, vectors, strict=True):
            features[choice][indices] = of_choice.cpu().numpy()
    classifier.note_shortened(every)
    return {choice: ranks.joined_rows(rows, total) for choice, rows in features.items()}


def _vectors(
    classifier: Classifier,
    prompts: Sequence[EncodedPrompt],
    choices: Sequence[Choice],
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Indices of some texts, and their vectors (n, D) of each choice, batch by batch."""

    def request(prompt: EncodedPrompt) -> StatesRequest:
        return StatesRequest(ids=prompt.ids, choices=tuple(choices))

    if classifier.evaluator is not None:
        yield from classifier.evaluator.evaluated(
            classifier,
            prompts,
            lambda twin, some: states_of(twin.llama, [request(prompt) for prompt in some]),
            progress=progress,
        )
        return
    with classifier.steady() as scheduler, torch.inference_mode():
        for indices, results in evaluated(scheduler, [request(p) for p in prompts]):
            yield indices, [torch.stack(vectors) for vectors in zip(*results, strict=True)]
            if progress is not None:
                progress(len(indices))


def select_features(
    features: Features,
    labels: Sequence[Any],
    task: Task,
) -> Selection:
    """Compare layers, poolings and penalties by cross-validation.

    All choices are compared with one penalty, and the best few with weaker and stronger ones, in
    each direction until it gets worse.

    Args:
        features: for each choice (N, D).
        labels: of the N texts.
        task: what the labels are.
    """
    tried: dict[tuple[int, Pooling, float], float] = {}
    with _comparison(features, labels, task) as right:

        def accuracy_of(choice: Choice, penalty: float) -> float:
            return float(right(choice, penalty, FOLDS)().mean())

        first = {
            choice: rows.mean() for choice, rows in _compared_at_first(right, features).items()
        }
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
    features: Features, labels: Sequence[int], task: Task
) -> dict[Choice, NDArray[np.bool_]]:
    """Which texts each choice predicts correctly, by heads that were not fitted to them.

    Args:
        features, labels, task: as for `select_features`, with one label per text.

    Returns:
        For each choice the same texts in the same order: those of FIRST_FOLDS of the FOLDS.
    """
    with _comparison(features, labels, task) as right:
        return _compared_at_first(right, features)


# Starts to compare a choice at a penalty on the first few folds; returns a wait for the result.
Begin = Callable[[Choice, float, int], Callable[[], NDArray[np.bool_]]]


def _compared_at_first(right: Begin, features: Features) -> dict[Choice, NDArray[np.bool_]]:
    """All choices at one penalty on FIRST_FOLDS, in parallel."""
    waiting = {choice: right(choice, FIRST_PENALTY, FIRST_FOLDS) for choice in features}
    return {choice: rows() for choice, rows in waiting.items()}


@contextlib.contextmanager
def _comparison(
    features: Features,
    labels: Sequence[Any],
    task: Task,
) -> Iterator[Begin]:
    """Cross-validation of choices, with parallel fits.

    Yields:
        A function that starts the fits of a choice with a penalty on the first few folds, and
        returns another that waits for the result: which of these folds' rows are correct.
    """
    target = task.target(labels)
    rows = np.random.default_rng(task.seed).permutation(len(target))[:MAX_ROWS]
    folds = stratified_folds(target[rows], task.seed)

    def right(choice: Choice, penalty: float, fold: NDArray[np.int64]) -> NDArray[np.bool_]:
        return _right_in_fold(features[choice][rows], target[rows], fold, penalty, task)

    with parallel_fits() as pool:

        def begin(choice: Choice, penalty: float, n_folds: int) -> Callable[[], NDArray[np.bool_]]:
            parts = [pool.submit(right, choice, penalty, fold) for fold in folds[:n_folds]]
            return lambda: np.concatenate([part.result() for part in parts])

        yield begin


def fit_head(
    features: NDArray[np.float32],
    labels: Sequence[Any],
    task: Task,
    *,
    penalty: float = FIRST_PENALTY,
    bias: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logistic regression on standardized features, as a head for the original features.

    Args:
        features: (N, D).
        labels: of the N texts.
        task: what the labels are; a class without an example gets a low constant.
        penalty: weight of |W|^2 / 2 relative to the mean loss.
        bias: the head has one; without, features keep their mean, along which a small weight is as
            good.

    Returns:
        Weight (C, D) and bias (C,), zero without one: the standardization is folded into
        them.

    Raises:
        MinllamaError: scikit-learn is missing.
    """
    target = task.target(labels)
    mean, scale = features.mean(0), np.maximum(features.std(0), 1e-6)
    shift = mean if bias else np.zeros_like(mean)
    with single_threaded_fits():
        weight, constant = _regression(
            (features - shift) / scale, target, penalty, task, intercept=bias
        )
    weight = weight / scale
    if not bias:  # constants of classes without examples become weights along the mean
        along_mean = mean / scale**2
        weight = weight + np.outer(constant, along_mean / (along_mean @ mean))
        constant = np.zeros_like(constant)
    constant = constant - weight @ shift
    return weight.astype(np.float32), constant.astype(np.float32)


UNSEEN = -20.0  # the logit of a class that no example has


def _regression(
    x: NDArray[np.float32],
    target: NDArray[Any],
    penalty: float,
    task: Task,
    *,
    intercept: bool = True,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight (C, D) and bias (C,) for (N, D) standardized features and an (N, C) 0-1 target.

    Without `intercept` only classes without examples, or with all of them, have a bias.
    """
    from sklearn.linear_model import LogisticRegression

    weight, bias = np.zeros((task.n_classes, x.shape[1])), np.full(task.n_classes, UNSEEN)

    def fitted(gold: NDArray[Any]) -> Any:
        regression = LogisticRegression(
            C=1 / (penalty * len(x)),
            max_iter=300,
            tol=1e-3,
            class_weight="balanced" if task.balanced else None,
            fit_intercept=intercept,
        )
        return regression.fit(x, gold)

    if task.multi_label:
        for label in range(task.n_classes):
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
def parallel_fits() -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that fit heads in parallel."""
    with single_threaded_fits(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for all of them


@contextlib.contextmanager
def single_threaded_fits() -> Iterator[None]:
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
    task: Task,
) -> NDArray[np.bool_]:
    """Which held-out rows of a fold a head predicts correctly."""
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    x = (x - mean) / scale  # without the labels, so nothing leaks between folds
    train = np.setdiff1d(np.arange(len(x)), fold)
    weight, bias = _regression(x[train], target[train], penalty, task)
    scores = x[fold] @ weight.T + bias
    if task.multi_label:
        return np.asarray(((scores >= 0) == target[fold]).all(1))
    return np.asarray(scores.argmax(1) == target[fold].argmax(1))


def stratified_folds(target: NDArray[np.bool_], seed: int) -> list[NDArray[np.int64]]:
    """Stratified folds: each has its share of every class (or set of labels)."""
    n_folds = max(2, min(FOLDS, len(target)))
    random = np.random.default_rng(seed)
    order = random.permutation(len(target))
    _, strata = np.unique(target, axis=0, return_inverse=True)
    dealt = order[np.argsort(strata.reshape(-1)[order], kind="stable")]
    # A single row leaves a fold empty.
    return [np.sort(dealt[start::n_folds]) for start in range(n_folds)]
