"""What a report finds: confusions, mistakes, who is best; with literal numbers."""

import numpy as np
import pytest

from minllama.errors import MinllamaError
from minllama.evaluation.metrics import evaluate
from minllama.evaluation.report import Report, ReportedSplit
from minllama.evaluation.report.comparison import ranking, systems, undefined, verdict
from minllama.evaluation.report.confusion import matrix, pairs
from minllama.evaluation.report.mistakes import EXCERPT, MAX_TEXT, worst_mistakes


def fixed_evaluation():
    """Gold 0 0 0 1 1 2 of three classes, predicted 0 1 1 1 1 1."""
    probabilities = np.eye(3)[[0, 1, 1, 1, 1, 1]]
    return evaluate(probabilities, [0, 0, 0, 1, 1, 2], ["a", "b", "c"], bootstrap=0)


def test_cells_are_counts_and_shares_of_their_row():
    cells = matrix(fixed_evaluation())
    assert [[cell.count for cell in row] for row in cells] == [[1, 2, 0], [0, 2, 0], [0, 1, 0]]
    assert [[cell.share for cell in row] for row in cells] == [
        [1 / 3, 2 / 3, 0],
        [0, 1, 0],
        [0, 1, 0],
    ]
    assert [cell.right for row in cells for cell in row] == [i in (0, 4, 8) for i in range(9)]
    assert cells[0][1].title == "a → b: 2 of 3"


def test_pairs_are_the_most_frequent_confusions():
    names = [f"c{i}" for i in range(8)]
    gold = [0, 1, 1, 2, 2, 2, 3]
    predicted = [0, 0, 0, 1, 1, 0, 4]
    found = pairs(evaluate(np.eye(8)[predicted], gold, names, bootstrap=0))
    assert [(pair.gold, pair.predicted, pair.count) for pair in found] == [
        ("c1", "c0", 2),
        ("c2", "c1", 2),
        ("c2", "c0", 1),
        ("c3", "c4", 1),
    ]
    assert [pair.share for pair in found] == [1, 2 / 3, 1 / 3, 1]
    assert pairs(fixed_evaluation()) == []  # three classes: the matrix says it all


def test_mistakes_come_in_the_order_of_confidence():
    probabilities = np.array(
        [[0.9, 0.1], [0.4, 0.6], [0.003, 0.997], [0.7, 0.3], [0.8, 0.2], [0.6, 0.4]]
    )
    texts = ["right", "sixty", "certain", "seventy", "unlabelled", "negative"]
    split = ReportedSplit("dev", texts, probabilities, [0, 0, 0, 1, None, -1])
    report = Report("t", ["no", "yes"], [split])
    mistakes, count = worst_mistakes(report, split)
    assert count == 3
    assert [(m.excerpt, m.row, m.gold, m.predicted) for m in mistakes] == [
        ("certain", 3, ["no"], ["yes"]),
        ("seventy", 4, ["yes"], ["no"]),
        ("sixty", 2, ["no"], ["yes"]),
    ]
    assert mistakes[0].reason == "over 99% confidence, under 1% for the gold label"
    assert mistakes[2].reason == "60% confidence, 40% for the gold label"


def test_mistakes_of_several_labels_come_in_the_order_of_their_worst_label():
    probabilities = np.array([[0.9, 0.6], [0.1, 0.8], [0.2, 0.3], [0.9, 0.9]])
    split = ReportedSplit("dev", list("wxyz"), probabilities, [(0,), (0, 1), (), (0, 1)])
    mistakes, count = worst_mistakes(Report("t", ["no", "yes"], [split], multi_label=True), split)
    assert count == 2
    assert [(m.row, m.gold, m.predicted, m.reason) for m in mistakes] == [
        (2, ["no", "yes"], ["yes"], "10% for no, a gold label"),
        (1, ["no"], ["no", "yes"], "60% for yes, no gold label"),
    ]


def test_there_may_be_no_mistakes_or_no_labels():
    right = ReportedSplit("dev", ["x"], np.array([[1.0, 0.0]]), [0])
    unlabelled = ReportedSplit("dev", ["x"], np.array([[1.0, 0.0]]))
    for split in (right, unlabelled):
        assert worst_mistakes(Report("t", ["a", "b"], [split]), split) == ([], 0)


@pytest.mark.parametrize(
    ("text", "excerpt", "rest", "omitted"),
    [
        ("short", "short", "", 0),
        ("word " * 76, "word " * 76, "", 0),
        ("word " * 200, "word " * 62 + "word…", "word " * 200, 0),
        ("字" * 700, "字" * EXCERPT + "…", "字" * 700, 0),
        ("x" * 9000, "x" * EXCERPT + "…", "x" * MAX_TEXT, 9000 - MAX_TEXT),
    ],
)
def test_long_texts_are_folded(text, excerpt, rest, omitted):
    split = ReportedSplit("dev", [text], np.array([[1.0, 0.0]]), [1])
    (mistake,), _ = worst_mistakes(Report("t", ["a", "b"], [split]), split)
    assert (mistake.excerpt, mistake.text, mistake.omitted) == (excerpt, rest, omitted)


def system(right, bootstrap=200):
    """Of two classes, on rows of the first: right where it says so."""
    probabilities = np.where(np.array(right)[:, None], [0.9, 0.1], [0.1, 0.9])
    return evaluate(probabilities, [0] * len(right), ["a", "b"], bootstrap=bootstrap)


def first(n, rows=1000):
    """Right on the first `n` rows, as is all that gets more of them right."""
    return system([i < n for i in range(rows)])


def last(n, rows=1000):
    return system([i >= rows - n for i in range(rows)])


@pytest.mark.parametrize(
    ("own", "others", "sentence"),
    [
        (first(700), {}, "Right on 700 of 1,000 texts."),
        (
            first(700),
            {"low": first(300), "mid": first(500)},
            "Right on 700 of 1,000 texts. That is 20.0 points more than the best of the others, "
            "mid (paired 95% interval +17.6 to +22.5 points; McNemar's exact p < 0.001).",
        ),
        (
            first(300),
            {"mid": first(500)},
            "20.0 points less than mid (paired 95% interval -23.3 to -17.9 points; McNemar's exact "
            "p < 0.001).",
        ),
        # The single intervals of these overlap, and all 20 rows that differ are for this one.
        (
            first(900),
            {"mid": first(880)},
            "2.0 points more than mid (paired 95% interval +1.2 to +2.9 points; McNemar's exact "
            "p < 0.001).",
        ),
        # The same difference, from 120 rows against 100.
        (
            first(900),
            {"mid": last(880)},
            "2.0 points more than mid (paired 95% interval -0.7 to +5.1 points; McNemar's exact "
            "p = 0.200); the interval includes zero, so this may be due to chance.",
        ),
        (
            first(900),
            {"mid": last(900)},
            "That equals mid (paired 95% interval -2.7 to +2.8 points; McNemar's exact p = "
            "1.000); the interval includes zero, so what differs may be due to chance.",
        ),
        (
            first(900),
            {"mid": first(900), "low": first(100)},
            "That equals the best of the others, mid (paired 95% interval 0.0 to 0.0 points; "
            "McNemar's exact p = 1.000); the interval includes zero, so what differs may be due "
            "to chance.",
        ),
        (
            first(905),
            {"mid": first(900)},
            "0.5 points more than mid (paired 95% interval +0.2 to +1.0 points; McNemar's exact "
            "p = 0.062), based on few texts.",
        ),
    ],
)
def test_the_verdict_compares_with_the_best_of_the_others_row_by_row(own, others, sentence):
    text = verdict(own, others)
    assert text.endswith(sentence)
    assert ("chance" in text) == ("includes zero" in text)


def test_the_verdict_may_be_about_another_metric():
    gold = [0] * 90 + [1] * 10
    own = evaluate(np.eye(2)[[0] * 90 + [1] * 8 + [0] * 2], gold, ["a", "b"])
    zeros = evaluate(np.eye(2)[[0] * 100], gold, ["a", "b"])
    more = evaluate(np.eye(2)[[0] * 75 + [1] * 25], gold, ["a", "b"])
    assert own.macro_f1 == pytest.approx((180 / 182 + 16 / 18) / 2)
    assert zeros.macro_f1 == pytest.approx(90 / 95 / 2)
    # By accuracy the best of the others is `zeros`, by macro F1 `more`.
    assert "than the best of the others, zeros (" in verdict(own, {"zeros": zeros, "more": more})
    text = verdict(own, {"zeros": zeros, "more": more}, "macro_f1")
    assert text.startswith("Macro F1 0.939 on 100 texts. That is 0.199 more than the best of the ")
    assert "others, more (paired 95% interval +0" in text
    assert "McNemar" not in text  # which is about single rows
    assert "chance" not in text
    losses = verdict(own, {"zeros": zeros, "more": more}, "log_loss")
    assert losses.startswith("Log-loss 0.319 on 100 texts. That is 1.275 less than the best of")


def test_systems_on_other_rows_are_not_compared():
    other = evaluate(np.eye(2)[[0, 0, 0]], [0, 1, 0], ["a", "b"])
    with pytest.raises(MinllamaError, match="evaluations have different rows"):
        verdict(system([True] * 3), {"other": other})


def test_the_best_of_each_metric_is_marked_and_less_loss_is_better():
    own, other = systems(first(700), {"other": first(600)})
    assert (own.own, other.own) == (True, False)
    assert [value.best for value in own.values] == [True] * 5
    assert [value.best for value in other.values] == [False] * 5
    low, at, high = own.accuracy
    assert low < at == 0.7 < high
    same = systems(first(700), {"other": first(700)})
    assert all(value.best for system in same for value in system.values)


def test_what_is_not_defined_is_not_best():
    own, other = systems(first(700), {"other": first(600)}, ["roc_auc"])  # all rows are of one
    assert [(value.text, value.best) for value in (*own.values, *other.values)] == [
        ("–", False)
    ] * 2
    assert undefined(first(700)) == "ROC AUC and AP are undefined: all texts have the same class."


@pytest.mark.parametrize(
    ("gold", "shown", "said"),
    [
        ([0, 1, 2, 3, 3], True, None),
        ([0, 1, 1, 3, 3], False, "ROC AUC and AP are undefined: there are no texts of c."),
        ([0, 1, 1, 1, 1], False, "ROC AUC and AP are undefined: there are no texts of c, d."),
        ([1] * 5, False, "ROC AUC and AP are undefined: all texts have the same class."),
    ],
)
def test_of_more_classes_rankings_are_shown_where_all_occur(gold, shown, said):
    result = evaluate(np.full((5, 4), 0.25), gold, list("abcd"), bootstrap=0)
    assert ranking(result) == (["roc_auc", "average_precision"] if shown else [])
    assert undefined(result) == said
