"""Metrics: literal numbers worked out by hand, scikit-learn, and the binomial distribution."""

import json
import math
import sys
import time

import numpy as np
import pytest
import sklearn.metrics

from minllama.errors import MinllamaError
from minllama.evaluation.metrics import (
    CalibrationBin,
    calibration_bins,
    calibration_error,
    evaluate,
    predictions,
)

# Six rows, three classes; rows 2 and 4 are wrong.
PROBABILITIES = np.array(
    [
        [0.7, 0.2, 0.1],
        [0.4, 0.5, 0.1],
        [0.1, 0.8, 0.1],
        [0.3, 0.3, 0.4],
        [0.2, 0.2, 0.6],
        [0.1, 0.1, 0.8],
    ],
    dtype=np.float32,
)
LABELS = [0, 0, 1, 1, 2, 2]
NAMES = ["bad", "fair", "good"]


def random_case(rows, classes, seed=0, multi_label=False):
    """Probabilities, and labels that are drawn from something near them."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, classes)) * 2
    noisy = logits + random.normal(size=logits.shape)
    if multi_label:
        probabilities = 1 / (1 + np.exp(-logits))
        labels = [tuple(np.flatnonzero(row).tolist()) for row in noisy > 0]
    else:
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        labels = noisy.argmax(1).tolist()
    return probabilities.astype(np.float32), labels, [f"class {i}" for i in range(classes)]


def indicator(labels, classes):
    return np.array([[i in row for i in range(classes)] for row in labels])


def test_metrics_are_those_worked_out_by_hand():
    result = evaluate(PROBABILITIES, LABELS, NAMES, bootstrap=0)
    assert result.count == 6
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.micro_f1 == pytest.approx(4 / 6)
    scores = [
        [row.precision, row.recall, row.f1, row.support, row.predicted] for row in result.per_class
    ]
    np.testing.assert_allclose(
        scores, [[1, 1 / 2, 2 / 3, 2, 1], [1 / 2, 1 / 2, 1 / 2, 2, 2], [2 / 3, 1, 0.8, 2, 3]]
    )
    assert result.macro_precision == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert result.macro_recall == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert result.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3)
    assert result.confusion.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 2]]
    product = 0.7 * 0.4 * 0.8 * 0.3 * 0.6 * 0.8
    assert result.log_loss == pytest.approx(-math.log(product) / 6, rel=1e-6)
    assert result.brier == pytest.approx((0.14 + 0.62 + 0.06 + 0.74 + 0.24 + 0.06) / 6, rel=1e-6)
    # Each in a bin of its own but for the two of 0.8: the gaps count once, that of 0.8 twice.
    assert result.calibration_error == pytest.approx(
        (0.3 + 0.5 + 0.4 + 0.4 + 2 * 0.2) / 6, rel=1e-6
    )
    assert result.intervals == {}


def test_of_one_class_all_is_right():
    result = evaluate(np.ones((3, 1)), [0, 0, 0], ["all"])
    assert (result.accuracy, result.macro_f1, result.brier) == (1, 1, 0)
    assert result.confusion.tolist() == [[3]]


@pytest.mark.parametrize("classes", [1, 2, 5, 77])
def test_one_label_a_row_agrees_with_scikit_learn(classes):
    probabilities, labels, names = random_case(300, classes)
    result = evaluate(probabilities, labels, names, bootstrap=0)
    predicted = probabilities.argmax(1)
    every = range(classes)
    assert result.accuracy == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    per_class = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=every, zero_division=0
    )
    scores = [[row.precision, row.recall, row.f1, row.support] for row in result.per_class]
    np.testing.assert_allclose(np.nan_to_num(np.array(scores, dtype=float)).T, per_class)
    # Its default: the classes that are there.
    macro = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, average="macro", zero_division=0
    )
    np.testing.assert_allclose(
        [result.macro_precision, result.macro_recall, result.macro_f1], macro[:3]
    )
    if classes > 1:  # scikit-learn has nothing for one class
        expected = sklearn.metrics.confusion_matrix(labels, predicted, labels=every)
        np.testing.assert_array_equal(result.confusion, expected)
        expected = sklearn.metrics.log_loss(labels, probabilities, labels=every)
        assert result.log_loss == pytest.approx(expected, rel=1e-6)
        expected = sklearn.metrics.brier_score_loss(
            labels, probabilities, labels=every, scale_by_half=False
        )
        assert result.brier == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 6, 20])
def test_several_labels_a_row_agree_with_scikit_learn(classes):
    probabilities, labels, names = random_case(200, classes, multi_label=True)
    result = evaluate(probabilities, labels, names, multi_label=True, bootstrap=0)
    gold, predicted = indicator(labels, classes), probabilities >= 0.5
    assert result.accuracy == pytest.approx(sklearn.metrics.accuracy_score(gold, predicted))
    np.testing.assert_array_equal(
        result.confusion, sklearn.metrics.multilabel_confusion_matrix(gold, predicted)
    )
    for average in ("micro", "macro"):
        expected = sklearn.metrics.f1_score(gold, predicted, average=average)
        assert getattr(result, f"{average}_f1") == pytest.approx(expected)
    per_class = sklearn.metrics.precision_recall_fscore_support(gold, predicted)
    scores = [[row.precision, row.recall, row.f1, row.support] for row in result.per_class]
    np.testing.assert_allclose(np.transpose(scores), per_class)
    losses = [
        sklearn.metrics.log_loss(gold[:, i], probabilities[:, i], labels=[0, 1])
        for i in range(classes)
    ]
    assert result.log_loss == pytest.approx(np.mean(losses), rel=1e-6)
    briers = [
        sklearn.metrics.brier_score_loss(gold[:, i], probabilities[:, i]) for i in range(classes)
    ]
    assert result.brier == pytest.approx(np.mean(briers), rel=1e-6)


def test_a_single_label_that_is_there_or_not_is_a_multi_label_task():
    result = evaluate(
        np.array([[0.9], [0.2], [0.6], [0.5]]), [(0,), (), (), (0,)], ["spam"], multi_label=True
    )
    assert result.accuracy == 0.75
    assert result.confusion.tolist() == [[[1, 1], [0, 2]]]
    assert result.macro_f1 == result.micro_f1 == pytest.approx(0.8)
    assert result.brier == pytest.approx((0.01 + 0.04 + 0.36 + 0.25) / 4)


def test_a_class_that_does_not_occur_counts_in_no_average():
    # `good` is a gold label and never predicted; `fair` is predicted only; `absent` is neither.
    probabilities = np.array([[0.9, 0.1, 0, 0], [0.1, 0.9, 0, 0]])
    result = evaluate(probabilities, [0, 2], ["bad", "fair", "good", "absent"], bootstrap=10)
    assert [row.f1 for row in result.per_class] == [1.0, 0.0, 0.0, None]
    assert result.macro_f1 == pytest.approx(1 / 3)
    assert result.per_class[3].precision is None
    assert result.per_class[3].recall is None
    # A gold label of probability zero costs much, and not infinitely much.
    assert result.log_loss == pytest.approx((-math.log(0.9) + 23 * math.log(2)) / 2, rel=1e-6)


def test_rows_without_any_label_count_as_right_when_none_is_predicted():
    result = evaluate(
        np.full((3, 2), 0.25), [(), (), ()], ["a", "b"], multi_label=True, bootstrap=5
    )
    assert result.accuracy == 1.0
    assert result.macro_f1 == result.micro_f1 == 0.0
    assert result.calibration_error == pytest.approx(0.25)


def test_one_row_is_enough():
    result = evaluate(PROBABILITIES[:1], [0], NAMES)
    assert (result.accuracy, result.macro_f1) == (1.0, 1.0)
    assert result.intervals["accuracy"] == (1.0, 1.0)
    assert result.calibration_error == pytest.approx(0.3, rel=1e-6)


def test_the_first_of_equally_likely_classes_is_predicted_and_each_label_from_one_half_on():
    halves = np.array([[0.5, 0.5]])
    assert predictions(halves).tolist() == [[True, False]]
    assert predictions(halves, multi_label=True).tolist() == [[True, True]]


def test_a_bin_holds_its_upper_edge_and_the_first_one_zero():
    bins = calibration_bins(
        np.array([0.0, 0.5, 0.51, 1.0]), np.array([False, True, False, True]), bins=2
    )
    assert bins == (
        CalibrationBin(low=0.0, high=0.5, count=2, confidence=0.25, accuracy=0.5),
        CalibrationBin(low=0.5, high=1.0, count=2, confidence=pytest.approx(0.755), accuracy=0.5),
    )
    assert calibration_error(bins) == pytest.approx(0.5 * 0.25 + 0.5 * 0.255)


def test_an_empty_bin_has_neither_confidence_nor_accuracy():
    bins = calibration_bins(np.array([0.9]), np.array([True]))
    assert len(bins) == 15
    assert [bin_.count for bin_ in bins] == [0] * 13 + [1, 0]
    assert bins[0].confidence is bins[0].accuracy is None


def test_the_calibration_of_several_labels_is_that_of_each_label():
    # 0.9 comes true half the time, 0.2 never.
    result = evaluate(
        np.array([[0.9, 0.2], [0.9, 0.2]]), [(0,), ()], ["a", "b"], multi_label=True, bootstrap=0
    )
    assert result.calibration_error == pytest.approx((0.4 + 0.2) / 2)


def test_the_interval_of_the_accuracy_is_the_binomial_one():
    rows = 2000
    labels = [0 if i < 0.7 * rows else 1 for i in range(rows)]
    result = evaluate(np.tile([0.8, 0.2], (rows, 1)), labels, ["a", "b"], bootstrap=4000)
    half_width = 1.96 * math.sqrt(0.7 * 0.3 / rows)
    low, high = result.intervals["accuracy"]
    assert low == pytest.approx(0.7 - half_width, abs=0.0015)
    assert high == pytest.approx(0.7 + half_width, abs=0.0015)
    # Brier scores are 0.08 and 1.28 here, so that interval is the same one, mirrored and scaled.
    low, high = result.intervals["brier"]
    assert low == pytest.approx(0.44 - 1.2 * half_width, abs=0.002)
    assert high == pytest.approx(0.44 + 1.2 * half_width, abs=0.002)


@pytest.mark.parametrize("multi_label", [False, True])
def test_intervals_are_those_of_metrics_of_rows_drawn_anew(multi_label):
    probabilities, labels, names = random_case(40, 12, seed=3, multi_label=multi_label)
    result = evaluate(probabilities, labels, names, multi_label=multi_label, bootstrap=200, seed=7)
    random, samples = np.random.default_rng(7), []  # some draws lack some classes
    for _ in range(200):
        rows = random.integers(40, size=40)
        drawn = [labels[i] for i in rows]
        samples.append(
            evaluate(probabilities[rows], drawn, names, multi_label=multi_label, bootstrap=0)
        )
    names = {"accuracy", "macro_f1", "micro_f1", "log_loss", "brier"}
    assert set(result.intervals) == names | {"roc_auc", "average_precision"}
    for name, interval in result.intervals.items():
        values = [getattr(sample, name) for sample in samples]
        if name not in names:  # in a draw the mean is over the classes that are in it
            of_classes = [[getattr(row, name) for row in sample.per_class] for sample in samples]
            values = [np.mean([v for v in each if v is not None]) for each in of_classes]
        np.testing.assert_allclose(interval, np.quantile(values, [0.025, 0.975]))


def test_the_same_seed_gives_the_same_intervals_and_another_one_others():
    case = random_case(100, 3)
    first, again, other = (evaluate(*case, seed=seed).to_dict() for seed in (1, 1, 2))
    assert first == again
    assert first["intervals"] != other["intervals"]


def test_everything_fits_into_json():
    result = evaluate(PROBABILITIES, LABELS, [*NAMES[:2], "gut 🦙"]).to_dict()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["confusion"] == [[1, 1, 0], [0, 1, 1], [0, 0, 2]]
    assert result["per_class"][2]["name"] == "gut 🦙"
    assert set(result["intervals"]["accuracy"]) <= {i / 6 for i in range(7)}


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (2, [math.nan, 0.5, 0.5], "row 3 has a probability that is not a finite number"),
        (2, [math.inf, 0.5, 0.5], "row 3 has a probability that is not a finite number"),
        (4, [0.5, 0.5, 0.5], "row 5 has probabilities that do not sum to one"),
        (0, [1.5, -0.5, 0.0], "row 1 has a probability outside 0 to 1"),
        (
            slice(1, 4),
            [0.5, 0.5, 0.5],
            r"3 of 6 rows \(the first is row 2\) have probabilities that do not",
        ),
    ],
)
def test_numbers_that_are_no_probabilities_are_refused(row, value, message):
    probabilities = PROBABILITIES.copy()
    probabilities[row] = value
    with pytest.raises(MinllamaError, match=message):
        evaluate(probabilities, LABELS, NAMES)


@pytest.mark.parametrize(
    ("labels", "multi_label", "message"),
    [
        ([0, 0, 1, -1, 2, 2], False, "row 4 has no label; remove such rows"),
        ([None, 0, 1, -1, 2, 2], False, r"2 of 6 rows \(the first is row 1\) have no label"),
        ([(), None, (1,), (), (), ()], True, "row 2 has no label"),
        ([0, 0, 1, 1, 2, 3], False, "row 6 has the label 3, but the 3 classes are numbered 0 to 2"),
        ([(), (), (), (), (), (0, 5)], True, "row 6 has the label 5"),
        (["bad"] * 6, False, "row 1 has the label 'bad'"),
        ([0, 1], False, "2 labels for 6 rows"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(labels, multi_label, message):
    with pytest.raises(MinllamaError, match=message):
        evaluate(PROBABILITIES, labels, NAMES, multi_label=multi_label)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.zeros((0, 3)), [], "there are no rows"),
        (PROBABILITIES[:, :2], LABELS, r"shape \(6, 2\) do not fit 3 label names"),
        (PROBABILITIES[0], LABELS, r"shape \(3,\) do not fit 3 label names"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(probabilities, labels, message):
    with pytest.raises(MinllamaError, match=message):
        evaluate(probabilities, labels, NAMES)


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MinllamaError, match=r"minllama\[train\]"):
        evaluate(PROBABILITIES, LABELS, NAMES)


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_seconds():
    case = random_case(100_000, 77)
    start = time.perf_counter()
    evaluate(*case)
    assert time.perf_counter() - start < 30  # about 1 on an idle machine
