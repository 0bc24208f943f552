"""Losses: cross-entropy over classes, binary cross-entropy per label, squared error of numbers.

The loss of a step is the mean over all of its texts, however many batches they are split into.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minllama.data import Dataset
from minllama.errors import MinllamaError
from minllama.evaluation.regression import TargetScale


class StepLoss(Protocol):
    """The loss of the texts of a step, in any number of batches."""

    def share_with(self, prior: Tensor, share: float) -> None:
        """Mix another classifier's predictions, (N, C), into the targets."""

    def normalizer(self, texts: list[int]) -> float:
        """The divisor that turns the sum of a step's losses into their mean."""

    def summed(self, logits: Tensor, texts: list[int]) -> Tensor:
        """The sum of a batch's losses: (B, C) logits of these B texts -> a scalar."""


class Loss:
    """The loss of batches of one data set.

    One label a text: cross-entropy, with weights the weighted mean. Several: binary cross-entropy,
    the mean over texts and labels. Both are in nats, as `Evaluation.log_loss` is.

    Args:
        dataset: N labeled texts.
        balanced: weight classes by inverse frequency. With one label per text, by N / (C' n) for a
            class of n texts among C' that occur; with several, texts with and without a label have
            the same total weight (except if none or all have it).
        device: of the logits.
        ordinal: classes are ordered by id, and targets are smoothed over neighboring classes:
            exp(-d^2 / (2 ordinal^2)) for one d classes away, normalized to sum to 1 (Diaz & Marathe
            2019, "Soft Labels for Ordinal Regression", section 3, with the squared distance). 0 for
            no smoothing.

    Raises:
        MinllamaError: `ordinal` for texts with several labels.

    Attributes:
        weights: (C,) float32 on that device; None if all are equal.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        balanced: bool,
        device: torch.device,
        ordinal: float = 0.0,
    ) -> None:
        assert dataset.labels is not None
        self.multi_label = dataset.multi_label
        n_texts, n_classes = len(dataset), len(dataset.label_names)
        if self.multi_label:
            targets = torch.zeros(n_texts, n_classes)
            for text in range(n_texts):
                targets[text, list(dataset.classes_of(text))] = 1
            self._targets = targets.to(device)  # (N, C)
        else:
            self._targets = torch.tensor(dataset.labels, device=device)  # (N,)
        check_ordinal(ordinal, multi_label=self.multi_label)
        self._ordinal, self._n_classes = ordinal, n_classes
        # (N, C) targets, each in parts; None where each is one class, or yes and no.
        self._soft = self._soft_targets() if ordinal else None
        self.weights: Tensor | None = None
        if balanced:
            counts = torch.tensor(dataset.class_counts(), dtype=torch.float32)  # (C,)
            if self.multi_label:
                usable = (counts > 0) & (counts < n_texts)
                weights = (n_texts - counts) / counts.clamp(min=1)
            else:
                usable = counts > 0
                weights = n_texts / (usable.sum() * counts.clamp(min=1))
            self.weights = torch.where(usable, weights, 1.0).to(device)

    def share_with(self, prior: Tensor, share: float) -> None:
        """Mix another classifier's probabilities, (N, C), into the targets.

        (Li & Hoiem 2016, "Learning without Forgetting", equation 2, at temperature 1.)

        Args:
            prior: of the N texts.
            share: from 0 to less than 1.
        """
        soft = self._soft_targets()
        self._soft = torch.lerp(soft, prior.to(soft), share)

    def _soft_targets(self) -> Tensor:
        """The data set's own targets as (N, C) float32."""
        if self.multi_label:
            return self._targets
        if not self._ordinal:
            return F.one_hot(self._targets, self._n_classes).to(torch.float32)
        classes = torch.arange(self._n_classes, device=self._targets.device)
        distance = (classes - self._targets[:, None]).to(torch.float32)  # (N, C)
        return torch.softmax(-distance.square() / (2 * self._ordinal**2), dim=-1)

    def normalizer(self, texts: list[int]) -> float:
        """The divisor that turns the sum of a step's losses into their mean."""
        if self.multi_label:
            return float(self._targets[texts].numel())
        if self.weights is None:
            return float(len(texts))
        return float(self.weights[self._targets[texts]].sum())

    def summed(self, logits: Tensor, texts: list[int]) -> Tensor:
        """The losses of a batch, added up: (B, C) logits of these B texts -> a scalar.

        In float32 at least, whatever multiplied the matrices.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = self._targets[texts]
        weights = None if self.weights is None else self.weights.to(logits.dtype)
        soft = None if self._soft is None else self._soft[texts].to(logits.dtype)
        if self.multi_label:
            targets = targets.to(logits.dtype) if soft is None else soft
            return F.binary_cross_entropy_with_logits(
                logits, targets, pos_weight=weights, reduction="sum"
            )
        if soft is not None:
            losses = F.cross_entropy(logits, soft, reduction="none")
            # Weighted by the text's own class, as in `normalizer`, even if the target is soft.
            return losses.sum() if weights is None else (weights[targets] * losses).sum()
        return F.cross_entropy(logits, targets, weight=weights, reduction="sum")


class SquaredError:
    """The mean squared error of standardized targets.

    Args:
        dataset: N texts with numeric targets.
        scale: of the head's output.
        device: of its outputs.
    """

    def __init__(self, dataset: Dataset, scale: TargetScale, *, device: torch.device) -> None:
        targets = scale.standardized(dataset.targets)
        self._targets = torch.from_numpy(targets).to(device, torch.float32)  # (N,)

    def share_with(self, prior: Tensor, share: float) -> None:
        """As `Loss.share_with`, of outputs (N, 1)."""
        self._targets = torch.lerp(self._targets, prior[:, 0].to(self._targets), share)

    def normalizer(self, texts: list[int]) -> float:
        """Their number."""
        return float(len(texts))

    def summed(self, logits: Tensor, texts: list[int]) -> Tensor:
        """(B, 1) outputs of these B texts -> the sum of their squared errors, in float32."""
        outputs = logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
        return F.mse_loss(outputs, self._targets[texts].to(outputs.dtype), reduction="sum")


def check_ordinal(ordinal: float, *, multi_label: bool) -> None:
    """Check that classes can be ordered.

    Raises:
        MinllamaError: `ordinal` for texts with several labels.
    """
    if ordinal and multi_label:
        raise MinllamaError("multi-label classes have no order; omit --ordinal")
