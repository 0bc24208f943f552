"""The files of an experiment -> its training, dev and test splits, checked against each other.

Knows nothing of models.
"""

from dataclasses import dataclass, replace

from minllama.data import (
    Dataset,
    Notice,
    check_splits,
    load_dataset,
    one_class,
    sample_per_class,
    stratified_split,
)
from minllama.data.source import Source
from minllama.options import DataOptions


@dataclass(frozen=True)
class Splits:
    """What is learned from, what is chosen and calibrated on, and what is kept aside.

    Attributes:
        train, dev: with labels.
        test: None without one; its labels are None where it has none, or only placeholders.
        notices: what a person should hear about.
    """

    train: Dataset
    dev: Dataset
    test: Dataset | None
    notices: tuple[str, ...]


def load_splits(
    train: Source,
    dev: Source | None,
    test: Source | None,
    options: DataOptions,
    *,
    dev_fraction: float,
    per_class: int = 0,
    seed: int,
) -> Splits:
    """Read the files; without a dev file a part of every training class is set aside.

    Args:
        train, dev, test: as `load_dataset` takes them.
        options: format, columns, label names.
        dev_fraction: the part that is set aside.
        per_class: how many training examples of each class to keep; 0 for all.
        seed: of these draws.

    Raises:
        DataError: a file or its labels cannot be used.
    """
    learned = load_dataset(train, options)
    spoken: list[Notice | str] = [*learned.notices]
    if dev is None:
        learned, held = stratified_split(learned, dev_fraction, seed)
        spoken.append(
            f"no --dev: {len(held)} of {len(learned) + len(held)} rows of {learned.source} are "
            f"set aside to evaluate on, drawn by class with seed {seed}"
        )
    else:
        held = load_dataset(dev, options, label_names=learned.label_names)
        spoken += held.notices
    if per_class:
        whole = len(learned)
        learned = sample_per_class(learned, per_class, seed)
        spoken.append(
            f"{learned.source}: up to {per_class} examples of each class are drawn with seed "
            f"{seed}: {len(learned)} of {whole}"
        )
    tested = None
    if test is not None:
        # Its labels are not needed, so no column is taken for them that does not say so by name;
        # but they are to be expected where the training file has them.
        known = replace(options, label_column=options.label_column or learned.label_column)
        tested = load_dataset(test, known, label_names=learned.label_names, needs_labels=False)
        spoken += tested.notices
    # Of the labels that are alike, the file's own counts are told already.
    told = {"case", "look-alikes"}
    spoken += [n for n in check_splits(learned, held, tested) if n.kind not in told]
    if tested is not None:
        tested = without_placeholders(tested)
        spoken += tested.notices
    return Splits(learned, held, tested, tuple(dict.fromkeys(map(str, spoken))))


def without_placeholders(split: Dataset) -> Dataset:
    """The split, without its labels where all are the same one, and with a notice that says so.

    So it is in test files whose answers are kept back; an accuracy would be a number that means
    nothing.
    """
    if split.labels is None or len(split) < 2 or len(set(split.labels)) > 1:
        return split
    message = f"{split.source}: its labels are left out of account"
    notices = (*split.notices, *one_class(split), Notice("one-class", message, len(split)))
    return replace(split, labels=None, notices=notices)
