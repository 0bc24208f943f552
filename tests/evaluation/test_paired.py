"""Two systems on the same rows: McNemar's exact test, and intervals of differences."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats

from minllama.errors import MinllamaError
from minllama.evaluation.metrics import evaluate
from minllama.evaluation.paired import compare, mcnemar
from minllama.evaluation.thresholds import Thresholds


def system(right, **options):
    probabilities = np.where(np.array(right)[:, None], [0.9, 0.1], [0.1, 0.9])
    return evaluate(probabilities, [0] * len(right), ["a", "b"], **options)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 2**5),
        (0, 12, 2 / 2**12),
        (3, 3, 1.0),
        (1, 7, 2 * (1 + 8) / 2**8),
        (20, 0, 1.9073486328125e-06),
    ],
)
def test_literal_p_values_of_mcnemars_exact_test(only_first, only_second, p):
    assert mcnemar(only_first, only_second) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("b", "c"), [(2, 9), (30, 41), (500, 430), (10_000, 10_300)])
def test_mcnemars_exact_test_is_a_binomial_one(b, c):
    assert mcnemar(b, c) == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue, rel=1e-9)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_rows_that_one_alone_gets_right_are_counted():
    paired = compare(system([1, 1, 1, 0, 0, 0]), system([1, 1, 0, 1, 1, 0]))
    assert (paired.count, paired.only_first, paired.only_second) == (6, 1, 2)
    assert paired.p_value == 1.0
    assert paired.differences["accuracy"].value == pytest.approx(-1 / 6)
    assert json.loads(json.dumps(paired.to_dict()))["only_second_right"] == 2


def test_the_interval_of_a_difference_is_that_of_rows_and_not_of_systems():
    """Nested systems: the number of differing rows in a draw is binomial (1000, 0.02)."""
    first, second = [i < 900 for i in range(1000)], [i < 880 for i in range(1000)]
    options = {"bootstrap": 4000}
    found = compare(system(first, **options), system(second, **options)).differences["accuracy"]
    low, high = scipy.stats.binom(1000, 0.02).ppf([0.025, 0.975]) / 1000
    assert found.value == pytest.approx(0.02)
    assert found.low == pytest.approx(low, abs=0.001)
    assert found.high == pytest.approx(high, abs=0.001)
    assert not found.may_be_chance
    crossing = system(first[::-1])
    assert compare(system(first), crossing).differences["accuracy"].may_be_chance


@pytest.mark.parametrize("multi_label", [False, True])
def test_differences_are_those_of_metrics_of_the_same_drawn_rows(multi_label):
    random = np.random.default_rng(5)
    logits = random.normal(size=(60, 2))
    labels = (logits + random.normal(size=logits.shape)).argmax(1)
    systems = []
    for noise in (0.3, 1.5):
        z = logits + noise * random.normal(size=logits.shape)
        p = 1 / (1 + np.exp(-z)) if multi_label else np.exp(z) / np.exp(z).sum(1, keepdims=True)
        systems.append(p)
    gold = [(int(i),) if multi_label else int(i) for i in labels]
    kind = {"multi_label": multi_label, "seed": 3}
    one, two = (evaluate(p, gold, ["a", "b"], bootstrap=100, **kind) for p in systems)
    paired = compare(one, two)
    draws, random = [], np.random.default_rng(3)
    for _ in range(100):
        rows = random.integers(60, size=60)
        drawn = [gold[i] for i in rows]
        draws.append([evaluate(p[rows], drawn, ["a", "b"], bootstrap=0, **kind) for p in systems])
    names = {"accuracy", "macro_f1", "micro_f1", "log_loss", "brier", "roc_auc"}
    assert set(paired.differences) == names | {"average_precision"}
    for name, found in paired.differences.items():
        assert found.value == pytest.approx(getattr(one, name) - getattr(two, name))
        values = [getattr(a, name) - getattr(b, name) for a, b in draws]
        np.testing.assert_allclose(
            [found.low, found.high], np.quantile(values, [0.025, 0.975]), atol=1e-12
        )


def test_the_same_comparison_gives_the_same_numbers_whatever_the_seed_of_the_second():
    right = [i % 3 > 0 for i in range(90)]
    one, two = system(right, seed=1), system(right[::-1], seed=1)
    other = system(right[::-1], seed=2, bootstrap=10)
    assert compare(one, two) == compare(one, other) == compare(one, two)
    same = compare(one, system(right, seed=7))
    assert {(d.value, d.low, d.high) for d in same.differences.values()} == {(0.0, 0.0, 0.0)}


def test_other_rows_or_classes_are_refused():
    own = system([True, False])
    with pytest.raises(MinllamaError, match="have different rows"):
        compare(own, system([True, False, True]))
    renamed = dataclasses.replace(own, label_names=("b", "a"))
    with pytest.raises(MinllamaError, match="have different classes"):
        compare(own, renamed)


def test_rankings_of_different_positive_classes_are_no_pair():
    p, labels = np.array([[0.2, 0.8], [0.6, 0.4], [0.3, 0.7]]), [1, 0, 0]
    second = evaluate(p, labels, ["a", "b"])
    first = evaluate(p, labels, ["a", "b"], thresholds=Thresholds((0.5,), 0))
    assert "average_precision" in compare(second, second).differences
    assert "average_precision" not in compare(second, first).differences
