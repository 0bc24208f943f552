"""The table of metrics: names, titles, direction, and where each is shown or may be chosen.

The choices of `--metric` and `--headline`, the fields of a training's log, tables, reports and
model cards are made from it. To add a metric, add a row with a `compute`: its confidence interval
comes from resampling rows. Imports nothing heavy, since options are made from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DEFAULT_FOR_REGRESSION = "rmse"  # selects the weights of a regression


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A row of the table.

    Attributes:
        name: in options and files.
        title: in tables.
        regression: a metric of regression, not of classes.
        compute: the value, None where it is undefined: of `bootstrap.ScoredRows` for classes, of
            predictions and targets, (N,) each, for numbers. None for the fields of `Evaluation` and
            `RegressionEvaluation`, which are computed together from shared sums.
        less_is_better: which way is better.
        number_format: of the values; shares of texts are compared in points.
        in_unit: it is in the unit of the targets.
        is_ranking: it is about the order of texts, not about what is decided on each.
        only_multi_label: shown in multi-label tasks only.
        selects: may select the best weights of a training (`--metric`).
        is_headline: may head a report (`--headline`).
        on_card: shown in model cards.
        curve: its name in the training curves; None where it is in none.
    """

    name: str
    title: str
    regression: bool = False
    compute: Callable[..., float | None] | None = None
    less_is_better: bool = False
    number_format: str = "{:.3f}"
    in_unit: bool = False
    is_ranking: bool = False
    only_multi_label: bool = False
    selects: bool = False
    is_headline: bool = False
    on_card: bool = False
    curve: str | None = None

    def difference(self, value: float, *, sign: bool = True) -> str:
        """A difference of two values for display; shares of texts in percentage points."""
        text = f"{100 * value:+.1f}" if self.number_format == "{:.1%}" else f"{value:+.3f}"
        return text if sign and float(text) != 0 else text[1:]


METRICS: tuple[Metric, ...] = (
    Metric(
        name="accuracy",
        title="Accuracy",
        number_format="{:.1%}",
        selects=True,
        is_headline=True,
        on_card=True,
        curve="accuracy",
    ),
    Metric(
        name="macro_f1",
        title="Macro F1",
        selects=True,
        is_headline=True,
        on_card=True,
        curve="macro F1",
    ),
    # With one label a text, micro F1 is the accuracy.
    Metric(
        name="micro_f1",
        title="Micro F1",
        is_headline=True,
        only_multi_label=True,
        curve="micro F1",
    ),
    Metric(name="roc_auc", title="ROC AUC", is_ranking=True, on_card=True),
    Metric(name="average_precision", title="AP", is_ranking=True, on_card=True),
    Metric(
        name="log_loss",
        title="Log-loss",
        less_is_better=True,
        selects=True,
        is_headline=True,
        on_card=True,
    ),
    Metric(name="brier", title="Brier", less_is_better=True, is_headline=True),
    Metric(name="calibration_error", title="ECE", less_is_better=True, on_card=True),
    Metric(
        name="mae",
        title="MAE",
        regression=True,
        less_is_better=True,
        in_unit=True,
        selects=True,
        on_card=True,
    ),
    Metric(
        name="rmse",
        title="RMSE",
        regression=True,
        less_is_better=True,
        in_unit=True,
        selects=True,
        on_card=True,
    ),
    Metric(name="r2", title="R²", regression=True, selects=True, on_card=True, curve="R²"),
    Metric(name="pearson", title="Pearson", regression=True, selects=True, curve="Pearson"),
    Metric(
        name="spearman",
        title="Spearman",
        regression=True,
        selects=True,
        on_card=True,
        curve="Spearman",
    ),
)


def value_of(evaluation: Any, metric: str) -> float | None:
    """A metric of an `Evaluation` or `RegressionEvaluation`; None if it is undefined."""
    further: dict[str, float | None] = evaluation.further
    return further[metric] if metric in further else getattr(evaluation, metric)


def metrics(*, regression: bool) -> dict[str, Metric]:
    """Name -> metric, of classes or of numbers, in the order of tables."""
    return {metric.name: metric for metric in METRICS if metric.regression == regression}


def selecting(*, regression: bool) -> tuple[str, ...]:
    """The metrics that may select weights, the default first."""
    names = [metric.name for metric in metrics(regression=regression).values() if metric.selects]
    return tuple(sorted(names, key=lambda name: regression and name != DEFAULT_FOR_REGRESSION))


def headlines() -> tuple[str, ...]:
    """The metrics that may head a report."""
    return tuple(metric.name for metric in METRICS if metric.is_headline)


def on_card(*, regression: bool) -> tuple[str, ...]:
    """The metrics in model cards; ranking metrics last, since they may be undefined."""
    shown = [metric for metric in metrics(regression=regression).values() if metric.on_card]
    return tuple(metric.name for metric in sorted(shown, key=lambda metric: metric.is_ranking))


def may_be_missing(name: str) -> bool:
    """Whether a report may lack a metric, since it is undefined or the report is older."""
    metric = {metric.name: metric for metric in METRICS}[name]
    return metric.is_ranking or metric.compute is not None


def curves() -> dict[str, str]:
    """Name in a training log -> name in the training curves."""
    return {f"dev_{m.name}": m.curve for m in METRICS if m.curve is not None}


def logged(*, regression: bool, multi_label: bool = False) -> tuple[str, ...]:
    """The metrics in a row of a training log, in addition to the loss."""
    if regression:
        return selecting(regression=True)
    shown = metrics(regression=False).values()
    return tuple(
        m.name
        for m in shown
        if m.name != "log_loss"  # the loss
        and (m.selects or m.curve is not None)
        and (multi_label or not m.only_multi_label)
    )


def computed(*, regression: bool, arguments: tuple[Any, ...]) -> dict[str, float | None]:
    """The values of metrics with their own functions; see `Metric.compute`."""
    table = metrics(regression=regression)
    return {name: m.compute(*arguments) for name, m in table.items() if m.compute is not None}
