"""Losses: cross-entropy over classes, binary cross-entropy per label, squared error of numbers.

The loss of a step is the mean over all of its texts, however many batches they are split into.
"""

from collections.abc import Sequence
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
        check_ordinal(ordinal, multi_label=dataset.multi_label)
        self.multi_label = dataset.multi_label
        self._dataset, self._device, self._ordinal = dataset, device, ordinal
        self._n_classes = len(dataset.label_names)
        self._prior: Tensor | None = None
        self._share = 0.0
        self.weights: Tensor | None = None
        if balanced:
            n_texts = len(dataset)
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
        self._prior, self._share = prior.to(self._device, torch.float32), share

    def _classes(self, texts: Sequence[int]) -> Tensor:
        """(B,): the class of each text, if it has one."""
        labels = self._dataset.labels
        assert labels is not None
        return torch.tensor([labels[text] for text in texts], device=self._device)

    def _targets(self, texts: Sequence[int]) -> Tensor:
        """The texts' own targets, (B, C) float32."""
        if self.multi_label:
            targets = torch.zeros(len(texts), self._n_classes)
            for row, text in zip(targets, texts, strict=True):
                row[list(self._dataset.classes_of(text))] = 1
            return targets.to(self._device)
        own = self._classes(texts)
        if not self._ordinal:
            return F.one_hot(own, self._n_classes).to(torch.float32)
        classes = torch.arange(self._n_classes, device=self._device)
        distance = (classes - own[:, None]).to(torch.float32)  # (B, C)
        return torch.softmax(-distance.square() / (2 * self._ordinal**2), dim=-1)

    def normalizer(self, texts: list[int]) -> float:
        """The divisor that turns the sum of a step's losses into their mean."""
        if self.multi_label:
            return float(len(texts) * self._n_classes)
        if self.weights is None:
            return float(len(texts))
        return float(self.weights[self._classes(texts)].sum())

    def summed(self, logits: Tensor, texts: list[int]) -> Tensor:
        """The losses of a batch, added up: (B, C) logits of these B texts -> a scalar.

        In float32 at least, whatever multiplied the matrices.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = None if self.weights is None else self.weights.to(logits.dtype)
        if not (self.multi_label or self._ordinal or self._share):
            targets = self._classes(texts)
            return F.cross_entropy(logits, targets, weight=weights, reduction="sum")
        soft = self._targets(texts)
        if self._prior is not None:
            soft = torch.lerp(soft, self._prior[texts], self._share)
        soft = soft.to(logits.dtype)
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(
                logits, soft, pos_weight=weights, reduction="sum"
            )
        losses = F.cross_entropy(logits, soft, reduction="none")
        # Weighted by the text's own class, as in `normalizer`, even if the target is soft.
        return losses.sum() if weights is None else (weights[self._classes(texts)] * losses).sum()


class SquaredError:
    """The mean squared error of standardized targets.

    Args:
        dataset: N texts with numeric targets.
        scale: of the head's output.
        device: of its outputs.
    """

    def __init__(self, dataset: Dataset, scale: TargetScale, *, device: torch.device) -> None:
        self._dataset, self._scale, self._device = dataset, scale, device
        self._prior: Tensor | None = None
        self._share = 0.0

    def share_with(self, prior: Tensor, share: float) -> None:
        """As `Loss.share_with`, of outputs (N, 1)."""
        self._prior, self._share = prior[:, 0].to(self._device, torch.float32), share

    def normalizer(self, texts: list[int]) -> float:
        """Their number."""
        return float(len(texts))

    def summed(self, logits: Tensor, texts: list[int]) -> Tensor:
        """(B, 1) outputs of these B texts -> the sum of their squared errors, in float32."""
        outputs = logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
        standardized = self._scale.standardized([self._dataset.targets[text] for text in texts])
        targets = torch.from_numpy(standardized).to(self._device, torch.float32)  # (B,)
        if self._prior is not None:
            targets = torch.lerp(targets, self._prior[texts], self._share)
        return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum")


def check_ordinal(ordinal: float, *, multi_label: bool) -> None:
    """Check that classes can be ordered.

    Raises:
        MinllamaError: `ordinal` for texts with several labels.
    """
    if ordinal and multi_label:
        raise MinllamaError("multi-label classes have no order; omit --ordinal")
