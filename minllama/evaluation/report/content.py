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
from minllama.evaluation.report.ladder import Ladder
from minllama.evaluation.report.value_comparison import verdict as verdict_of_values
from minllama.evaluation.thresholds import Thresholds


@dataclass(frozen=True, eq=False)
class ReportedSplit:
    """The predictions for one file of texts.

    Attributes:
        name: dev or test.
        texts: N.
        probabilities: (N, C).
        labels: N classes, or N collections of classes; `None` or -1 for rows without a label.
        evaluation: of the labeled rows; `None` without any.
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
        """Paired comparisons with each of the others, by name."""
        own = self.evaluation
        return {} if own is None else {name: compare(own, it) for name, it in self.others.items()}

    @property
    def verdict(self) -> str:
        """A summary in a sentence or two; "" without an evaluation."""
        own = self.evaluation
        return "" if own is None else verdict(own, self.others, self.headline)

    def gold(self, row: int) -> tuple[int, ...] | None:
        """The gold classes of a row, or `None` without labels."""
        label = None if self.labels is None else self.labels[row]
        if not is_labelled(label):
            return None
        return (label,) if isinstance(label, int | np.integer) else tuple(label or ())


@dataclass(frozen=True, eq=False)
class ReportedValues:
    """The predicted numbers for one file of texts.

    Attributes:
        name: dev or test.
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
        """A summary in a sentence or two; "" without an evaluation."""
        own = self.evaluation
        return "" if own is None else verdict_of_values(own, self.others)


@dataclass(frozen=True, eq=False)
class Report:
    """The complete content of a report.

    Attributes:
        title: what was evaluated, in a few words.
        label_names: C different names.
        splits: the predictions, in the order of the page.
        multi_label: texts may have any number of labels.
        history: rows as training logs them: `step`, `loss`, and for some `dev_loss` or `dev_` and
            the name of a metric of `Evaluation`. Empty without training.
        settings: of the run; values may be mappings.
        versions: of the software, by name.
        notes: about the data, such as duplicates; one line each.
        created: when the run began.
        seconds: how long it took.
        score: how label words are scored; None without label words.
        thresholds: at which labels are predicted; None for the most likely class, or each label
            with at least 0.5.
        ladder: what the method auto tried; None for other methods.
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
    ladder: Ladder | None = None

    @property
    def has_numbers(self) -> bool:
        """Whether this is a regression."""
        return any(isinstance(split, ReportedValues) for split in self.splits)

    def predicted(self, split: ReportedSplit) -> NDArray[np.bool_]:
        """(N, C), true where the class is predicted."""
        return predictions(
            split.probabilities, multi_label=self.multi_label, thresholds=self.thresholds
        )
