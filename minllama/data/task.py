"""A classification task as one value, to which heads and baselines are fitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minllama.data.types import Dataset


@dataclass(frozen=True)
class Task:
    """The labels to predict, and the weights of the classes.

    Attributes:
        n_classes: number C of classes, whether or not each has an example.
        multi_label: a text may have any number of classes; labels are collections of them.
        balanced: classes have equal weight, whatever their numbers of examples.
        seed: of random draws, such as the folds of a cross-validation.
    """

    n_classes: int
    multi_label: bool = False
    balanced: bool = False
    seed: int = 0

    @classmethod
    def of(cls, train: Dataset, *, balanced: bool = False, seed: int = 0) -> "Task":
        """The task of a labeled data set."""
        return cls(len(train.label_names), train.multi_label, balanced, seed)

    def target(self, labels: Sequence[Any]) -> NDArray[np.bool_]:
        """The labels of N texts as (N, C), true if the class is a label."""
        target = np.zeros((len(labels), self.n_classes), dtype=np.bool_)
        for row, label in zip(target, labels, strict=True):
            classes = list(label) if self.multi_label else [label]
            assert min(classes, default=0) >= 0, "a text without a label"
            row[classes] = True
        return target
