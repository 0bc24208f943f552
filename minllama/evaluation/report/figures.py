"""Charts as inline SVG with the page's fonts and colors.

Drawn by matplotlib without its global state: numbers in, markup out.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from minllama.errors import optional_import
from minllama.evaluation.metrics import CalibrationBin
from minllama.evaluation.registry import curves

# Colors of the drawing -> variables of the style sheet, which has a light and a dark theme.
INK, MUTED, LINE, ACCENT, WARM = "#000001", "#000002", "#000003", "#000004", "#000005"
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    WARM: "var(--warm)",
}
SIZE = (4.3, 3.0)  # inches of 72 points; the page scales it to its column
FONT_SIZE = 9
MAX_POINTS = 400  # of a curve: more would be invisible and make the page large
SMOOTHING = 0.05  # share of the curve's length over which the loss is averaged

DEV_LOSSES = ("dev_loss", "dev_log_loss")


def reliability_diagram(bins: Sequence[CalibrationBin], *, multi_label: bool = False) -> str:
    """Accuracy against confidence, bin by bin (Guo et al. 2017, fig. 1), over a histogram."""
    predicted, observed = (
        ("probability", "has the label") if multi_label else ("confidence", "accuracy")
    )
    full = [bin_ for bin_ in bins if bin_.count]
    with _figure(heights=(3, 1)) as figure:
        above, below = figure.axes
        above.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, dashes=(4, 3))
        for bin_ in full:
            assert bin_.accuracy is not None
            assert bin_.confidence is not None
            middle, width = (bin_.low + bin_.high) / 2, bin_.high - bin_.low
            above.bar(middle, bin_.accuracy, width * 0.86, color=ACCENT, alpha=0.35, linewidth=0)
            above.plot(
                [bin_.confidence] * 2, [bin_.confidence, bin_.accuracy], color=WARM, linewidth=1.2
            )
            above.plot(bin_.confidence, bin_.accuracy, "o", color=ACCENT, markersize=3.2, zorder=3)
            below.bar(middle, bin_.count, width * 0.86, color=MUTED, alpha=0.55, linewidth=0)
        above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel=observed)
        below.set(xlim=(0, 1), xlabel=predicted, ylabel="count")
        below.yaxis.set_major_locator(_integers(2))
        above.tick_params(labelbottom=False)
        for axis in (above.xaxis, above.yaxis, below.xaxis):
            axis.set_major_formatter(lambda value, position: f"{value:.0%}")
        return _svg(figure)


def loss_curve(history: Sequence[Mapping[str, Any]]) -> str | None:
    """The training loss and its running mean, and the loss on dev; `None` without any."""
    training = _series(history, "loss")
    dev = next((points for key in DEV_LOSSES if (points := _series(history, key))), [])
    if not training and not dev:
        return None
    with _figure() as figure:
        (axes,) = figure.axes
        if training:
            points = _thinned(training)
            axes.plot(*zip(*points, strict=True), color=ACCENT, alpha=0.3, linewidth=0.8)
            marker = "o" if len(points) == 1 else None  # a line needs two
            mean = _smoothed(points)
            axes.plot(*zip(*mean, strict=True), color=ACCENT, marker=marker, label="training")
        if dev:
            axes.plot(*zip(*dev, strict=True), "o-", color=WARM, markersize=3.5, label="dev")
        _finish_curve(axes, history)
        return _svg(figure)


def metric_curve(history: Sequence[Mapping[str, Any]]) -> str | None:
    """The metrics on dev, with the best of each marked; `None` without any."""
    series = {name: _series(history, key) for key, name in curves().items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    with _figure() as figure:
        (axes,) = figure.axes
        colors = (ACCENT, WARM, MUTED)
        for (name, points), color in zip(series.items(), colors, strict=False):
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, label=name)
            step, best = max(points, key=lambda point: point[1])
            axes.plot(step, best, "o", color=color, fillstyle="none", markersize=8)
        axes.margins(y=0.15)
        _finish_curve(axes, history)
        return _svg(figure)


class Drawing:
    """A plot, and its SVG when it is done."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.svg = ""


@contextmanager
def drawn() -> Iterator[Drawing]:
    """A single plot, in the page's style: `axes` to draw on, and `svg` once it is done."""
    with _figure() as figure:
        (axes,) = figure.axes
        drawing = Drawing(axes)
        yield drawing
        drawing.svg = _svg(figure)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite value; rows without a step are counted."""
    points = []
    for i, row in enumerate(history):
        step, value = row.get("step", i + 1), row.get(key)
        are_finite = all(isinstance(v, int | float) and math.isfinite(v) for v in (step, value))
        if are_finite:
            points.append((float(step), float(value)))  # type: ignore[arg-type]
    return points


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its neighbors."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean with exponentially falling weights, unbiased at its start."""
    keep = math.exp(-1 / max(1.0, SMOOTHING * len(points)))
    total = weight = 0.0
    smoothed = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def _finish_curve(axes: Any, history: Sequence[Mapping[str, Any]]) -> None:
    """One range of steps for all curves, so that they can be read side by side."""
    keys = {key for row in history for key in row}
    last = max((step for key in keys for step, _ in _series(history, key)), default=0)
    axes.set(xlabel="step", xlim=(0, max(1.0, 1.03 * last)))
    axes.xaxis.set_major_locator(_integers(6))
    axes.legend(frameon=False, labelcolor=INK, fontsize=FONT_SIZE)


def _integers(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True)


@contextmanager
def _figure(heights: Sequence[int] = (1,)) -> Iterator[Any]:
    """A figure with one plot above the other, drawn in matplotlib's own style, not the user's."""
    matplotlib = optional_import("matplotlib", "reports need")
    from matplotlib.figure import Figure

    defaults = matplotlib.rcParamsDefault
    style = {
        **{key: value for key, value in defaults.items() if not key.startswith("backend")},
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": "minllama",  # the same drawing gives the same bytes
        "text.parse_math": False,
        "font.size": FONT_SIZE,
        "lines.linewidth": 1.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.subplots(len(heights), height_ratios=heights, sharex=False)
        yield figure


def _svg(figure: Any) -> str:
    """The figure as an `<svg>` element without a size, in the page's colors and font."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # The page scales the drawing, and HTML needs no namespaces.
    svg = re.sub(r"<svg[^>]*?( viewBox=\"[^\"]*\")[^>]*>", r"<svg\1>", svg, count=1)
    svg = svg.replace("xlink:href=", "href=")
    # Names of groups would clash with those of the next drawing, and a style with the whole page.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font(-family)?: [^;\"]*(;|(?=\"))", _font_size_only, svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg


def _font_size_only(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match[0])
    return f"font-size: {size[0]}{match[2]}" if size else ""
