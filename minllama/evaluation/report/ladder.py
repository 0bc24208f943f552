"""The ladder of `--method auto` in a report: what was tried, what it costs, what was chosen."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minllama.evaluation.registry import METRICS
from minllama.text import duration, printable

if TYPE_CHECKING:
    from rich.console import Console

KNOWN = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class LadderRow:
    """One rung.

    Attributes:
        name: what was tried.
        value, interval: the metric on rows that it was not fitted to, and its 95% interval; None if
            not measured.
        rows: how many these are.
        how: in a few words, how it was measured.
        seconds: that fitting and measuring took; None if it was not tried.
        texts_per_second: of its classifier on this machine.
        size: bytes of its files, beside the base model's; None if it is not saved.
        chosen: whether it was.
        reason: why it was chosen, or not, or not tried.
    """

    name: str
    reason: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    rows: int = 0
    how: str = ""
    seconds: float | None = None
    texts_per_second: float | None = None
    size: int | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Ladder:
    """All rungs, cheapest first.

    Attributes:
        rows: one for each.
        metric: that they are compared by.
        minutes: that the run had.
        prefer: accuracy or speed.
    """

    rows: tuple[LadderRow, ...]
    metric: str
    minutes: float
    prefer: str

    @property
    def title(self) -> str:
        """The metric, for display."""
        return KNOWN[self.metric].title

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "metric": self.metric,
            "minutes": self.minutes,
            "prefer": self.prefer,
            "rungs": [
                {
                    "name": row.name,
                    "chosen": row.chosen,
                    "reason": row.reason,
                    "value": row.value,
                    "interval": None if row.interval is None else list(row.interval),
                    "rows": row.rows,
                    "how": row.how,
                    "seconds": row.seconds,
                    "texts_per_second": row.texts_per_second,
                    "bytes": row.size,
                }
                for row in self.rows
            ],
        }

    def cells(self, row: LadderRow) -> tuple[str, str, str, str, str, str]:
        """Metric, interval, rows, time, speed and size of a rung, for display."""
        ends = "" if row.interval is None else " to ".join(map(self._written, row.interval))
        return (
            "–" if row.value is None else self._written(row.value),
            ends,
            f"{row.rows:,}" if row.rows else "–",
            "–" if row.seconds is None else duration(row.seconds),
            "–" if row.texts_per_second is None else f"{_rounded(row.texts_per_second):,}",
            "–" if row.size is None else file_size(row.size),
        )

    def _written(self, value: float) -> str:
        return KNOWN[self.metric].number_format.format(value)


def file_size(n_bytes: int) -> str:
    """12345 -> 12 KB."""
    if n_bytes < 1_000_000:
        return f"{max(1, round(n_bytes / 1000))} KB"
    return f"{n_bytes / 1_000_000:.1f} MB"


def _rounded(rate: float) -> int:
    """Two significant digits: more would not be the same the next time."""
    unit: int = 10 ** max(0, len(str(int(rate))) - 2)
    return round(rate / unit) * unit


def print_ladder(ladder: Ladder, console: "Console | None" = None) -> None:
    """Print it: 80 columns in a terminal, plain text elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tried, cheapest first")
    for title in (ladder.title, "95% interval", "took", "texts/s", "size"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in ladder.rows:
        value, ends, _, took, speed, size = (cell.replace("–", "-") for cell in ladder.cells(row))
        name = Text(printable(row.name), no_wrap=True, overflow="ellipsis")
        table.add_row(name, value, ends, took, speed, size, style="bold" if row.chosen else "")
    console.print(table)
    console.print()
    for row in ladder.rows:
        mark = "chosen: " if row.chosen else ""
        console.print(Text(printable(f"{row.name}: {mark}{row.reason}")))
    console.print()
