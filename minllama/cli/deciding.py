"""Thresholds that were typed, for `evaluate` and `classify`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from minllama.cli.open import flags_of, given_options
from minllama.errors import OptionError
from minllama.options import names_of
from minllama.options.evaluation import ReportOptions, ThresholdOptions

if TYPE_CHECKING:
    from minllama.classification import Classifier

OF_CLASSES = (*names_of(ThresholdOptions), *names_of(ReportOptions))


def decide(
    classifier: "Classifier", options: ThresholdOptions, *, more_of_classes: Iterable[str] = ()
) -> None:
    """Let thresholds that were typed take the place of the classifier's own.

    Args:
        classifier: gives classes or numbers.
        options: as typed.
        more_of_classes: names of the command's other options that numbers have no use for.

    Raises:
        OptionError: they cannot be, or the classifier gives numbers.
    """
    from minllama.evaluation.thresholds import fixed_thresholds

    if classifier.scale is not None:
        names = (*OF_CLASSES, *more_of_classes)
        given = given_options(names)
        if given:
            flags = flags_of(name for name in names if name in given)
            raise OptionError(f"{flags}: for classes, and this classifier gives numbers; omit it")
        return
    kind: Any = {"multi_label": classifier.multi_label, "own": classifier.decision}
    classifier.decide_by(fixed_thresholds(options, classifier.labels, **kind))
