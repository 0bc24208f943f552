"""Baselines without a Llama: the most frequent class, and TF-IDF with logistic regression.

They take texts and class ids and return probabilities; a report compares the classifier with
them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minllama.data import Labels
from minllama.data.task import Task
from minllama.data.texts import checked_texts
from minllama.errors import MinllamaError
from minllama.evaluation.tfidf import drawn_rows, fit_tfidf, out_of_fold_logits

INVERSE_REGULARIZATION = 3.0
FEWEST_ROWS = 20  # of which folds say something
MOST_ROWS = 2000  # of a cross-validation
MOST_TEXTS = 20_000  # that TF-IDF is fitted to; these take 12 seconds on two cores
SECONDS_A_TEXT = 0.0006
FOLDS = 3


class Baseline(Protocol):
    """Predicts probabilities for texts after fitting."""

    @property
    def name(self) -> str:
        """Its name for display."""

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, C): the probability of each class for each text."""


def fit_baselines(
    texts: Sequence[str],
    labels: Labels,
    task: Task,
) -> tuple[Baseline, ...]:
    """Fit every baseline.

    Args:
        texts: N training texts.
        labels: of the N texts; a class may be without one.
        task: what the labels are; its seed is of the order in which logistic regression visits the
            texts. Classes are not balanced.

    Raises:
        MinllamaError: there are no texts, or scikit-learn is missing.
    """
    texts = checked_texts(texts)
    if not texts:
        raise MinllamaError("cannot fit baselines: there are no training texts; give at least one")
    assert len(labels) == len(texts)
    counts = np.zeros(task.n_classes, dtype=np.int64)
    for label in labels:
        classes = [label] if isinstance(label, int) else list(label)
        assert min(classes, default=0) >= 0, "a text without a label"
        counts[classes] += 1
    shares = counts / len(labels)
    return MajorityBaseline(shares), TfidfBaseline(texts, labels, task, shares)


class MajorityBaseline:
    """Predicts the class frequencies of the training texts for every text."""

    name = "majority class"

    def __init__(self, shares: NDArray[np.float64]) -> None:
        self._shares = shares.astype(np.float32)  # (C,)

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.tile(self._shares, (len(texts), 1))


class TfidfBaseline:
    """Logistic regression on TF-IDF of words, pairs of words, and characters in words.

    As strong as TF-IDF can be: its penalty is chosen by cross-validation on the training texts. If
    there are more than MOST_TEXTS, it is fitted to that many, drawn at random.
    Multinomial where each text has one label, otherwise one regression for each label.
    """

    name = "TF-IDF + logistic regression"

    def __init__(
        self, texts: Sequence[str], labels: Labels, task: Task, shares: NDArray[np.float64]
    ) -> None:
        task = replace(task, balanced=False)
        self._multi_label = task.multi_label
        self._constant = shares
        self._never, self._always = shares == 0, shares == 1
        inverse = _best_penalty(texts, labels, task)
        rows = drawn_rows(len(texts), MOST_TEXTS, task.seed)
        gold = task.target([labels[row] for row in rows])
        self._model = fit_tfidf([texts[row] for row in rows], gold, task, inverse)

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if not self._model.vocabulary.index:  # without a word, the frequencies of the classes
            return np.tile(self._constant, (len(texts), 1)).astype(np.float32)
        logits = self._model.logits(texts).astype(np.float64)
        if self._multi_label:
            p = 1 / (1 + np.exp(-logits))
            p[:, self._always] = 1
            p[:, self._never] = 0
        else:
            p = np.exp(logits - logits.max(1, keepdims=True))
            p[:, self._never] = 0
            p /= p.sum(1, keepdims=True)
        return np.asarray(p, dtype=np.float32)


def _best_penalty(texts: Sequence[str], labels: Labels, task: Task) -> float:
    """scikit-learn's C with most correct held-out rows."""
    if len(texts) < FEWEST_ROWS:
        return INVERSE_REGULARIZATION
    rows = np.random.default_rng(task.seed).permutation(len(texts))[:MOST_ROWS]
    texts, gold = [texts[i] for i in rows], task.target([labels[i] for i in rows])
    folds = [np.arange(start, len(rows), FOLDS) for start in range(FOLDS)]
    right = {}
    for inverse, logits in out_of_fold_logits(texts, gold, task, folds).items():
        found = logits >= 0 if task.multi_label else np.eye(gold.shape[1])[logits.argmax(1)] > 0
        right[inverse] = int((found == gold).all(1).sum())
    return max(right, key=lambda inverse: right[inverse])
