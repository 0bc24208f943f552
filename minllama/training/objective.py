"""The objective of a training, for classes or numbers: its loss, evaluation and metrics.

A training run uses one object for everything that depends on the kind of labels.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minllama.classification.prompts import EncodedPrompt
from minllama.data import Dataset
from minllama.errors import MinllamaError, OptionError
from minllama.evaluation.metrics import Evaluation, evaluate
from minllama.evaluation.registry import logged
from minllama.evaluation.regression import RegressionEvaluation, TargetScale, evaluate_regression
from minllama.options import CLASS_METRICS, VALUE_METRICS, TrainingOptions
from minllama.training.losses import Loss, SquaredError, StepLoss

WORST = -1.0  # an undefined correlation or R2 is the worst value


class Trainable(Protocol):
    """A trainable classifier, which is an `nn.Module`."""

    @property
    def multi_label(self) -> bool:
        """Whether a text may have any number of labels."""

    @property
    def labels(self) -> Sequence[str]:
        """The C names of the classes."""

    def encode(self, text: str) -> EncodedPrompt:
        """A text in its prompt, as token ids."""

    def note_shortened(self, texts: Sequence[str]) -> None:
        """Learn which of the texts other processes have shortened."""

    def compute_logits(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """(B, C), differentiable and not normalized."""

    def predict_proba(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, C) probabilities."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of `nn.Module`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of `nn.Module`."""

    def buffers(self) -> Iterator[Tensor]:
        """As of `nn.Module`."""

    def modules(self) -> Iterator[nn.Module]:
        """As of `nn.Module`."""

    def train(self) -> Any:
        """As of `nn.Module`."""


@runtime_checkable
class ValueTrainable(Trainable, Protocol):
    """A trainable regression."""

    scale: TargetScale | None

    def predict_logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, 1) outputs, in the scale."""

    def predict_values(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(N,) numbers."""


class Objective(Protocol):
    """Everything that depends on whether labels are classes or numbers."""

    def loss(self, train: Dataset, options: TrainingOptions, device: torch.device) -> StepLoss:
        """The loss of the texts of a data set."""

    def answers(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, C), the classifier's current predictions, in the form of the loss's targets."""

    def evaluate(self, dev: Dataset) -> Any:
        """Predict a labeled split and evaluate the predictions, without intervals."""

    def dev_row(self, evaluation: Any) -> dict[str, float]:
        """The metrics of an evaluation for a row of `metrics.jsonl`."""

    def merit(self, evaluation: Any, metric: str) -> float:
        """The metric that compares weights."""


def objective_of(train: Dataset, classifier: Trainable) -> Objective:
    """The objective for the labels of a training set."""
    if not train.has_numbers:
        return ClassObjective(classifier)
    assert isinstance(classifier, ValueTrainable)
    return ValueObjective(classifier)


def check_metric(metric: str, *, regression: bool) -> None:
    """Check that a metric is for the kind of labels, classes or numbers.

    Raises:
        OptionError: it is for the other kind.
    """
    supported = VALUE_METRICS if regression else CLASS_METRICS
    if metric not in supported:
        what = "numbers" if regression else "classes"
        raise OptionError(f"metric {metric} is not for {what}; use {', '.join(supported)}")


def check_kind(split: Dataset, classifier: Trainable) -> None:
    """Check that a split's labels are of the kind that a classifier predicts.

    Raises:
        MinllamaError: they are of the other kind.
    """
    scale: TargetScale | None = getattr(classifier, "scale", None)
    if split.has_numbers != (scale is not None):
        have, gives = ("numbers", "classes")[:: 1 if split.has_numbers else -1]
        raise MinllamaError(
            f"{split.source}: labels are {have}, but the classifier predicts {gives}; train one "
            f"{'with' if split.has_numbers else 'without'} --objective regression"
        )


class ClassObjective:
    """One class a text, or any number of them: cross-entropy."""

    def __init__(self, classifier: Trainable) -> None:
        self._classifier = classifier

    def loss(self, train: Dataset, options: TrainingOptions, device: torch.device) -> StepLoss:
        balanced = options.class_weights == "balanced"
        return Loss(train, balanced=balanced, device=device, ordinal=options.ordinal)

    def answers(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._classifier.predict_proba(texts)

    def evaluate(self, dev: Dataset) -> Evaluation:
        assert dev.labels is not None
        return evaluate(
            self._classifier.predict_proba(dev.texts),
            dev.labels,
            dev.label_names,
            multi_label=dev.multi_label,
            bootstrap=0,
        )

    def dev_row(self, evaluation: Evaluation) -> dict[str, float]:
        names = logged(regression=False, multi_label=evaluation.multi_label)
        return {"dev_loss": evaluation.log_loss, **_defined(evaluation, names)}

    def merit(self, evaluation: Evaluation, metric: str) -> float:
        value = evaluation.value(metric)
        return WORST if value is None else float(value)


class ValueObjective:
    """A number for each text: mean squared error of standardized targets."""

    def __init__(self, classifier: ValueTrainable) -> None:
        assert classifier.scale is not None
        self._classifier, self._scale = classifier, classifier.scale

    def loss(self, train: Dataset, options: TrainingOptions, device: torch.device) -> StepLoss:
        return SquaredError(train, self._scale, device=device)

    def answers(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._classifier.predict_logits(texts)

    def evaluate(self, dev: Dataset) -> RegressionEvaluation:
        return evaluate_regression(
            self._classifier.predict_values(dev.texts), dev.targets, bootstrap=0
        )

    def dev_row(self, evaluation: RegressionEvaluation) -> dict[str, float]:
        """The loss is that of training; metrics are in the unit of the targets."""
        loss = (evaluation.rmse / self._scale.std) ** 2
        return {"dev_loss": loss, **_defined(evaluation, logged(regression=True))}

    def merit(self, evaluation: RegressionEvaluation, metric: str) -> float:
        value = evaluation.value(metric)
        return WORST if value is None else value


def _defined(
    evaluation: Evaluation | RegressionEvaluation, names: Iterable[str]
) -> dict[str, float]:
    """The metrics of an evaluation that are defined, by their names in a training's log."""
    values = {f"dev_{name}": evaluation.value(name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
