"""Show the progress of training: a bar in a terminal, otherwise occasional lines."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

# Figures of an evaluation -> their keys in the row.
OF_CLASSES = {"loss": "dev_loss", "accuracy": "dev_accuracy", "macro F1": "dev_macro_f1"}
REGRESSION_FIGURES = {"loss": "dev_loss", "RMSE": "dev_rmse", "R2": "dev_r2"}
SMOOTHED = 20  # steps whose mean loss and rate are shown


class Progress(Protocol):
    """The interface for the progress of a training."""

    def begin(self, step: int, total_steps: int) -> None:
        """Start the display after `step` completed steps."""

    def advance(self, row: Mapping[str, Any]) -> None:
        """Report a completed step; `row` is its line in `metrics.jsonl`."""

    def end(self) -> None:
        """End the display, also after an error."""


class TrainingProgress:
    """Loss, rate and time left on standard error.

    Lines of evaluations remain; the bar disappears when training ends.

    Args:
        stream: for the output; None for standard error.
        every_seconds: the minimum time between two lines, if it is not a terminal.
        clock: returns seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._every_seconds, self._clock = every_seconds, clock
        self._recent: deque[tuple[float, float]] = deque(maxlen=SMOOTHED)
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def begin(self, step: int, total_steps: int) -> None:
        self._first, self._total_steps = step, total_steps
        self._began = self._spoke = self._clock()
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._open_bar(step)

    def advance(self, row: Mapping[str, Any]) -> None:
        self._recent.append((row["loss"], row["examples_per_second"]))
        loss, rate = (sum(values) / len(self._recent) for values in zip(*self._recent, strict=True))
        step, figures = row["step"], f"loss {loss:.3f}  {rate:.3g} texts/s"
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(self._task, completed=step, figures=figures)
        elif self._clock() - self._spoke >= self._every_seconds:
            self._spoke = self._clock()
            left = ""
            if step > self._first:  # else it would continue the end of an interrupted step
                seconds = (self._spoke - self._began) / (step - self._first)
                left = f"  {_duration(seconds * (self._total_steps - step))} left"
            self._show(f"step {step}/{self._total_steps}  {figures}{left}")
        if "dev_loss" in row:
            texts = [
                f"{name} {row[key]:.4g}" for name, key in REGRESSION_FIGURES.items() if key in row
            ]
            if "dev_accuracy" in row:
                texts = [f"{name} {row[key]:.3f}" for name, key in OF_CLASSES.items()]
            self._show(f"step {step}/{self._total_steps}  dev: {'  '.join(texts)}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def _open_bar(self, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._bar.add_task(
            "training", total=self._total_steps, completed=step, figures=""
        )
        self._bar.start()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
