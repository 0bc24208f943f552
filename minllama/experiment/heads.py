"""Fit a head on features of a frozen Llama, for classes or for numbers.

`make_head` uses one of these classes for the kind of head, its training texts and the choice of the
layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from minllama.classification.embedding import LlamaEmbeddingClassifier, unlike_transformers
from minllama.classification.features import (
    Features,
    extract_features,
    fit_head,
    select_features,
)
from minllama.classification.layer_search import searched_features
from minllama.classification.ridge import fit_value_head, select_value_features
from minllama.data import Dataset
from minllama.data.rows import zeros
from minllama.data.task import Task
from minllama.engine.states import Choice
from minllama.evaluation.regression import TargetScale
from minllama.model.llama import Llama

STARTING_PER_CLASS = 5  # minimum number of texts of each class, if available
MOST_VALUES = 2500  # texts that go through all layers; the layer search does not reduce them
VALUE_NAME = "value"  # of a number whose column has no name


Vectors: TypeAlias = NDArray[np.float32]


class Selected(NamedTuple):
    """The best layer and pooling, with the best penalty, and a description of the result."""

    choice: Choice
    penalty: float
    merit: str


class Reading(NamedTuple):
    """The tokenizer and prompt, and the reporter."""

    reader: LlamaEmbeddingClassifier  # of any layer: only prompt and Llama matter
    progress: Callable[[int], None]  # receives the number of texts just completed
    report: Callable[[str], None]


class FittedHead(NamedTuple):
    """A linear head: C outputs of D features."""

    weight: Vectors  # (C, D)
    bias: Vectors  # (C,); zeros if the head has no bias

    def put_into(self, score: nn.Linear) -> None:
        """Set the weights of a classifier's head."""
        score.weight.data.copy_(torch.from_numpy(self.weight))
        if score.bias is not None:
            score.bias.data.copy_(torch.from_numpy(self.bias))


class HeadFitting(Protocol):
    """The interface for fitting a head on one training set."""

    def head(self, llama: Llama, choice: Choice) -> dict[str, Any]:
        """Arguments of `LlamaEmbeddingClassifier` for the kind of head."""

    def some_rows(self, n: int) -> Sequence[int]:
        """About `n` rows of the training texts, drawn at random, in order."""

    def read(self, some: Dataset, choices: Sequence[Choice], by: Reading) -> Features:
        """Features of texts for the choices to compare."""

    def select(self, features: Features, some: Dataset) -> Selected:
        """The best of the choices."""

    def fit(self, features: Vectors, some: Dataset, penalty: float, *, bias: bool) -> FittedHead:
        """Fit a head to features, (N, D), and labels."""


def head_fitting(train: Dataset, *, balanced: bool, seed: int) -> HeadFitting:
    """The implementation for the kind of labels of a training set.

    Args:
        train: with labels.
        balanced: classes have equal weight.
        seed: of folds and draws.
    """
    if train.has_numbers:
        return ValueHeads(train, seed=seed)
    return ClassHeads(train, Task.of(train, balanced=balanced, seed=seed))


class ClassHeads:
    """Logistic regressions, chosen by accuracy in cross-validation."""

    def __init__(self, train: Dataset, task: Task) -> None:
        self._train, self._task = train, task

    def head(self, llama: Llama, choice: Choice) -> dict[str, Any]:
        # Without a bias where transformers' sequence classifiers, which have none, can then compute
        # it. Otherwise a bias is free, and speeds up the fit.
        return {
            "id2label": self._train.label_names,
            "multi_label": self._task.multi_label,
            "bias": unlike_transformers(llama, *choice) is not None,
        }

    def some_rows(self, n: int) -> Sequence[int]:
        """Include some texts of each class: a head must be fitted to all classes."""
        train = self._train
        if len(train) <= n:
            return range(len(train))
        order = random_order(train, self._task.seed)
        taken, counts = set(order[:n]), [0] * len(train.label_names)
        for row in order:
            if any(counts[label] < STARTING_PER_CLASS for label in train.classes_of(row)):
                taken.add(row)
            for label in train.classes_of(row):
                counts[label] += 1
        return sorted(taken)

    def read(self, some: Dataset, choices: Sequence[Choice], by: Reading) -> Features:
        assert some.labels is not None
        return searched_features(
            *(by.reader, some.texts, some.labels, choices, self._task),
            progress=by.progress,
            report=by.report,
        )

    def select(self, features: Features, some: Dataset) -> Selected:
        assert some.labels is not None
        found = select_features(features, some.labels, self._task)
        return Selected(
            found.choice,
            found.penalty,
            f"accuracy {found.accuracy:.3f} in cross-validation on {len(some):,} training texts",
        )

    def fit(self, features: Vectors, some: Dataset, penalty: float, *, bias: bool) -> FittedHead:
        assert some.labels is not None
        fitted = fit_head(features, some.labels, self._task, penalty=penalty, bias=bias)
        return FittedHead(*fitted)


class ValueHeads:
    """Ridge regressions of standardized targets, chosen by leave-one-out errors."""

    def __init__(self, train: Dataset, *, seed: int) -> None:
        self._train, self._seed = train, seed
        self._scale = TargetScale.of(train.targets)

    def head(self, llama: Llama, choice: Choice) -> dict[str, Any]:
        return {
            "id2label": [(self._train.label_column or "").strip() or VALUE_NAME],
            "scale": self._scale,
            "bias": True,
        }

    def some_rows(self, n: int) -> Sequence[int]:
        n = min(n, MOST_VALUES)
        if len(self._train) <= n:
            return range(len(self._train))
        return sorted(random_order(self._train, self._seed)[:n])

    def read(self, some: Dataset, choices: Sequence[Choice], by: Reading) -> Features:
        return extract_features(by.reader, some.texts, choices, progress=by.progress)

    def select(self, features: Features, some: Dataset) -> Selected:
        found = select_value_features(features, self._scale.standardized(some.targets))
        return Selected(
            found.choice,
            found.penalty,
            f"R2 {found.r2:.3f} on {len(some):,} training texts, in leave-one-out cross-validation",
        )

    def fit(self, features: Vectors, some: Dataset, penalty: float, *, bias: bool) -> FittedHead:
        targets = self._scale.standardized(some.targets)
        weight, offset = fit_value_head(features, targets, penalty)
        return FittedHead(weight[None], np.array([offset], dtype=np.float32))


def random_order(dataset: Dataset, seed: int) -> "memoryview[int]":
    """The rows of a data set, shuffled."""
    generator, order = torch.Generator().manual_seed(seed), zeros("q", len(dataset))
    out = torch.from_numpy(np.asarray(order))
    torch.randperm(len(order), generator=generator, out=out)
    return order
