"""Claims about the table of metrics: options, reports and logs are made from it."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from minllama.evaluation import registry
from minllama.evaluation.metrics import evaluate
from minllama.evaluation.regression import evaluate_regression
from minllama.options import CLASS_METRICS, VALUE_METRICS
from minllama.options.evaluation import ReportOptions

ROOT = Path(__file__).resolve().parent.parent.parent

# A row is added to the table before anything else is imported, as if it stood there.
PROGRAM = """
import numpy as np
from minllama.evaluation import registry

def matthews(rows):
    from sklearn.metrics import matthews_corrcoef
    return float(matthews_corrcoef(rows.gold.argmax(1), rows.predicted.argmax(1)))

def median_error(predicted, targets):
    return float(np.median(np.abs(predicted - targets)))

registry.METRICS += (
    registry.Metric(name="mcc", title="MCC", compute=matthews, selects=True, is_headline=True,
                    on_card=True, curve="MCC"),
    registry.Metric(name="median", title="Median error", regression=True, compute=median_error,
                    less_is_better=True, in_unit=True, selects=True, on_card=True),
)
from click.testing import CliRunner
from sklearn.metrics import matthews_corrcoef
from minllama.cli.train import command
from minllama.evaluation.metrics import evaluate
from minllama.evaluation.paired import compare
from minllama.evaluation.regression import evaluate_regression
from minllama.evaluation.report import comparison, value_comparison
from minllama.evaluation.report.figures import metric_curve
from minllama.experiment.evaluate_values import value_headlines
from minllama.options import TrainingOptions
from minllama.options.evaluation import ReportOptions
from minllama.training.objective import ClassObjective, ValueObjective, check_metric

gold = np.array([0, 1, 1, 2, 0, 2, 1, 0, 1, 2])
random = np.random.default_rng(0)
p = random.dirichlet([1, 1, 1], len(gold)) * 0.5 + np.eye(3)[gold] * 0.5
other = random.dirichlet([1, 1, 1], len(gold))
first, second = (evaluate(x, gold.tolist(), ["a", "b", "c"], bootstrap=50) for x in (p, other))
assert second.value("mcc") == second.to_dict()["mcc"]
assert second.value("mcc") == matthews_corrcoef(gold, other.argmax(1))
low, high = second.intervals["mcc"]
assert -1 <= low < second.value("mcc") < high <= 1
assert "mcc" in compare(first, second).differences
assert "mcc" in comparison.compared(first)
assert comparison.verdict(first, {"other": second}, "mcc").startswith("MCC 1.000 on 10 texts. That")
assert ClassObjective(None).dev_row(second)["dev_mcc"] == ClassObjective(None).merit(second, "mcc")
assert "MCC" in metric_curve([{"step": 1, "dev_mcc": 0.25}, {"step": 2, "dev_mcc": 0.5}])

numbers = evaluate_regression(np.arange(5.0), [1.0, 1, 2, 3, 9], bootstrap=50)
assert numbers.value("median") == numbers.to_dict()["median"] == 0.0
assert numbers.intervals["median"][0] == 0.0
assert value_headlines(numbers)["median"] == value_headlines(numbers.to_dict())["median"] == 0.0
cells = dict(value_comparison.systems(numbers, {}))[value_comparison.THIS_SYSTEM]
assert [cell.text for cell in cells][-1] == "0"

check_metric("mcc", regression=False), check_metric("median", regression=True)
TrainingOptions(metric="median"), ReportOptions(headline="mcc")
shown = CliRunner().invoke(command, ["--help"]).output
assert "mcc" in shown and "median" in shown
"""


def test_a_metric_is_added_in_one_place() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr


def test_choices_are_those_that_files_and_scripts_name() -> None:
    assert CLASS_METRICS == ("accuracy", "macro_f1", "log_loss")
    assert VALUE_METRICS == ("rmse", "mae", "r2", "pearson", "spearman")
    choices = ReportOptions.__dataclass_fields__["headline"].metadata["choices"]
    assert choices == ("accuracy", "macro_f1", "micro_f1", "log_loss", "brier")
    assert registry.on_card(regression=False) == (
        *("accuracy", "macro_f1", "log_loss", "calibration_error"),
        *("roc_auc", "average_precision"),
    )
    assert registry.on_card(regression=True) == ("mae", "rmse", "r2", "spearman")
    assert registry.logged(regression=False) == ("accuracy", "macro_f1")
    assert registry.logged(regression=False, multi_label=True) == (
        "accuracy",
        "macro_f1",
        "micro_f1",
    )


def test_every_metric_of_the_table_has_a_value() -> None:
    classes = evaluate(np.array([[0.9, 0.1], [0.2, 0.8]]), [0, 1], ["a", "b"], bootstrap=0)
    numbers = evaluate_regression(np.array([1.0, 2.0]), [1.0, 3.0], bootstrap=0)
    for metric in registry.METRICS:
        value = (numbers if metric.regression else classes).value(metric.name)
        assert isinstance(value, float)
