"""The summary in the terminal: 80 columns, numbers whole, nothing of a name taken for a command."""

import io
import re

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from minllama.evaluation.metrics import evaluate
from minllama.evaluation.report import print_summary

NAMES = ["awful", "[red]bad[/red]", "\x1b[31mfair\x07", "a name that goes on " * 9, "評価 🦙"]


def evaluation(names, multi_label=False, rows=60):
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(len(names)), rows)
    if multi_label:
        labels = [tuple(np.flatnonzero(row < 0.3).tolist()) for row in probabilities]
    else:
        labels = random.integers(0, len(names), rows).tolist()
    return evaluate(probabilities, labels, names, multi_label=multi_label, bootstrap=20)


def summary(result, others=None, *, terminal=False, width=80):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, highlight=False)
    print_summary("dev", result, others, console=console)
    return file.getvalue()


def test_a_summary_says_metrics_intervals_and_classes():
    probabilities = np.eye(2)[[0, 0, 0, 1]]
    result = evaluate(probabilities, [0, 0, 1, 1], ["no", "yes"], bootstrap=0)
    lines = summary(result, {"majority class": result}).splitlines()
    assert " ".join(" ".join(lines[:3]).split()).split(" ", 1) == [
        "dev:",
        "Right on 3 of 4 texts. That equals majority class (paired 95% interval 0.0 to 0.0 "
        "points; McNemar's exact p = 1.000); the interval includes zero, so what differs may be "
        "due to chance.",
    ]
    assert [line.split() for line in lines[3:]] == [
        [],
        ["Accuracy", "Macro", "F1", "Log-loss", "Brier", "ECE"],
        ["this", "classifier", "75.0%", "0.733", "3.986", "0.500", "0.250"],
        ["majority", "class", "75.0%", "0.733", "3.986", "0.500", "0.250"],
        [],
        ["positive:", "yes", "ROC", "AUC", "95%", "interval", "AP", "95%", "interval"],
        ["this", "classifier", "0.750", "0.750"],
        ["majority", "class", "0.750", "0.750"],
        [],
        ["class", "AUC", "AP", "F1", "precision", "recall", "gold", "predicted"],
        ["no", "0.750", "0.667", "0.800", "0.667", "1.000", "2", "3"],
        ["yes", "0.750", "0.750", "0.667", "1.000", "0.500", "2", "1"],
    ]


def test_rankings_of_more_classes_are_shown_where_all_occur():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.4, 0.5, 0.1], [0.5, 0.2, 0.3], [0.3, 0.4, 0.3]])
    result = evaluate(probabilities, [0, 1, 2, 2], ["a", "b", "c"], bootstrap=0)
    lines = [line.split() for line in summary(result).splitlines()]
    title = "one-vs-rest, macro ROC AUC 95% interval AP 95% interval"
    assert title.split() in lines
    own = lines[lines.index(title.split()) + 1]
    # By hand: a is beaten by one of three rows at 0.5 (a tie, half), b by none, c by none.
    assert own == [
        "this",
        "classifier",
        f"{(2.5 / 3 + 1 + 1) / 3:.3f}",
        f"{(1 / 2 + 1 + 1) / 3:.3f}",
    ]
    assert next(line for line in lines if line[:1] == ["c"])[:3] == ["c", "1.000", "1.000"]
    result = evaluate(probabilities, [0, 1, 1, 1], ["a", "b", "c"], bootstrap=0)
    shown = summary(result)
    assert "AUC and AP are undefined: there are no texts of c." in shown
    assert "interval" not in shown
    assert shown.splitlines()[-4].split()[:3] == ["class", "F1", "precision"]


def test_the_interval_stands_below_the_classifier():
    result = evaluation(["a", "b"])
    low, high = result.intervals["accuracy"]
    lines = summary(result, {"other": result}).splitlines()
    own = next(i for i, line in enumerate(lines) if line.startswith("this classifier"))
    assert lines[own + 1].split()[:4] == ["95%", "interval", "from", f"{low:.1%}"]
    assert lines[own + 2].split()[:2] == ["to", f"{high:.1%}"]
    assert lines[own + 3].startswith("other")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("classes", [1, 2, 5, 20, 77])
def test_a_summary_fits_80_columns_and_cuts_only_names(classes, multi_label, terminal):
    names = [f"{NAMES[i % 5]}{i}" for i in range(classes)]
    result = evaluation(names, multi_label)
    text = summary(
        result, {"a system with a name of great length, " * 3: result}, terminal=terminal
    )
    lines = [line.rstrip() for line in strip_styles(text).splitlines()]
    assert max(map(cell_len, lines)) <= 80
    shown = sorted(result.per_class, key=lambda row: row.f1 if row.f1 is not None else 2)[:24]
    for row in shown:
        scores = ["-" if v is None else f"{v:.3f}" for v in (row.f1, row.precision, row.recall)]
        numbers = [*scores, str(row.support), str(row.predicted)]
        assert any(line.split()[-5:] == numbers for line in lines)
    assert any(re.search(r"Log-loss +Brier +ECE$", line) for line in lines)
    assert len(lines) <= 24 + 28
    assert ("and 53 more, none with a lower F1" in text) == (classes == 77)


def strip_styles(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_elsewhere_than_in_a_terminal_a_summary_is_plain_text():
    text = summary(evaluation(["a", "b"]))
    assert text.isascii()
    assert "\x1b" not in text
    assert "\x1b[1m" in summary(evaluation(["a", "b"]), terminal=True)


def test_names_steer_neither_the_terminal_nor_rich():
    text = summary(evaluation(NAMES), {"[bold]x\x1b]0;title\x07": evaluation(NAMES)})
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]bad[/red]" in text
    assert "\N{REPLACEMENT CHARACTER}[31mfair" in text
    assert "[bold]x\N{REPLACEMENT CHARACTER}]0;title" in text
