"""Baselines without a Llama: the most frequent class, and TF-IDF with logistic regression.

They take texts and class ids and return probabilities; a report compares the classifier with
them.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minllama.data.task import Task
from minllama.data.texts import checked_texts
from minllama.errors import MinllamaError, optional_import

INVERSE_REGULARIZATION = 3.0
MANY_ROWS = 1000


class Baseline(Protocol):
    """Predicts probabilities for texts after fitting."""

    @property
    def name(self) -> str:
        """Its name for display."""

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, C): the probability of each class for each text."""


def fit_baselines(
    texts: Sequence[str],
    labels: Sequence[int | tuple[int, ...]],
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
    gold = task.target(labels)
    return MajorityBaseline(gold), TfidfBaseline(texts, gold, task)


class MajorityBaseline:
    """Predicts the class frequencies of the training texts for every text."""

    name = "majority class"

    def __init__(self, gold: NDArray[np.bool_]) -> None:
        self._shares = gold.mean(0, dtype=np.float64).astype(np.float32)  # (C,)

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.tile(self._shares, (len(texts), 1))


class TfidfBaseline:
    """Logistic regression on sublinear TF-IDF of words and pairs of words.

    Multinomial where each text has one label, otherwise one regression for each label.
    """

    name = "TF-IDF + logistic regression"

    def __init__(self, texts: Sequence[str], gold: NDArray[np.bool_], task: Task) -> None:
        of_text = optional_import("sklearn.feature_extraction.text", "baselines need")

        self._classes = gold.shape[1]
        # Each regression with the columns that it predicts.
        self._parts: list[tuple[Any, NDArray[np.int64]]] = []
        # Columns without a regression: classes without a text, or with all texts.
        self._constant = gold.mean(0, dtype=np.float64)
        self._vectorizer = of_text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        words_of = self._vectorizer.build_analyzer()
        if not any(words_of(text) for text in texts):
            return
        features = self._vectorizer.fit_transform(texts)
        if task.multi_label:
            for i, column in enumerate(gold.T):
                if column.any() and not column.all():
                    self._parts.append((_regression(features, column, task.seed), np.array([i])))
        elif gold.any(0).sum() > 1:
            regression = _regression(features, gold.argmax(1), task.seed)
            self._parts.append((regression, regression.classes_))

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float32]:
        probabilities = np.tile(self._constant, (len(texts), 1))
        if texts and self._parts:
            features = self._vectorizer.transform(texts)
            for regression, columns in self._parts:
                # The second of a label's two outputs is the probability that it applies.
                probabilities[:, columns] = regression.predict_proba(features)[:, -len(columns) :]
        return probabilities.astype(np.float32)


def _regression(features: Any, target: NDArray[Any], seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # SAGA (Defazio et al. 2014) is ten times as fast on thousands of rows, but slow on few.
    regression = (
        LogisticRegression(
            C=INVERSE_REGULARIZATION, solver="saga", tol=1e-3, max_iter=200, random_state=seed
        )
        if features.shape[0] >= MANY_ROWS
        else LogisticRegression(C=INVERSE_REGULARIZATION, max_iter=1000)
    )
    with warnings.catch_warnings():
        # For uninformative texts, iterations cannot distinguish the optimum from rounding.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return regression.fit(features, target)
