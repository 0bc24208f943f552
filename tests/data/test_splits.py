"""Claims about splits and samples: stratified, seeded, without leaks, and checked."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minllama.data import (
    Dataset,
    check_number_splits,
    check_splits,
    one_class,
    random_split,
    sample_balanced,
    sample_per_class,
    stratified_split,
)
from minllama.data.dataset import Notice
from minllama.errors import DataError


def dataset(*counts: int, source: str = "train.csv") -> Dataset:
    """So many texts of each class, the classes taking turns."""
    rows = sorted((i, label) for label, count in enumerate(counts) for i in range(count))
    texts = [f"{source} {label}.{i}" for i, label in rows]
    return Dataset(texts, [label for _, label in rows], list("abcdefgh"[: len(counts)]), source)


def several(*labels: tuple[int, ...]) -> Dataset:
    texts = [f"text {i}" for i in range(len(labels))]
    return Dataset(texts, list(labels), ["a", "b", "c"], "train.jsonl", multi_label=True)


def test_a_split_takes_the_same_part_of_each_class_and_keeps_the_order() -> None:
    whole = dataset(100, 50, 10, 1)
    train, dev = stratified_split(whole, 0.1, seed=0)
    assert dev.class_counts() == [10, 5, 1, 0]
    assert train.class_counts() == [90, 45, 9, 1]
    for part in (train, dev):
        places = [whole.texts.index(text) for text in part.texts]
        assert places == sorted(places)
        assert part.labels == [whole.labels[i] for i in places]  # type: ignore[index]
    assert sorted([*train.texts, *dev.texts]) == sorted(whole.texts)


def test_a_split_depends_on_the_seed_alone() -> None:
    first, again, other = (stratified_split(dataset(40, 40), 0.25, seed)[1] for seed in (1, 1, 2))
    assert first.texts == again.texts != other.texts
    assert stratified_split(dataset(3, 3), 0.4, 0)[1].texts == ["train.csv 0.1", "train.csv 1.1"]


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5).filter(lambda c: max(c) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_no_class_of_two_or_more_is_missing_on_either_side(
    counts: list[int], fraction: float, seed: int
) -> None:
    train, dev = stratified_split(dataset(*counts), fraction, seed)
    for n, n_train, n_dev in zip(counts, train.class_counts(), dev.class_counts(), strict=True):
        assert (n_train, n_dev) == (1, 0) if n == 1 else (n_train > 0 and n_dev > 0)
        assert n_train + n_dev == n


def test_equal_texts_stay_on_one_side() -> None:
    once = dataset(20, 20)
    assert once.labels is not None
    thrice = replace(once, texts=list(once.texts) * 3, labels=list(once.labels) * 3)
    train, dev = stratified_split(thrice, 0.25, seed=0)
    assert len(dev) == 30
    assert not set(train.texts) & set(dev.texts)


def test_a_text_with_different_labels_takes_no_class_from_training() -> None:
    whole = Dataset(["x", "x", "y", "z"], [0, 1, 0, 1], ["a", "b"], "train.csv")
    for seed in range(20):
        train, dev = stratified_split(whole, 0.5, seed)
        assert min(train.class_counts()) > 0
        assert not set(train.texts) & set(dev.texts)


def test_a_text_with_several_labels_counts_for_the_rarest() -> None:
    whole = several(*[(0, 1)] * 10, *[(0,)] * 20, *[()] * 10)
    for seed in range(5):
        train, dev = stratified_split(whole, 0.5, seed)
        assert Counter(map(dev.classes_of, range(20))) == {(0, 1): 5, (0,): 10, (): 5}
        assert len(train) == len(dev) == 20


def test_notices_stay_with_the_training_side() -> None:
    notice = Notice("skipped", "x.csv: bad rows skipped: 1", 1)
    train, dev = stratified_split(replace(dataset(4, 4), notices=(notice,)), 0.5, 0)
    assert (train.notices, dev.notices) == ((notice,), ())


def test_where_nothing_can_be_set_aside_it_is_said() -> None:
    with pytest.raises(DataError) as caught:
        stratified_split(dataset(1, 1), 0.5, 0)
    assert str(caught.value) == (
        "train.csv: no class has two different texts, so none can be held out for evaluation; "
        "give a --dev file"
    )


def test_a_sample_has_k_of_each_class_or_all_there_are() -> None:
    sample = sample_per_class(dataset(50, 20, 2), 3, seed=0)
    assert sample.class_counts() == [3, 3, 2]
    assert len(set(sample.texts)) == 8
    assert sample.labels == [int(text.split()[1][0]) for text in sample.texts]
    assert sample.labels != sorted(sample.labels)  # type: ignore[type-var]
    assert sample.texts == sample_per_class(dataset(50, 20, 2), 3, seed=0).texts
    assert sample.texts != sample_per_class(dataset(50, 20, 2), 3, seed=1).texts


def test_a_sample_of_several_labels_has_k_of_each() -> None:
    counts = sample_per_class(several(*[(0, 1)] * 9, *[(1, 2)] * 9, ()), 3, seed=0).class_counts()
    assert counts[0] >= 3 <= counts[2]
    assert counts[1] == counts[0] + counts[2] <= 6


@pytest.mark.parametrize(
    ("n", "counts"), [(5, [1] * 5), (9, [2, 2, 2, 2, 1]), (21, [5, 5, 5, 5, 1]), (0, [0] * 5)]
)
def test_a_balanced_sample_is_spread_over_the_classes(n: int, counts: list[int]) -> None:
    sample = sample_balanced(dataset(9, 9, 9, 9, 1), n, seed=3)
    assert sample.class_counts() == counts
    assert len(set(sample.texts)) == n


def test_chance_decides_which_classes_get_one_more() -> None:
    samples = [sample_balanced(dataset(9, 9, 9, 9, 9), 7, seed) for seed in range(40)]
    for sample in samples:
        assert sorted(sample.class_counts()) == [1, 1, 1, 2, 2]
    totals = [sum(sample.class_counts()[c] for sample in samples) for c in range(5)]
    assert min(totals) > 45  # of 56 on average
    firsts = [{sample.classes_of(i)[0] for i in range(5)} for sample in samples]
    assert min(len(classes) for classes in firsts) < 5  # they do not take turns
    assert samples[0].texts == sample_balanced(dataset(9, 9, 9, 9, 9), 7, 0).texts


def test_a_balanced_sample_of_several_labels_draws_each_text_once() -> None:
    whole = several(*[(0, 1, 2)] * 5, ())
    assert sorted(sample_balanced(whole, 6, 0).texts) == sorted(whole.texts)
    with pytest.raises(DataError, match="7 examples were requested, but it has only 6"):
        sample_balanced(whole, 7, 0)


def test_sound_splits_pass_without_a_word() -> None:
    train, dev, test = (dataset(4, 4, source=name) for name in ("train", "dev", "test"))
    assert check_splits(train) == []
    assert check_splits(train, dev, test) == []
    assert check_splits(train, replace(dev, labels=None)) == []
    labels = several((0,), (1, 2))
    assert check_splits(labels, replace(labels, texts=["other", "texts"])) == []


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        (
            dataset(4),
            None,
            "train.csv: every row has the label 'a'; a classifier needs examples of at least "
            "two classes",
        ),
        (several((), ()), None, "train.jsonl: no row has a label"),
        (
            replace(dataset(4, 4, 0, 0), label_names=["a", "b", "c", "d"]),
            dataset(1, 0, 2, 1, source="dev.csv"),
            "dev.csv: 3 rows have labels without examples in train.csv ('c', 'd'); add "
            "examples, or remove these rows",
        ),
        (
            dataset(4, 4),
            replace(dataset(1, 1, source="dev.csv"), label_names=["b", "a"]),
            "dev.csv: its labels ('b', 'a') differ from those of train.csv ('a', 'b')",
        ),
    ],
)
def test_splits_that_cannot_serve_are_refused(
    train: Dataset, dev: Dataset | None, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        check_splits(train, dev)
    assert str(caught.value) == message
    if dev is not None:
        with pytest.raises(DataError):
            check_splits(train, None, dev)


def test_what_is_doubtful_is_told_and_counted() -> None:
    train = Dataset(["x", "y", "y", "z"], [0, 0, 1, 1], ["Late", "late", "c"], "train.csv")
    dev = Dataset(["x", "y", "x", "w"], [0, 0, 1, 1], ["Late", "late", "c"], "dev.csv")
    test = Dataset(["w", "z", "v"], [0, 0, 0], ["Late", "late", "c"], "test.csv")
    assert [(n.kind, n.count, str(n)) for n in check_splits(train, dev, test)] == [
        ("absent", 1, "train.csv: no example of 'c', so it cannot be learned"),
        (
            "case",
            2,
            "train.csv: 'Late' (2 rows), 'late' (2 rows) are different labels that differ only "
            "in case; are they the same?",
        ),
        ("conflicts", 1, "train.csv: texts with conflicting labels: 1"),
        (
            "duplicates",
            3,
            "dev.csv: 3 of 4 rows have a text that is also in train.csv; results on them may "
            "reflect memorization",
        ),
        (
            "duplicates",
            1,
            "test.csv: 1 of 3 rows have a text that is also in train.csv; results on them may "
            "reflect memorization",
        ),
        (
            "duplicates",
            1,
            "test.csv: 1 of 3 rows have a text that is also in dev.csv; results on them may "
            "reflect memorization",
        ),
        (
            "one-class",
            3,
            "test.csv: every row has the label 'Late'; is it a placeholder? accuracy says "
            "little on such data",
        ),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_training_keeps_every_label_of_texts_with_several(seed: int) -> None:
    whole = several((0, 2), (1, 2), (0,), (1,), (0, 2))
    train, dev = stratified_split(whole, 0.5, seed)
    assert all(train.class_counts())
    assert len(train) + len(dev) == len(whole)
    assert len(dev) > 0


def test_a_sample_of_several_labels_has_texts_without_any() -> None:
    whole = several(*[()] * 10, (0,), (0, 1), (2,))
    assert sum(not labels for labels in sample_per_class(whole, 3, seed=0).labels or ()) == 3


def test_one_label_beside_several_is_told_as_what_it_is() -> None:
    with pytest.raises(DataError, match="has one label per text, but"):
        check_splits(several((0,), (1, 2)), replace(dataset(1, 1, 1), label_names=["a", "b", "c"]))


def test_notices_about_a_part_of_a_file_do_not_speak_of_all_of_it():
    data = Dataset([f"text {i}" for i in range(20)], [0] * 18 + [1, 1], ["a", "b"], "x.csv")
    train, dev = stratified_split(data, 0.06, seed=0)
    assert len(train) + len(dev) == 20
    only = replace(dev.select([0]), texts=["a", "b"], labels=[0, 0])
    assert [str(n) for n in one_class(replace(only, part=dev.part))] == [
        f"x.csv ({len(dev)} of 20 rows, held out): every row has the label 'a'; is it a "
        "placeholder? accuracy says little on such data"
    ]
    drawn = sample_per_class(train, 1, seed=0)
    assert drawn.called == f"x.csv (2 of {len(train)} rows, drawn)"
    assert data.called == "x.csv"


def rows_of(draw: random.Random, n: int, multi_label: bool) -> Dataset:
    """Random rows, many with equal texts."""
    texts = [f"text {draw.randrange(n)}" for _ in range(n)]
    sets = [tuple(sorted(draw.sample(range(4), draw.randrange(4)))) for _ in range(n)]
    labels: Any = sets if multi_label else [draw.choice((0, 0, 0, 1, 1, 2)) for _ in range(n)]
    return Dataset(texts, labels, list("abcd"), "random.csv", multi_label)


def held_out_by_sets(data: Dataset, fraction: float, seed: int) -> set[str]:
    """The texts that a split puts aside, with the texts themselves in sets."""
    counts, draw = data.class_counts(), random.Random(seed)
    class_of: dict[str, int] = {}
    of_class: dict[int, list[str]] = {}
    for i, text in enumerate(data.texts):
        rarest = min(data.classes_of(i), key=lambda c: (counts[c], c), default=-1)
        if text not in class_of:
            of_class.setdefault(rarest, []).append(text)
            class_of[text] = rarest
    aside: set[str] = set()
    for label in sorted(of_class):
        texts = of_class[label]
        if len(texts) > 1:
            n = min(max(1, round(fraction * len(texts))), len(texts) - 1)
            aside |= set(draw.sample(texts, n))
    rows = range(len(data))
    left = {c for i in rows if data.texts[i] not in aside for c in data.classes_of(i)}
    for i in rows:
        if not left.issuperset(data.classes_of(i)):
            aside.discard(data.texts[i])
            left |= {c for j in rows if data.texts[j] == data.texts[i] for c in data.classes_of(j)}
    return aside


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_hashes_of_texts_find_what_sets_of_texts_find(seed: int, multi_label: bool) -> None:
    whole = rows_of(random.Random(seed), 60, multi_label)
    aside = held_out_by_sets(whole, 0.2, seed)
    train, dev = stratified_split(whole, 0.2, seed)
    assert dev.texts == [text for text in whole.texts if text in aside]
    assert train.texts == [text for text in whole.texts if text not in aside]
    other = rows_of(random.Random(seed + 100), 40, multi_label)
    labels_of: dict[str, set[tuple[int, ...]]] = {}
    for i, text in enumerate(whole.texts):
        labels_of.setdefault(text, set()).add(whole.classes_of(i))
    notices = {notice.kind: notice.count for notice in check_splits(whole, other)}
    assert notices["conflicts"] == sum(len(labels) > 1 for labels in labels_of.values())
    assert notices["duplicates"] == sum(text in set(whole.texts) for text in other.texts)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_split_as_sets_of_texts_would_be(seed: int) -> None:
    draw = random.Random(seed)
    texts = [f"text {draw.randrange(40)}" for _ in range(60)]
    targets: Any = [draw.choice((-1.0, -2.0, 0.5)) for _ in texts]
    whole = Dataset(texts, targets, [], "random.csv", has_numbers=True)
    different = list(dict.fromkeys(texts))
    aside = set(random.Random(seed).sample(different, round(0.2 * len(different))))
    train, dev = random_split(whole, 0.2, seed)
    assert dev.texts == [text for text in texts if text in aside]
    assert train.texts == [text for text in texts if text not in aside]
    numbers_of: dict[str, set[float]] = {}
    for text, target in zip(texts, targets, strict=True):
        numbers_of.setdefault(text, set()).add(target)
    (conflicts,) = (n.count for n in check_number_splits(whole) if n.kind == "conflicts")
    assert conflicts == sum(len(numbers) > 1 for numbers in numbers_of.values())
