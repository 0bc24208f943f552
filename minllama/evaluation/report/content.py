"""The content of a report: predictions, evaluations, settings and history, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from minllama.evaluation.metrics import Evaluation, Label, is_labelled, predictions
from minllama.evaluation.paired import Paired, compare
from minllama.evaluation.regression import RegressionEvaluation
from minllama.evaluation.report.comparison import verdict
from minllama.evaluation.report.value_comparison import verdict as verdict_of_values
from minllama.evaluation.thresholds import Thresholds


@dataclass(frozen=True, eq=False)
class ReportedSplit:
    """The predictions for one file of texts.

    Attributes:
        name: what it is called: dev, test.
        texts: N.
        probabilities: (N, C).
        labels: N classes, or N collections of classes; `None` or -1 for rows without a label.
        evaluation: of the rows that have a label; `None` where none has.
        others: evaluations of other systems on the same rows, by name: the baselines, the
            zero-shot start.
        headline: the metric that the verdict is about.
    """

    name: str
    texts: Sequence[str]
    probabilities: NDArray[np.floating[Any]]
    labels: Sequence[Label] | None = None
    evaluation: Evaluation | None = None
    others: Mapping[str, Evaluation] = field(default_factory=dict)
    headline: str = "accuracy"

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.probabilities)
        assert self.labels is None or len(self.labels) == len(self.texts)

    @cached_property
    def paired(self) -> dict[str, Paired]:
        """The classifier beside each of the others, row by row, by their names."""
        own = self.evaluation
        return {} if own is None else {name: compare(own, it) for name, it in self.others.items()}

    @property
    def verdict(self) -> str:
        """What the metrics come to, in a sentence or two; "" without an evaluation."""
        own = self.evaluation
        return "" if own is None else verdict(own, self.others, self.headline)

    def gold(self, row: int) -> tuple[int, ...] | None:
        """The classes that a row has, or `None` where nobody has said."""
        label = None if self.labels is None else self.labels[row]
        if not is_labelled(label):
            return None
        return (label,) if isinstance(label, int | np.integer) else tuple(label or ())


@dataclass(frozen=True, eq=False)
class ReportedValues:
    """The numbers that were predicted for one file of texts.

    Attributes:
        name: what it is called: dev, test.
        texts: N.
        values: (N,).
        targets: N numbers; None without.
        evaluation: None without targets.
        others: evaluations of other systems on the same rows, by name.
    """

    name: str
    texts: Sequence[str]
    values: NDArray[np.float64]
    targets: Sequence[float] | None = None
    evaluation: RegressionEvaluation | None = None
    others: Mapping[str, RegressionEvaluation] = field(default_factory=dict)
    headline: ClassVar[str] = "mae"  # which the verdict is about
    paired: ClassVar[Mapping[str, Paired]] = {}  # an evaluation has its own `difference`

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.values)
        assert self.targets is None or len(self.targets) == len(self.texts)

    @property
    def verdict(self) -> str:
        """What the metrics come to, in a sentence or two; "" without an evaluation."""
        own = self.evaluation
        return "" if own is None else verdict_of_values(own, self.others)


@dataclass(frozen=True, eq=False)
class Report:
    """Everything that a report tells.

    Attributes:
        title: what was evaluated, in a few words.
        label_names: C different names.
        splits: what was predicted, in the order of the page.
        multi_label: each text has any number of labels.
        history: rows as training logs them: `step`, `loss`, and for some `dev_loss` or `dev_` and
            the name of a metric of `Evaluation`. Empty where nothing was trained.
        settings: of the run; values may be mappings.
        versions: of what was used, by name.
        notes: what a reader must know about the data, such as duplicates; a line each.
        created: when the run began.
        seconds: how long it took.
        score: how label words are scored; None where there are none.
        thresholds: from which probability on labels are predicted; None for the likeliest class,
            or each label from 0.5 on.
    """

    title: str
    label_names: Sequence[str]
    splits: Sequence[ReportedSplit] | Sequence[ReportedValues]
    multi_label: bool = False
    history: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    created: datetime | None = None
    seconds: float | None = None
    score: str | None = None
    thresholds: Thresholds | None = None

    @property
    def has_numbers(self) -> bool:
        """Whether numbers were predicted, and no classes."""
        return any(isinstance(split, ReportedValues) for split in self.splits)

    def predicted(self, split: ReportedSplit) -> NDArray[np.bool_]:
        """(N, C), true where the class is predicted."""
        return predictions(
            split.probabilities, multi_label=self.multi_label, thresholds=self.thresholds
        )
