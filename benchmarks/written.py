"""A run of `speed.py` as a page, with machine and versions: `docs/benchmarks/DATE_MACHINE.md`."""

import datetime
import importlib.metadata
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
PEERS = ("llama-cpp-python", "transformers", "peft", "gguf")
Results = Mapping[str, Sequence[Mapping[str, Any]]]


def page_path(machine: Mapping[str, str], folder: Path = FOLDER) -> Path:
    """Where the page of today's run on a machine is."""
    words = f"{machine['processor']} {machine['threads']} threads".lower()
    slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
    return folder / f"{datetime.date.today().isoformat()}_{slug}.md"


def page(
    rows: Iterable[tuple[str, str, str, str, str, str]],
    machine: Mapping[str, str],
    failed: Sequence[str],
    rounds: int,
) -> str:
    """The page of a run.

    Args:
        rows: the cells of each: task, peer, ours, theirs, ratio, aim.
        machine: names and values; see `minllama.benchmark.machine.describe_machine`.
        failed: contenders of which a process failed.
        rounds: processes of each contender of a task.
    """
    lines = [
        f"# {machine['processor']}, {datetime.date.today().isoformat()}",
        "",
        "Written by `make bench` (`python benchmarks/speed.py`). Each measurement is a process of "
        f"its own, and the contenders of a task take turns: medians of {rounds} processes "
        "[min, max], each the median of several runs in the process.",
        "",
        "| task | beside | minllama | peer | ratio | aim |",
        "| --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(cells)} |" for cells in rows),
        "",
        *(f"- {name}: {value}" for name, value in [*machine.items(), *versions().items()]),
    ]
    if failed:
        lines.append(f"- failed, at least once: {', '.join(failed)}")
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def with_range(values: Sequence[float], unit: float = 1.0) -> str:
    """Such as `1,155 [1,140, 1,160]`."""
    shown = [value / unit for value in (statistics.median(values), min(values), max(values))]
    middle, least, most = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in shown)
    return f"{middle} [{least}, {most}]"
