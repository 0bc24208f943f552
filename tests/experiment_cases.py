"""Files of labeled texts that a tiny Llama can learn something from, and the door's results."""

import random
from collections.abc import Iterable
from pathlib import Path

from minllama.experiment import Reporter

WORDS = ["film", "plot", "actor", "scene", "night", "story", "music", "heart", "slow", "quick"]
REPORT = {"report.html", "metrics.json", "predictions.jsonl"}
TELLING = {"bad": ("awful", "dull", "poor"), "good": ("fine", "lovely", "great")}


def examples(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """(label, text), as many bad as good ones."""
    draw, found = random.Random(seed), []
    for i in range(n):
        label = ("bad", "good")[i % 2]
        words = [*draw.sample(WORDS, 3), draw.choice(TELLING[label]), f"{seed}x{i}"]
        found.append((label, " ".join(words)))
    return found


def write_labelled(path: Path, rows: Iterable[tuple[object, str]]) -> Path:
    path.write_text("".join(f"{label} ||| {text}\n" for label, text in rows), encoding="utf-8")
    return path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Heard(Reporter):
    """Remembers what was said, and may interrupt."""

    def __init__(self, *, interrupt_after=None):
        self.lines, self.titles = [], []
        self._interrupt_after = interrupt_after

    def message(self, line):
        self.lines.append(line)

    def advance(self, title, total):
        self.titles.append(title)
        if title == self._interrupt_after:
            raise KeyboardInterrupt
        return lambda done: None

    def progress(self):
        return Interrupting(self._interrupt_after)


class Interrupting:
    """Ctrl-C after so many steps."""

    def __init__(self, step):
        self._step = step

    def begin(self, step, total_steps):
        pass

    def advance(self, row):
        if row["step"] == self._step:
            raise KeyboardInterrupt

    def end(self):
        pass
