"""The results of a benchmark on a terminal and as Markdown, alone or beside another run's."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from minllama.benchmark.results import BenchmarkResult, Measurement
from minllama.text import printable

if TYPE_CHECKING:
    from rich.console import Console

MISSING = "-"
RANGE = "[min, max]"


def rate(value: float) -> str:
    """Three significant digits, or integers: 7.42, 74.2, 742, 7,424."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rows(result: BenchmarkResult, other: BenchmarkResult | None) -> Iterator[tuple[str, ...]]:
    """The cells of each row; with `other`, also those that only it has."""
    known = {one.name: one for one in result.measurements}
    before = {} if other is None else {one.name: one for one in other.measurements}
    for name in dict.fromkeys([*known, *before]):
        one = known.get(name)
        unit = (one or before[name]).unit
        cells = [name, *_cells(one), unit]
        if other is not None:
            old = before.get(name)
            has_both = one is not None and old is not None and one.values and old.values
            ratio = f"{one.median / old.median:.2f}" if has_both and one and old else MISSING
            cells = [name, *_cells(one), *_cells(old), ratio, unit]
        yield tuple(cells)


def _cells(one: Measurement | None) -> tuple[str, str]:
    if one is None or not one.values:
        return MISSING, ""
    return rate(one.median), f"[{rate(min(one.values))}, {rate(max(one.values))}]"


def titles(other: BenchmarkResult | None) -> tuple[str, ...]:
    if other is None:
        return "", "median", RANGE, ""
    return "", "now", RANGE, "before", RANGE, "ratio", ""


def notes(result: BenchmarkResult) -> list[str]:
    """Why some rows are empty."""
    return [f"{one.name}: {one.note}" for one in result.measurements if one.note]


def heading(result: BenchmarkResult) -> list[tuple[str, str]]:
    """What was measured, and on what."""
    counts = {len(one.values) for one in result.measurements if one.values}
    n = " to ".join(str(count) for count in sorted(counts))
    found = [("model", result.model), ("weights", result.weights), *result.machine.items()]
    if result.peak_bytes is not None:
        found.append(("peak memory", f"{result.peak_bytes / 1e9:.2f} GB"))
    return [*found, ("date", result.date), *([("n", n)] if n else [])]


def differences(result: BenchmarkResult, other: BenchmarkResult) -> list[str]:
    """What was not the same in the other run."""
    mine, theirs = dict(heading(result)), dict(heading(other))
    names = [name for name in {**theirs, **mine} if name not in ("date", "peak memory")]
    return [
        f"{name}: now {mine.get(name, MISSING)}, before {theirs.get(name, MISSING)}"
        for name in names
        if mine.get(name) != theirs.get(name)
    ]


def print_result(
    result: BenchmarkResult, other: BenchmarkResult | None, console: "Console | None" = None
) -> None:
    """Print it: 80 columns in a terminal, plain text elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    for name, value in heading(result):
        console.print(Text(printable(f"{name:<12} {value}")), soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="dim")
    # Two ranges do not fit into 80 columns; Markdown has them.
    head = titles(other)
    shown = [i for i, title in enumerate(head) if other is None or title != RANGE]
    for i in shown:
        is_text = i in (0, len(head) - 1)
        table.add_column(Text(head[i]), justify="left" if is_text else "right", no_wrap=True)
    for cells in rows(result, other):
        table.add_row(*(Text(printable(cells[i])) for i in shown))
    console.print(table)
    further = notes(result)
    if other is not None:
        further += [f"not the same: {line}" for line in differences(result, other)]
    for line in further:
        console.print(Text(printable(line)), soft_wrap=True)


def to_markdown(result: BenchmarkResult, other: BenchmarkResult | None) -> str:
    """A table, and below it what was measured on what."""
    head = titles(other)

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    lines = [line(head), "|" + " --- |" * len(head)]
    lines += [line(cells) for cells in rows(result, other)]
    lines += ["", *(f"- {name}: {value}" for name, value in heading(result))]
    lines += [f"- {note}" for note in notes(result)]
    if other is not None:
        lines += [f"- not the same: {one}" for one in differences(result, other)]
    return "\n".join(printable(one) for one in lines) + "\n"
