"""How long a rung trains, and on how many folds it is measured, in the time that is left."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minllama.experiment.ladder.budget import SAFETY, Budget
from minllama.options.training import EPOCHS

ENOUGH_ROWS = 1000  # that were measured: more folds are not trained
LEAST_PART = 2000  # training rows of a large file, on fewer of which no epoch is trained
# 77 classes gain two points from the fourth epoch on, two classes nothing (docs/lora-study.md).
MANY_CLASSES, EPOCHS_OF_MANY = 20, 8


def most_epochs(given: int | None, n_classes: int) -> int:
    """The epochs that are worth training: given ones, or by the number of classes."""
    if given is not None:
        return given
    return EPOCHS_OF_MANY if n_classes >= MANY_CLASSES else EPOCHS


class Plan(NamedTuple):
    """What is trained.

    Attributes:
        epochs: of each training.
        folds: on which it is measured beside dev.
        rows: that it is trained on: all, or a part of a large file.
    """

    epochs: int
    folds: int
    rows: int


@dataclass(frozen=True)
class TrainingTimes:
    """What a training takes.

    Attributes:
        epoch: seconds of an epoch on all training rows.
        n_train: these rows.
        to_read_train, to_read_dev: seconds to predict them.
        n_dev: rows of dev.
        fold_sizes: rows of the folds.
        once: seconds of what all trainings begin with.
    """

    epoch: float
    n_train: int
    to_read_train: float
    to_read_dev: float
    n_dev: int
    fold_sizes: Sequence[int]
    once: float = 0.0

    @property
    def least(self) -> float:
        """Seconds of the least that is trained: an epoch, of a large file on a part of its rows."""
        part = min(1.0, LEAST_PART / self.n_train)
        return part * (self.once + self.epoch) + self.to_read_dev

    def plan(self, budget: Budget, most: int) -> Plan | None:
        """As many epochs as the time allows, up to `most`, and then as many folds.

        Rows to be measured on come before more epochs than usual. If one epoch of all rows does not
        fit, as many rows as do; None if those are fewer than LEAST_PART.
        """
        for epochs in range(most, 0, -1):
            training = epochs * self.epoch
            if not budget.allows(self.once + training + self.to_read_dev):
                continue
            folds, n_rows = self._folds_beside(training, budget)
            if epochs <= EPOCHS or n_rows >= ENOUGH_ROWS or folds == len(self.fold_sizes):
                return Plan(epochs, folds, self.n_train)
        seconds = budget.left / SAFETY - self.to_read_dev
        part = int(seconds / (self.once + self.epoch) * self.n_train)
        return Plan(1, 0, part) if LEAST_PART <= part < self.n_train else None

    def _folds_beside(self, training: float, budget: Budget) -> tuple[int, int]:
        """How many folds fit beside a training on all rows, and the rows that are then measured."""
        share = 1 - 1 / len(self.fold_sizes)
        each = share * training + (1 - share) * self.to_read_train
        folds, n_rows = 0, self.n_dev
        while folds < len(self.fold_sizes) and n_rows < ENOUGH_ROWS:
            whole = self.once + training + self.to_read_dev
            if not budget.allows((folds + 1) * each + whole):
                break
            n_rows += self.fold_sizes[folds]
            folds += 1
        return folds, n_rows
