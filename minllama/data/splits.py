"""Split and sample datasets, and check them against each other.

Random draws depend on the seed only.
"""

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from minllama.data.equal_texts import among, first_rows, in_order, n_conflicting
from minllama.data.examples import look_alike_notices
from minllama.data.types import Dataset, Notice
from minllama.errors import DataError
from minllama.text import listed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def stratified_split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out a part of the examples, the same fraction of every class.

    Equal texts stay together, so that no text is on both sides. A class with only one text keeps
    it for training; of two or more at least one goes to each side. A text with several labels
    counts for the rarest of them. Both sides keep the order of the dataset.

    Args:
        dataset: with labels.
        fraction: of each class's texts to hold out, between 0 and 1.
        seed: of the draw.

    Returns:
        The training part, with the dataset's notices, and the held-out part.

    Raises:
        DataError: no class has two texts.
    """
    assert 0 < fraction < 1, fraction
    import numpy as np

    hashes, class_counts = dataset.text_hashes, dataset.class_counts()
    is_first = first_rows(hashes)

    def first_with_class() -> Iterator[tuple[int, int]]:
        """The first row of each text, and the rarest of its classes."""
        for row in where(is_first):
            classes = dataset.classes_of(row)
            yield row, min(classes, key=lambda c: (class_counts[c], c), default=-1)

    counts = Counter(label for _, label in first_with_class())
    draw = random.Random(seed)
    drawn: dict[int, set[int]] = {}  # of the texts of each class, by their order
    for label, n_texts in sorted(counts.items()):
        n_aside = min(max(1, round(fraction * n_texts)), n_texts - 1)
        drawn[label] = set(draw.sample(range(n_texts), n_aside)) if n_aside else set()
    if not any(drawn.values()):
        raise DataError(
            f"{dataset.source}: no class has two different texts, so none can be held out for "
            "evaluation; give a --dev file"
        )
    seen = Counter[int]()
    aside = []
    for row, label in first_with_class():
        if seen[label] in drawn[label]:
            aside.append(hashes[row])
        seen[label] += 1
    is_aside = among(hashes, np.array(sorted(aside), dtype=np.uint64))
    _keep_every_class(dataset, is_aside)
    if not is_aside.any():
        raise DataError(
            f"{dataset.source}: each text is the only one with its label, so none can be held "
            "out for evaluation; give a --dev file"
        )
    return parts(dataset, is_aside)


def parts(dataset: Dataset, is_aside: "NDArray[np.bool_]") -> tuple[Dataset, Dataset]:
    """The rows that remain, with the dataset's notices, and those that are held out."""
    rest, dev = dataset.select(where(~is_aside)), dataset.select(where(is_aside))
    rest = replace(rest, notices=dataset.notices, part=share(rest, dataset))
    return rest, replace(dev, part=f"{share(dev, dataset)}, held out")


def share(part: Dataset, whole: Dataset) -> str:
    """A message about how many of a data set's rows are in a part of it."""
    return f"{len(part)} of {len(whole)} rows"


def where(mask: "NDArray[np.bool_]") -> Iterator[int]:
    """The rows at which a mask is true."""
    return itertools.compress(range(len(mask)), mask.data)


def _keep_every_class(dataset: Dataset, is_aside: "NDArray[np.bool_]") -> None:
    """Move texts back until each label has a text that is not aside."""
    import numpy as np

    hashes = np.asarray(dataset.text_hashes)
    remaining = {c for i in where(~is_aside) for c in dataset.classes_of(i)}
    for i in where(is_aside.copy()):
        if not remaining.issuperset(dataset.classes_of(i)):
            equal = hashes == hashes[i]
            is_aside[equal] = False
            remaining |= {c for j in where(equal) for c in dataset.classes_of(j)}


def sample_per_class(dataset: Dataset, k: int, seed: int) -> Dataset:
    """`k` examples of each class, in random order; all examples of smaller classes.

    With several labels, examples are drawn until each class has `k`, one text counting for all
    its classes; and `k` of those that have none.
    """
    assert dataset.labels is not None
    draw = random.Random(seed)
    order = draw.sample(range(len(dataset)), len(dataset))
    taken, counts = [], Counter[int]()
    for index in order:
        classes = dataset.classes_of(index) or (-1,)
        if any(counts[label] < k for label in classes):
            taken.append(index)
            for label in classes:
                counts[label] += 1
    drawn = dataset.select(taken)
    return replace(drawn, part=f"{share(drawn, dataset)}, drawn")


def sample_balanced(dataset: Dataset, n: int, seed: int) -> Dataset:
    """`n` examples in random order, as evenly distributed over the classes as possible.

    Where `n` is no multiple of the number of classes, chance decides which get one more.

    Raises:
        DataError: there are fewer examples.
    """
    assert dataset.labels is not None
    if len(dataset) < n:
        raise DataError(
            f"{dataset.source}: {n} examples were requested, but it has only {len(dataset)}"
        )
    draw = random.Random(seed)
    left: defaultdict[int, list[int]] = defaultdict(list)
    for index in draw.sample(range(len(dataset)), len(dataset)):
        # A text with several labels counts for one of them, so that it is drawn once.
        left[draw.choice(dataset.classes_of(index) or (-1,))].append(index)
    taken: list[int] = []
    while len(taken) < n:
        classes = sorted(label for label in left if left[label])
        for label in draw.sample(classes, min(len(classes), n - len(taken))):
            taken.append(left[label].pop())
    return dataset.select(draw.sample(taken, len(taken)))


def check_splits(
    train: Dataset, dev: Dataset | None = None, test: Dataset | None = None
) -> list[Notice]:
    """Check that `train` can be learned from, and the others evaluated on.

    Returns:
        What a person should hear about: classes that no training example has, names that a person
        may not tell apart, equal texts with different labels, rows of `dev` and `test` whose text
        is in `train` or in each other, and splits in which all rows have one label.

    Raises:
        DataError: `train` has one class only, a label of `dev` or `test` does not occur in it, or
            the classes of the splits differ.
    """
    assert train.labels is not None
    counts = train.class_counts()
    if sum(count > 0 for count in counts) < 2 and not train.multi_label:
        only = train.label_names[counts.index(max(counts))]
        raise DataError(
            f"{train.source}: every row has the label {only!r}; a classifier needs examples of "
            "at least two classes"
        )
    if not any(counts):
        raise DataError(f"{train.source}: no row has a label")
    notices = _notices_on_training(train, counts)
    earlier = [train]
    for split in (dev, test):
        if split is None:
            continue
        _check_classes(train, counts, split)
        for other in earlier:
            notices += duplicates(other, split)
        notices += one_class(split)
        earlier.append(split)
    return notices


def _notices_on_training(train: Dataset, counts: list[int]) -> list[Notice]:
    notices = []
    if absent := [name for name, n in zip(train.label_names, counts, strict=True) if n == 0]:
        message = f"{train.called}: no example of {listed(absent)}, so it cannot be learned"
        notices.append(Notice("absent", message, len(absent)))
    notices += look_alike_notices(train)
    assert train.labels is not None
    if conflicts := n_conflicting(train.text_hashes, train.labels):
        message = f"{train.called}: texts with conflicting labels: {conflicts}"
        notices.append(Notice("conflicts", message, conflicts))
    return notices


def _check_classes(train: Dataset, counts: list[int], split: Dataset) -> None:
    if split.labels is None:
        return
    if split.multi_label != train.multi_label:
        one_label, label_lists = "one label per text", "lists of labels"
        of_train, of_split = (
            (label_lists, one_label) if train.multi_label else (one_label, label_lists)
        )
        raise DataError(
            f"{split.source}: has {of_split}, but {train.source} has {of_train}; use the same "
            "kind in both"
        )
    if split.label_names != train.label_names:
        raise DataError(
            f"{split.source}: its labels ({listed(split.label_names)}) differ from those of "
            f"{train.source} ({listed(train.label_names)})"
        )
    strange = Counter(
        split.label_names[label]
        for index in range(len(split))
        for label in split.classes_of(index)
        if counts[label] == 0
    )
    if strange:
        raise DataError(
            f"{split.source}: {strange.total()} rows have labels without examples in "
            f"{train.source} ({listed(sorted(strange))}); add examples, or remove these rows"
        )


def duplicates(earlier: Dataset, split: Dataset) -> list[Notice]:
    """A notice about rows of a split whose texts are also in an earlier split."""
    count = int(among(split.text_hashes, in_order(earlier.text_hashes)).sum())
    if not count:
        return []
    message = (
        f"{split.called}: {count} of {len(split)} rows have a text that is also in "
        f"{earlier.called}; results on them may reflect memorization"
    )
    return [Notice("duplicates", message, count)]


def one_class(split: Dataset) -> list[Notice]:
    """A notice if all rows have the same label, as in files with hidden labels."""
    used = [name for name, n in zip(split.label_names, split.class_counts(), strict=True) if n]
    if split.multi_label or len(used) != 1 or len(split) < 2:
        return []
    message = (
        f"{split.called}: every row has the label {used[0]!r}; is it a placeholder? accuracy "
        "says little on such data"
    )
    return [Notice("one-class", message, len(split))]
