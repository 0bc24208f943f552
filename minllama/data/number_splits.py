"""Split and check datasets with numeric targets; `minllama.data.splits` does it for classes."""

import random
from array import array

from minllama.data.equal_texts import among, first_rows, n_conflicting
from minllama.data.splits import duplicates, parts
from minllama.data.types import Dataset, Notice
from minllama.errors import DataError


def random_split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out a part of the examples; equal texts stay together.

    Args:
        dataset: with numeric targets.
        fraction: of its distinct texts to hold out, between 0 and 1; at least one text.
        seed: of the draw.

    Returns:
        The training part, with the dataset's notices, and the held-out part.

    Raises:
        DataError: all texts are equal.
    """
    assert 0 < fraction < 1, fraction
    hashes = dataset.text_hashes
    firsts = first_rows(hashes).nonzero()[0]
    if len(firsts) < 2:
        raise DataError(
            f"{dataset.source}: all texts are equal, so none can be held out for evaluation; "
            "give a --dev file"
        )
    n_aside = min(max(1, round(fraction * len(firsts))), len(firsts) - 1)
    drawn = random.Random(seed).sample(range(len(firsts)), n_aside)
    aside = array("Q", sorted(hashes[firsts[place]] for place in drawn))
    return parts(dataset, among(hashes, memoryview(aside)))


def check_number_splits(
    train: Dataset, dev: Dataset | None = None, test: Dataset | None = None
) -> list[Notice]:
    """Check that `train` can be learned from, and the others evaluated on.

    Returns:
        Notices: equal texts with different numbers, rows of `dev` and
        `test` whose text is in `train` or in each other, and splits of one number.

    Raises:
        DataError: all rows of `train` have the same number.
    """
    if len(set(train.targets)) < 2:
        raise DataError(
            f"{train.source}: every row has the number {train.targets[0]:g}; regression needs "
            "different numbers"
        )
    notices = _conflicts(train)
    earlier = [train]
    for split in (dev, test):
        if split is None:
            continue
        for other in earlier:
            notices += duplicates(other, split)
        notices += one_number(split)
        earlier.append(split)
    return notices


def one_number(split: Dataset) -> list[Notice]:
    """A notice if all rows have the same number, as in files with hidden labels."""
    if split.labels is None or len(split) < 2 or len(set(split.targets)) > 1:
        return []
    message = (
        f"{split.called}: every row has the number {split.targets[0]:g}; is it a placeholder? R2 "
        "and correlations are undefined"
    )
    return [Notice("one-class", message, len(split))]


def _conflicts(train: Dataset) -> list[Notice]:
    if not (count := n_conflicting(train.text_hashes, train.targets)):
        return []
    message = f"{train.called}: texts with conflicting numbers: {count}"
    return [Notice("conflicts", message, count)]
