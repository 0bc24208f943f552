"""ROC AUC and average precision: scikit-learn's numbers, ties and weights included."""

import json

import numpy as np
import pytest
import sklearn.metrics
import sklearn.preprocessing

from minllama.evaluation.metrics import evaluate
from minllama.evaluation.ranking import Ranking
from minllama.evaluation.thresholds import Thresholds


@pytest.mark.parametrize("digits", [1, 2, 8])  # 0.1 apart, most rows have equals
@pytest.mark.parametrize("weighted", [False, True])
def test_both_measures_are_those_of_scikit_learn(digits, weighted):
    random = np.random.default_rng(digits)
    scores = random.random((200, 4)).round(digits)
    gold = scores + random.normal(size=scores.shape) * 0.4 > [0.5, 0.9, 0.2, 0.6]
    weights = random.integers(0, 4, 200) if weighted else None
    roc_auc, average_precision = Ranking(scores, gold).measured(weights)
    for i in range(4):
        label = gold[:, i], scores[:, i]
        of_rows = {"sample_weight": weights}
        expected = sklearn.metrics.roc_auc_score(*label, **of_rows)
        assert roc_auc[i] == pytest.approx(expected, abs=1e-12)
        expected = sklearn.metrics.average_precision_score(*label, **of_rows)
        assert average_precision[i] == pytest.approx(expected, abs=1e-12)


def test_equal_probabilities_rank_nothing():
    roc_auc, average_precision = Ranking(np.full((8, 1), 0.3), np.eye(8, 1).astype(bool)).measured()
    assert (roc_auc[0], average_precision[0]) == (0.5, 1 / 8)


def test_literal_numbers():
    # Ranks of the positives 1 and 3 of 4: precision 1 and 2/3; of 4 pairs 3 are won.
    roc_auc, average_precision = Ranking(
        np.array([[0.9], [0.8], [0.7], [0.1]]), np.array([[True], [False], [True], [False]])
    ).measured()
    assert roc_auc[0] == 3 / 4
    assert average_precision[0] == pytest.approx((1 + 2 / 3) / 2)


def test_of_two_classes_it_is_the_positive_one_that_is_ranked():
    random = np.random.default_rng(0)
    p = random.random(300).round(2)
    gold = (p + random.normal(size=300) * 0.5 > 0.8).astype(int)
    probabilities, names = np.stack([1 - p, p], 1), ["no", "yes"]
    second = evaluate(probabilities, gold.tolist(), names)
    assert second.positive == "yes"
    assert second.roc_auc == pytest.approx(sklearn.metrics.roc_auc_score(gold, p))
    expected = sklearn.metrics.average_precision_score(gold, p)
    assert second.average_precision == pytest.approx(expected)
    low, high = second.intervals["average_precision"]
    assert low < expected < high
    first = evaluate(probabilities, gold.tolist(), names, thresholds=Thresholds((0.5,), 0))
    assert first.positive == "no"
    expected = sklearn.metrics.average_precision_score(1 - gold, probabilities[:, 0])
    assert first.average_precision == pytest.approx(expected)
    by_class = [row.average_precision for row in first.per_class]
    assert by_class == [first.average_precision, second.average_precision]


def test_the_mean_is_over_the_labels_that_some_rows_have_and_others_not():
    random = np.random.default_rng(1)
    scores = random.random((50, 3))
    gold = np.stack([scores[:, 0] > 0.4, np.zeros(50, bool), np.ones(50, bool)], 1)
    gold[:5, 0] = ~gold[:5, 0]
    labels = [tuple(np.flatnonzero(row).tolist()) for row in gold]
    result = evaluate(scores, labels, ["some", "none", "all"], multi_label=True)
    assert result.roc_auc == pytest.approx(sklearn.metrics.roc_auc_score(gold[:, 0], scores[:, 0]))
    assert [row.roc_auc is None for row in result.per_class] == [False, True, True]
    assert [row.average_precision is None for row in result.per_class] == [False, True, True]
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["per_class"][1]["roc_auc"] is None


@pytest.mark.parametrize("label", [0, 1])
def test_rows_of_one_class_have_no_ranking(label):
    result = evaluate(np.array([[0.4, 0.6], [0.9, 0.1]]), [label, label], ["a", "b"])
    assert result.roc_auc is result.average_precision is None
    assert "roc_auc" not in result.intervals
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("digits", [1, 12])
def test_of_more_classes_each_stands_against_the_rest(digits):
    random, names = np.random.default_rng(3), ["a", "b", "c", "d"]
    gold = np.array([*range(4), *random.choice(4, 90, p=[0.6, 0.2, 0.15, 0.05])])
    p = random.random((94, 4)).round(digits) + np.eye(4)[gold] / 2 + 0.05  # with and without ties
    p /= p.sum(1, keepdims=True)
    result = evaluate(p, gold.tolist(), names)
    assert result.positive is None
    kind = {"multi_class": "ovr", "average": "macro"}
    assert result.roc_auc == pytest.approx(sklearn.metrics.roc_auc_score(gold, p, **kind))
    columns = sklearn.preprocessing.label_binarize(gold, classes=range(4))
    expected = sklearn.metrics.average_precision_score(columns, p, average="macro")
    assert result.average_precision == pytest.approx(expected)
    by_class = sklearn.metrics.roc_auc_score(gold, p, multi_class="ovr", average=None)
    assert [row.roc_auc for row in result.per_class] == pytest.approx(by_class)
    by_class = sklearn.metrics.average_precision_score(columns, p, average=None)
    assert [row.average_precision for row in result.per_class] == pytest.approx(by_class)
    assert {row.threshold for row in result.per_class} == {None}
    low, high = result.intervals["roc_auc"]
    assert low < result.roc_auc < high
    assert result.intervals["average_precision"][0] < result.average_precision


def test_of_more_classes_the_mean_is_of_all_of_them_or_not_defined():
    random = np.random.default_rng(3)
    p = random.dirichlet(np.ones(3), 40)
    gold = random.integers(2, size=40)  # none is a c
    result = evaluate(p, gold.tolist(), ["a", "b", "c"])
    assert result.positive is result.roc_auc is result.average_precision is None
    assert not {"roc_auc", "average_precision"} & set(result.intervals)
    expected = [sklearn.metrics.roc_auc_score(gold == label, p[:, label]) for label in range(2)]
    assert [row.roc_auc for row in result.per_class] == [*map(pytest.approx, expected), None]
    result = evaluate(p, [1] * 40, ["a", "b", "c"])
    assert {row.roc_auc for row in result.per_class} == {result.roc_auc} == {None}
    json.dumps(result.to_dict(), allow_nan=False)


def test_one_class_alone_has_no_ranking():
    result = evaluate(np.ones((3, 1)), [0, 0, 0], ["a"])
    assert result.positive is result.roc_auc is result.per_class[0].roc_auc is None
