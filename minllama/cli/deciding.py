"""Apply `--threshold` and `--positive`, for `evaluate` and `classify`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

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
    """Replace the classifier's own thresholds by those that were given.

    Args:
        classifier: predicts classes or numbers.
        options: as typed.
        more_of_classes: other options of the command that do not apply to regression.

    Raises:
        OptionError: they are invalid, or the classifier predicts numbers.
    """
    from minllama.evaluation.thresholds import fixed_thresholds

    if classifier.scale is not None:
        names = (*OF_CLASSES, *more_of_classes)
        given = given_options(names)
        if given:
            flags = flags_of(name for name in names if name in given)
            raise OptionError(
                f"{flags}: only for classes, and this classifier predicts numbers; omit it"
            )
        return
    decision = fixed_thresholds(
        options,
        classifier.labels,
        multi_label=classifier.multi_label,
        own=classifier.decision,
    )
    classifier.decide_by(decision)
