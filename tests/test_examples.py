"""Claims about the files in examples/: they are as sound as their README says."""

import itertools
import re

from minllama.data import Dataset, check_splits, load_dataset
from tests.conftest import ROOT


def examples() -> tuple[Dataset, Dataset]:
    train = load_dataset(ROOT / "examples" / "shop-train.csv")
    return train, load_dataset(ROOT / "examples" / "shop-dev.csv", label_names=train.label_names)


def test_the_shops_messages_are_balanced_and_pass_every_check() -> None:
    train, dev = examples()
    assert train.label_names == ["complaint", "praise", "question", "request"]
    assert (train.class_counts(), dev.class_counts()) == ([60] * 4, [20] * 4)
    assert check_splits(train, dev) == []


def test_no_two_messages_are_nearly_the_same() -> None:
    train, dev = examples()
    words = [set(re.findall(r"\w+", text.lower())) for text in [*train.texts, *dev.texts]]
    alike = [
        (one, other)
        for one, other in itertools.combinations(words, 2)
        if len(one & other) > 0.4 * len(one | other)
    ]
    assert alike == []


def test_messages_are_short_lines() -> None:
    train, dev = examples()
    for text in [*train.texts, *dev.texts]:
        assert text == text.strip()
        assert "\n" not in text
        assert len(text) <= 120
