"""Thresholds: chosen as trying all of them would, refused where they cannot be, kept exactly."""

import numpy as np
import pytest
import sklearn.metrics

from minllama.errors import MinllamaError, OptionError
from minllama.evaluation.metrics import evaluate, predictions
from minllama.evaluation.thresholds import (
    Thresholds,
    as_thresholds,
    check_thresholds,
    choose_thresholds,
    fixed_thresholds,
    one_line,
    read,
    saved,
)
from minllama.options.evaluation import ThresholdOptions

LABELS = ["no", "yes"]
METRICS = {
    "f1": sklearn.metrics.f1_score,
    "macro-f1": lambda gold, said: sklearn.metrics.f1_score(gold, said, average="macro"),
    "accuracy": sklearn.metrics.accuracy_score,
    "balanced-accuracy": sklearn.metrics.balanced_accuracy_score,
}


def case(seed=0, rows=120, digits=2, rare=0.8):
    random = np.random.default_rng(seed)
    p = random.random(rows).round(digits).astype(np.float32)
    gold = p + random.normal(size=rows) * 0.3 > rare
    return p, gold


def chosen(rule, p, gold, **options):
    """Of two classes, the second positive."""
    found = choose_thresholds(
        ThresholdOptions(threshold=rule, **options),
        np.stack([1 - p, p], 1),
        np.stack([~gold, gold], 1),
        LABELS,
        multi_label=False,
        source="dev.csv",
    )
    (value,) = found.thresholds.values
    return value, found


def all_predictions(p):
    """Every set of rows that some threshold from 0 to 1 predicts."""
    cuts = sorted({0.0, 1.0, *p.tolist()})
    return [p >= cut for cut in cuts]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("seed", "digits"), [(0, 2), (1, 1), (2, 7)])
def test_no_other_threshold_is_better_by_the_metric(metric, seed, digits):
    p, gold = case(seed, digits=digits)
    value, found = chosen(metric, p, gold)
    best = max(METRICS[metric](gold, said) for said in all_predictions(p))
    said = predictions(np.stack([1 - p, p], 1), thresholds=found.thresholds)[:, 1]
    assert METRICS[metric](gold, said) == pytest.approx(best)
    assert 0 <= value <= 1
    assert found.notices == ()
    assert found.thresholds.how == f"{metric} on dev.csv"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("goal", [0.5, 0.7, 0.8])
@pytest.mark.parametrize("name", ["precision", "recall"])
def test_a_wanted_precision_is_reached_with_the_highest_recall_and_the_other_way(name, goal):
    p, gold = case(3)
    _, found = chosen(f"{name}={goal}", p, gold)
    pairs = [
        (sklearn.metrics.precision_score(gold, said), sklearn.metrics.recall_score(gold, said))
        for said in all_predictions(p)
        if said.any()
    ]
    at = 0 if name == "precision" else 1
    best = max(pair[1 - at] for pair in pairs if pair[at] >= goal)
    said = found.thresholds.predictions(np.stack([1 - p, p], 1))[:, 1]
    reached = sklearn.metrics.precision_score(gold, said), sklearn.metrics.recall_score(gold, said)
    assert reached[at] >= goal
    assert reached[1 - at] == pytest.approx(best)
    assert found.notices == ()


def test_a_precision_that_nine_of_ten_reach_is_0_9():
    p = np.linspace(0.1, 0.9, 20, dtype=np.float32)
    gold = np.array([False] * 10 + [True] * 4 + [False] + [True] * 5)
    value, found = chosen("precision=0.9", p, gold)
    said = found.thresholds.predictions(np.stack([1 - p, p], 1))[:, 1]
    assert (said.sum(), (said & gold).sum()) == (10, 9)
    assert found.notices == ("threshold of 'yes': chosen on dev.csv from only 9 texts with it",)
    assert value == 0.5  # between 0.479 and 0.521, in as few digits as there are


def test_a_precision_that_cannot_be_reached_is_said_with_the_best_that_can():
    p = np.array([0.9, 0.8, 0.7, 0.6, 0.2], dtype=np.float32)
    gold = np.array([False, True, True, False, False])
    value, found = chosen("precision=0.95", p, gold)
    assert found.notices == (
        "threshold of 'yes': precision 0.95 is not reached on dev.csv; the best is 0.667, "
        "with a recall of 1.000, from 0.65 on, which is used",
    )
    assert value == 0.65
    # All can be recalled, and nothing predicted has no precision.
    assert chosen("recall=1", p, gold)[0] == 0.65


@pytest.mark.parametrize("label", [False, True])
def test_rows_of_one_class_cannot_choose(label):
    p, _ = case()
    value, found = chosen("f1", p, np.full(len(p), label))
    assert value == 0.5
    which = "every text" if label else "no text"
    assert found.notices == (
        f"threshold of 'yes': {which} of dev.csv has this label, so f1 cannot be applied; using "
        "0.5",
    )


def test_several_labels_have_a_threshold_each():
    random = np.random.default_rng(4)
    p = random.random((200, 3)).astype(np.float32)
    gold = p + random.normal(size=p.shape) * 0.3 > [0.9, 0.5, 0.2]
    names = ["late", "broken", "rude"]
    kind = {"multi_label": True, "source": "dev.csv"}
    found = choose_thresholds(ThresholdOptions(threshold="f1"), p, gold, names, **kind)
    for i in range(3):
        said = p[:, i] >= np.float32(found.thresholds.values[i])
        best = max(sklearn.metrics.f1_score(gold[:, i], s) for s in all_predictions(p[:, i]))
        assert sklearn.metrics.f1_score(gold[:, i], said) == pytest.approx(best)
    labels = [tuple(np.flatnonzero(row).tolist()) for row in gold]
    tuned, usual = (
        evaluate(p, labels, names, multi_label=True, thresholds=t, bootstrap=0)
        for t in (found.thresholds, None)
    )
    assert tuned.macro_f1 > usual.macro_f1
    assert [row.threshold for row in tuned.per_class] == list(found.thresholds.values)
    assert tuned.roc_auc == usual.roc_auc
    same = choose_thresholds(ThresholdOptions(threshold="macro-f1"), p, gold, names, **kind)
    assert same.thresholds.values == found.thresholds.values
    mixed = ThresholdOptions(threshold=("0.25", "rude=f1", "late = precision=0.8"))
    mixed = choose_thresholds(mixed, p, gold, names, **kind).thresholds
    assert mixed.values[0] == chosen("precision=0.8", p[:, 0], gold[:, 0])[0]
    assert mixed.values[1:] == (0.25, found.thresholds.values[2])
    assert mixed.how == "precision=0.8 and f1 on dev.csv"


def test_the_confusion_matrix_follows_the_threshold():
    probabilities = np.array([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.69, 0.31]])
    kind = {"thresholds": Thresholds((0.31,), 1), "bootstrap": 0}
    result = evaluate(probabilities, [0, 1, 1, 0], LABELS, **kind)
    assert result.confusion.tolist() == [[1, 1], [0, 2]]
    assert result.accuracy == 0.75
    assert result.per_class[1].threshold == 0.31
    # How sure it is stays what it was: the likeliest class is right on 3 of 4 as well.
    usual = evaluate(probabilities, [0, 1, 1, 0], LABELS, bootstrap=0)
    assert result.bins == usual.bins
    assert (result.log_loss, result.brier) == (usual.log_loss, usual.brier)


def test_a_threshold_is_reached_by_the_probability_that_is_written_so():
    p = np.array([[0.3, 0.7], [0.7, 0.3]], dtype=np.float32)
    for numbers in (p, p.astype(np.float64)):
        assert Thresholds((0.7,), 1).predictions(numbers)[:, 1].tolist() == [True, False]
        assert Thresholds((0.3, 0.3)).predictions(numbers).all()


@pytest.mark.parametrize(
    ("threshold", "labels", "multi_label", "message"),
    [
        (("0.3",), ["a", "b", "c"], False, "not for 3 classes"),
        (("0.3", "0.4"), LABELS, False, "is given 2 times; give one$"),
        (("0.3", "0.4"), LABELS, True, "give one, or LABEL=THRESHOLD"),
        (("x=0.3",), LABELS, True, "'x=0.3': no such label or rule; give LABEL=0.3 with one of no"),
        (("x=0.3",), LABELS, False, "'x=0.3': no such label or rule"),
        (("no=0.3", "no=0.4"), LABELS, True, "twice for 'no'"),
        (("precision=0.9",), ["precision", "b"], True, "'precision' is also a label; give"),
    ],
)
def test_thresholds_that_the_task_cannot_have_are_refused(threshold, labels, multi_label, message):
    options = ThresholdOptions(threshold=threshold)
    with pytest.raises(OptionError, match=message):
        check_thresholds(options, labels, multi_label=multi_label, can_choose=True)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        ("1.5", r"must be in \[0, 1\], not 1.5"),
        ("-0.1", r"must be in \[0, 1\]"),
        ("nan", r"must be in \[0, 1\]"),
        ("precision=0", r"precision must be in \(0, 1\]"),
        ("recall=1.1", r"recall must be in \(0, 1\]"),
        ("best", "f1, macro-f1, accuracy, balanced-accuracy, precision=0.9"),
        ("30%", "not '30%'"),
        ("", "empty string"),
    ],
)
def test_what_is_no_threshold_is_refused_at_birth(threshold, message):
    with pytest.raises(OptionError, match=message):
        ThresholdOptions(threshold=(threshold,))


def test_nothing_is_chosen_on_what_is_measured():
    with pytest.raises(OptionError, match="f1 is chosen on the dev split in training, not"):
        fixed_thresholds(ThresholdOptions(threshold="f1"), LABELS, multi_label=False)


@pytest.mark.parametrize(
    ("positive", "labels", "multi_label", "message"),
    [
        ("maybe", LABELS, False, "'maybe' is not one of the classes 'no' and 'yes'"),
        ("a", ["a", "b", "c"], False, "is for two classes, and these are 3 classes"),
        ("no", LABELS, True, "these are multi-label texts"),
    ],
)
def test_the_positive_class_is_one_of_two(positive, labels, multi_label, message):
    with pytest.raises(OptionError, match=message):
        fixed_thresholds(ThresholdOptions(positive=positive), labels, multi_label=multi_label)


def test_options_take_the_place_of_what_a_classifier_has_and_of_no_more():
    def fixed(own, threshold=(), positive=None, multi_label=False):
        options = ThresholdOptions(threshold=threshold, positive=positive)
        return fixed_thresholds(options, LABELS, multi_label=multi_label, own=own)

    own = Thresholds((0.7,), 0, "f1 on dev.csv")
    assert fixed(None) is None
    assert fixed(own) == fixed(own, positive="no") == own
    assert fixed(own, "0.2") == Thresholds((0.2,), 0)  # the positive class stays
    assert fixed(own, "yes=0.2") == fixed(own, "0.2", "yes") == Thresholds((0.2,), 1)
    assert fixed(own, positive="yes") == Thresholds((pytest.approx(0.3),), 1, "f1 on dev.csv")
    assert fixed(None, positive="no") == Thresholds((0.5,), 0)
    several = Thresholds((0.1, 0.2))
    assert fixed(several, "yes=0", multi_label=True).values == (0.1, 0.0)
    assert fixed(several, ("0.9", "yes=0.4"), multi_label=True).values == (0.9, 0.4)
    assert fixed(None, "no=0.4", multi_label=True).values == (0.4, 0.5)


@pytest.mark.parametrize(
    ("thresholds", "multi_label"),
    [(Thresholds((0.25,), 0, "f1 on a"), False), (Thresholds((0.1, 0.2), None, ""), True)],
)
def test_what_was_saved_is_read_again(thresholds, multi_label):
    content = saved(thresholds, LABELS)
    assert read(content, LABELS, multi_label=multi_label) == thresholds
    for damage in (
        {"values": {"no": 2.0}},
        {"values": {"no": True}},
        {"values": {"no": 10**400}},
        {"values": {"no": "0.5"}},
        {"values": {"no": float("nan")}},
        {"values": {}},
        {"values": {"other": 0.5}},
        {"values": [0.5]},
        {"how": 3},
        {"how": "\x1b[31mf1"},
    ):
        with pytest.raises((KeyError, TypeError, ValueError)):
            read(content | damage, LABELS, multi_label=multi_label)
    with pytest.raises(KeyError):
        read({}, LABELS, multi_label=multi_label)


def test_thresholds_are_said_in_a_line():
    names = ["a", "b", "c", "d", "e"]
    assert (
        one_line(Thresholds((0.31,), 1, "f1 on x"), LABELS) == "threshold 0.31 for 'yes' (f1 on x)"
    )
    assert one_line(Thresholds((0.3, 0.3)), LABELS) == "threshold 0.3 for each label"
    assert one_line(Thresholds((0.3, 0.4)), LABELS) == "thresholds 0.3 for 'no', 0.4 for 'yes'"
    assert one_line(Thresholds((0.3, 0.4, 0.1, 0.9, 0.5)), names) == (
        "thresholds from 0.1 to 0.9 by label"
    )


def test_numbers_by_label_are_taken_from_python():
    assert as_thresholds(0.3, LABELS, 1) == Thresholds((0.3,), 1)
    assert as_thresholds({"no": 1}, LABELS, None) == Thresholds((1.0, 0.5))
    for value, message in (
        ({"no": 0.3}, "no label 'no' to set a threshold for; the labels are yes"),
        (2, r"a number in \[0, 1\], not 2"),
        (True, "not True"),
        (float("nan"), "not nan"),
        ("0.5", "not '0.5'"),
    ):
        with pytest.raises(MinllamaError, match=message):
            as_thresholds(value, LABELS, 1)


def test_truth_values_are_named_as_the_file_writes_them():
    labels = ["false", "true"]
    given = ThresholdOptions(threshold=("True=0.3",), positive="TRUE")
    assert fixed_thresholds(given, labels, multi_label=False) == Thresholds((0.3,), 1)
    only = ThresholdOptions(threshold=("0.7",), positive="False")
    assert fixed_thresholds(only, labels, multi_label=False) == Thresholds((0.7,), 0)
    several = ThresholdOptions(threshold=("FALSE=0.2",))
    assert fixed_thresholds(several, labels, multi_label=True) == Thresholds((0.2, 0.5))
    both = ThresholdOptions(positive="TRUE")
    with pytest.raises(OptionError, match="name one of them"):
        fixed_thresholds(both, ["True", "true"], multi_label=False)
