"""Read the training, dev and test splits of an experiment, and check them against each other."""

from dataclasses import dataclass, replace

from minllama.data import (
    Dataset,
    Notice,
    check_number_splits,
    check_splits,
    load_dataset,
    one_class,
    one_number,
    random_split,
    sample_per_class,
    stratified_split,
)
from minllama.data.numbers import is_number
from minllama.data.source import Source
from minllama.options import DataOptions

DEV_FRACTION = 0.1
FEW = 1500  # rows of a file; of more, a tenth makes hardly any difference to a classifier
MOST_HELD_OUT = 1000  # rows, which tell an accuracy to 1.5 points; to read more takes minutes
FEW_CLASSES = 10  # numbers up to this are common class names


@dataclass(frozen=True)
class Splits:
    """The splits to train on, to select and calibrate on, and to test on.

    Attributes:
        train, dev: with labels.
        test: None without one; its labels are None if there are none or only placeholders.
        notices: for the user.
        whole: train and dev together, where dev was held out of a training file of few rows; in
            the end a classifier may be fitted to all of them. Otherwise None.
    """

    train: Dataset
    dev: Dataset
    test: Dataset | None
    notices: tuple[str, ...]
    whole: Dataset | None = None


def load_splits(
    train: Source,
    dev: Source | None,
    test: Source | None,
    options: DataOptions,
    *,
    dev_fraction: float | None = None,
    per_class: int = 0,
    numbers: bool = False,
    seed: int,
) -> Splits:
    """Read the files; without a dev file, hold out a part of every training class.

    Args:
        train, dev, test: as `load_dataset` takes them.
        options: format, columns, label names.
        dev_fraction: the held-out part; None for DEV_FRACTION, but at most MOST_HELD_OUT rows.
        per_class: how many training examples of each class to keep; 0 for all.
        numbers: labels are numbers; held-out rows are then drawn from all texts.
        seed: of these draws.

    Raises:
        DataError: a file or its labels cannot be used.
    """
    learned = load_dataset(train, options, numbers=numbers)
    messages: list[Notice | str] = [*learned.notices]
    names = None if numbers else learned.label_names
    is_few = dev is None and not per_class and len(learned) <= FEW
    whole = learned if is_few else None
    if dev is None:
        learned, held, message = _held_out(learned, dev_fraction, numbers, seed)
        messages.append(message)
    else:
        held = load_dataset(dev, options, label_names=names, numbers=numbers)
        messages += held.notices
    if per_class:
        n_learned = len(learned)
        learned = sample_per_class(learned, per_class, seed)
        messages.append(
            f"{learned.source}: using up to {per_class} examples per class, drawn with seed "
            f"{seed}: {len(learned)} of {n_learned}"
        )
    tested = None
    if test is not None:
        # Its labels are not needed, so only a column named like labels is used for them;
        # but the training file's label column is expected here, too.
        known = replace(options, label_column=options.label_column or learned.label_column)
        tested = load_dataset(test, known, label_names=names, needs_labels=False, numbers=numbers)
        messages += tested.notices
    messages += _numeric_classes_hint(learned)
    # Look-alike labels were already reported with the file's own counts.
    reported = {"case", "look-alikes"}
    warnings = (check_number_splits if numbers else check_splits)(learned, held, tested)
    messages += [notice for notice in warnings if notice.kind not in reported]
    if tested is not None:
        tested = without_placeholders(tested)
        messages += tested.notices
    return Splits(learned, held, tested, tuple(dict.fromkeys(map(str, messages))), whole)


def _held_out(
    rows: Dataset, fraction: float | None, numbers: bool, seed: int
) -> tuple[Dataset, Dataset, str]:
    """The rows that remain, those that are held out, and a message about it."""
    fraction = fraction or min(DEV_FRACTION, MOST_HELD_OUT / max(1, len(rows)))
    rest, held = (random_split if numbers else stratified_split)(rows, fraction, seed)
    by_class = "" if numbers else "by class "
    message = (
        f"no --dev: {len(held)} of {len(rest) + len(held)} rows of {rest.source} are held out for "
        f"evaluation, drawn {by_class}with seed {seed}"
    )
    return rest, held, message


def without_placeholders(split: Dataset) -> Dataset:
    """The split; if all labels are equal, without them and with a notice.

    Test files with hidden labels look like this; an accuracy would be meaningless.
    """
    if split.labels is None or len(split) < 2 or len(set(split.labels)) > 1:
        return split
    message = f"{split.source}: its labels are ignored"
    all_one = (one_number if split.has_numbers else one_class)(split)
    notices = (*split.notices, *all_one, Notice("one-class", message, len(split)))
    return replace(split, labels=None, notices=notices)


def _numeric_classes_hint(train: Dataset) -> list[str]:
    """A notice about numeric labels that are used as classes."""
    names = train.label_names
    if len(names) <= FEW_CLASSES or not all(map(is_number, names)):
        return []
    return [
        f"{train.source}: its {len(names)} labels are all numbers, and are used as classes; "
        "--objective regression predicts numbers"
    ]
