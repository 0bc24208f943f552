"""TF-IDF of words and characters with logistic regression, in plain values that JSON can hold.

The baseline of a report and the frozen classifier fit it; the latter is saved with it, and reads
texts without scikit-learn, which only fits it.
"""

import math
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.data.task import Task
from minllama.errors import optional_import

WORD = re.compile(r"\b\w\w+\b")
CHARACTERS = (2, 5)  # n-grams of characters within words
MIN_DOCUMENTS = 2  # in which an n-gram of characters occurs; words count from the first on
MOST_TERMS = 200_000  # the most frequent ones
# Texts that are fitted to, at 0.6 milliseconds each on two cores.
MOST_TEXTS = 100_000
KEPT_COUNTS = 10_000  # texts whose counts stay in memory, where 19 words take 21 KB
# Inverse regularization, as scikit-learn's C: few rows of many classes need more than the rest.
INVERSE_PENALTIES = (1.0, 3.0, 10.0, 30.0)
UNSEEN = -20.0  # the logit of a class without a text

Logits = NDArray[np.float64]


def terms_of(text: str) -> Iterator[str]:
    """The n-grams of a text in lower case: one and two words, two to five characters in words.

    Words are as scikit-learn's `TfidfVectorizer` has them, and characters are those of its
    analyzer `char_wb`, after a `#` that tells them from words.
    """
    text = text.lower()
    words = WORD.findall(text)
    yield from words
    for one, other in pairwise(words):
        yield f"{one} {other}"
    least, most = CHARACTERS
    for word in text.split():
        padded = f" {word} "
        for n in range(least, most + 1):
            if len(padded) <= n:
                yield f"#{padded}"
                break  # a short word counts once
            for start in range(len(padded) - n + 1):
                yield f"#{padded[start : start + n]}"


@dataclass(frozen=True)
class Vocabulary:
    """The terms of some texts, with their weights.

    Attributes:
        index: term -> column, 0 to V - 1.
        idf: (V,) float32, log((1 + N) / (1 + documents of the term)) + 1.
    """

    index: Mapping[str, int]
    idf: NDArray[np.float32]

    @classmethod
    def of(cls, counted: Iterable[Mapping[str, int]]) -> "Vocabulary":
        """That of N texts, whose terms are counted."""
        documents: Counter[str] = Counter()
        n_texts = 0
        for terms in counted:
            documents.update(terms.keys())
            n_texts += 1
        kept = [
            (term, n)
            for term, n in documents.items()
            if n >= MIN_DOCUMENTS or not term.startswith("#")
        ]
        if len(kept) > MOST_TERMS:
            kept = sorted(kept, key=lambda pair: (-pair[1], pair[0]))[:MOST_TERMS]
        kept.sort()
        idf = [math.log((1 + n_texts) / (1 + n)) + 1 for _, n in kept]
        index = {term: column for column, (term, _) in enumerate(kept)}
        return cls(index, np.asarray(idf, dtype=np.float32))

    @cached_property
    def _are_characters(self) -> NDArray[np.bool_]:
        """(V,), whether a term is of characters."""
        found = np.zeros(len(self.index), dtype=np.bool_)
        found[[column for term, column in self.index.items() if term.startswith("#")]] = True
        return found

    def vector(self, counts: Mapping[str, int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Columns and values of a text: (1 + log count) x idf, of length 1 for each kind of term.

        Words and characters are normalized apart, so that neither outweighs the other.
        """
        index = self.index
        known = [(index[term], n) for term, n in counts.items() if term in index]
        pairs = np.array(known, dtype=np.int64).reshape(-1, 2)
        columns, numbers = pairs[pairs[:, 0].argsort()].T
        values = (1 + np.log(numbers)).astype(np.float32) * self.idf[columns]
        are_characters = self._are_characters[columns]
        for part in (are_characters, ~are_characters):
            norm = float(np.sqrt((values[part] ** 2).sum()))
            if norm:
                values[part] /= norm
        return columns, values

    def matrix(self, counted: Iterable[Mapping[str, int]]) -> Any:
        """(N, V), a sparse matrix of scipy."""
        sparse = optional_import("scipy.sparse", "TF-IDF needs")
        columns, values, ends = array("i"), array("f"), array("q", [0])
        for counts in counted:
            of_text, numbers = self.vector(counts)
            columns.frombytes(of_text.astype(np.int32).tobytes())
            values.frombytes(numbers.tobytes())
            ends.append(len(columns))
        shape = (len(ends) - 1, len(self.index))
        parts = np.frombuffer(values, np.float32), np.frombuffer(columns, np.int32), np.array(ends)
        return sparse.csr_matrix(parts, shape=shape)


def counted(texts: Sequence[str]) -> Iterable[Counter[str]]:
    """The terms of each text with their numbers, in each pass over the result."""
    recounted = _Counted(texts)
    return list(recounted) if len(texts) <= KEPT_COUNTS else recounted


class _Counted:
    """Counts the terms of many texts in each pass over them again."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __iter__(self) -> Iterator[Counter[str]]:
        return (Counter(terms_of(text)) for text in self._texts)


@dataclass(frozen=True)
class TfidfModel:
    """Logits of texts that are linear in their TF-IDF.

    Attributes:
        vocabulary: V terms.
        weight: (V, C) float32, of values that float16 holds exactly.
        bias: (C,) float32.
    """

    vocabulary: Vocabulary
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, C)."""
        rows = np.tile(self.bias, (len(texts), 1))
        for row, counts in zip(rows, _Counted(texts), strict=True):
            columns, values = self.vocabulary.vector(counts)
            row += values @ self.weight[columns]
        return rows


def fit_tfidf(
    texts: Sequence[str],
    gold: NDArray[np.bool_],
    task: Task,
    inverse_penalty: float,
    *,
    most: int = MOST_TEXTS,
) -> TfidfModel:
    """Logistic regression on the TF-IDF of N texts: multinomial, or one for each of many labels.

    Args:
        texts: N strings.
        gold: (N, C).
        task: what the labels are.
        inverse_penalty: scikit-learn's C.
        most: texts that are fitted to; of more so many are drawn.

    Raises:
        MinllamaError: scikit-learn is missing.
    """
    if len(texts) > most:
        rows = drawn_rows(len(texts), most, task.seed)
        texts, gold = [texts[row] for row in rows], gold[rows]
    counts = counted(texts)
    vocabulary = Vocabulary.of(counts)
    weight, bias = _regression(vocabulary.matrix(counts), gold, task, inverse_penalty)
    return TfidfModel(vocabulary, weight.astype(np.float16).astype(np.float32), bias)


def drawn_rows(n: int, most: int, seed: int) -> NDArray[np.int64]:
    """At most so many of N rows, drawn at random, in order."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:most])


def out_of_fold_logits(
    texts: Sequence[str],
    gold: NDArray[np.bool_],
    task: Task,
    folds: Sequence[NDArray[np.int64]],
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
) -> dict[float, Logits]:
    """Logits (N, C) of each text by a model that was not fitted to it, for each penalty.

    Args:
        texts, gold, task: as for `fit_tfidf`; their counts are kept in memory.
        folds: rows that are left out together; those in none have logits of zero.
        inverse_penalties: to try.
    """
    counts = list(_Counted(texts))
    found = {inverse: np.zeros(gold.shape) for inverse in inverse_penalties}
    for fold in folds:
        train = np.setdiff1d(np.arange(len(texts)), fold)
        vocabulary = Vocabulary.of([counts[i] for i in train])
        seen = vocabulary.matrix([counts[i] for i in train])
        held = vocabulary.matrix([counts[i] for i in fold])
        for inverse, logits in found.items():
            weight, bias = _regression(seen, gold[train], task, inverse)
            logits[fold] = held @ weight + bias
    return found


def _regression(
    features: Any, gold: NDArray[np.bool_], task: Task, inverse: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight (V, C) and bias (C,)."""
    linear_model = optional_import("sklearn.linear_model", "fitting TF-IDF needs")
    from sklearn.exceptions import ConvergenceWarning

    def fitted(target: NDArray[Any]) -> Any:
        balance = "balanced" if task.balanced else None
        regression = linear_model.LogisticRegression(
            C=inverse, max_iter=200, tol=1e-4, class_weight=balance
        )
        with warnings.catch_warnings():
            # For uninformative texts, iterations cannot tell the optimum from rounding.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return regression.fit(features, target)

    n_classes = gold.shape[1]
    weight = np.zeros((features.shape[1], n_classes), dtype=np.float32)
    bias = np.full(n_classes, UNSEEN, dtype=np.float32)
    if task.multi_label:
        for label, column in enumerate(gold.T):
            if column.all():
                bias[label] = -UNSEEN
            elif column.any() and features.shape[1]:
                regression = fitted(column)
                weight[:, label], bias[label] = regression.coef_[0], regression.intercept_[0]
        return weight, bias
    seen = np.flatnonzero(gold.any(0))
    if len(seen) == 1 or not features.shape[1]:
        bias[seen] = np.log(gold.mean(0)[seen])
        return weight, bias
    regression = fitted(gold.argmax(1))
    if len(seen) == 2:  # scikit-learn keeps one row for two classes
        weight[:, seen[1]] = regression.coef_[0]
        bias[seen] = 0.0, regression.intercept_[0]
    else:
        weight[:, seen], bias[seen] = regression.coef_.T, regression.intercept_
    return weight, bias
