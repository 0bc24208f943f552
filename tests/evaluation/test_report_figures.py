"""Charts: what is drawn, in whose colors, and that matplotlib is left alone."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from minllama.errors import MinllamaError
from minllama.evaluation.metrics import calibration_bins
from minllama.evaluation.report import figures
from minllama.evaluation.report.figures import loss_curve, metric_curve, reliability_diagram

ROOT = Path(__file__).resolve().parents[2]
HISTORY = [
    *({"step": i, "epoch": i / 10, "loss": 2 - i / 30, "lr": 1e-3} for i in range(1, 31)),
    {"step": 15, "dev_accuracy": 0.5, "dev_macro_f1": 0.4, "dev_log_loss": 1.4},
    {"step": 30, "dev_accuracy": 0.6, "dev_macro_f1": 0.5, "dev_log_loss": 1.2},
]
CONFIDENCES = np.random.default_rng(0).uniform(0.3, 1, size=200)
BINS = calibration_bins(CONFIDENCES, CONFIDENCES > 0.6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.3", None, True])
def test_curves_leave_out_what_is_no_finite_number(value):
    assert loss_curve([]) is None
    assert metric_curve([]) is None
    assert metric_curve([{"step": 1, "loss": 1.0}]) is None
    if value is not True:
        assert loss_curve([{"step": 1, "loss": value}]) is None
        good = {"step": 1, "loss": 1.0}, {"step": 3, "loss": 2.0}
        assert loss_curve([good[0], {"step": 2, "loss": value}, good[1]]) == loss_curve(good)


@pytest.mark.parametrize("history", [[{"loss": 1.0}], [{"step": 0, "loss": 1.0, "dev_loss": 1}]])
def test_one_point_is_a_curve(history):
    assert "<svg" in loss_curve(history)


def test_a_long_history_is_thinned_to_means_of_neighbors():
    points = [(float(i), float(i % 2)) for i in range(800)]
    assert figures._thinned(points) == [(2 * i + 0.5, 0.5) for i in range(400)]
    assert figures._thinned(points[:400]) == points[:400]
    history = [{"step": i, "loss": float(i % 7)} for i in range(100_000)]
    assert len(loss_curve(history)) < 60_000


def test_the_running_mean_is_unbiased_at_its_start():
    points = [(float(i), 3.0) for i in range(50)]
    assert figures._smoothed(points) == [(x, pytest.approx(3.0)) for x, _ in points]
    keep = np.exp(-1)
    assert figures._smoothed([(0.0, 1.0), (1.0, 2.0)])[1][1] == pytest.approx(
        (keep + 2) / (keep + 1)
    )


def test_the_diagram_has_a_bar_for_each_bin_that_is_not_empty():
    bins = BINS
    full = sum(bin_.count > 0 for bin_ in bins)
    svg = reliability_diagram(bins)
    assert svg.count("fill: var(--accent); opacity: 0.35") == full
    assert svg.count("fill: var(--muted); opacity: 0.55") == full


def test_drawings_take_colors_and_fonts_from_the_page():
    for svg in (loss_curve(HISTORY), metric_curve(HISTORY)):
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {
            "none",
            "var(--ink)",
            "var(--muted)",
            "var(--line)",
            "var(--accent)",
            "var(--warm)",
        }
        assert "font-family" not in svg
        assert "font:" not in svg
        assert svg.startswith('<svg viewBox="')
    assert ">macro F1<" in metric_curve(HISTORY)


def test_matplotlib_is_left_as_it_was_and_its_user_changes_nothing():
    plain = loss_curve(HISTORY), reliability_diagram(BINS)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        styled = loss_curve(HISTORY), reliability_diagram(BINS)
        assert dict(matplotlib.rcParams) == before
    assert styled == plain


def test_drawing_needs_no_pyplot():
    code = (
        "import sys\nfrom minllama.evaluation.report.figures import loss_curve\n"
        "loss_curve([{'step': 1, 'loss': 1.0}])\nprint('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MinllamaError, match=r"minllama\[train\]"):
        loss_curve(HISTORY)
