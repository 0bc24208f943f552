"""Progress messages of a command: lines on stderr, and progress bars on a terminal."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from minllama.experiment import Reporter
from minllama.text import one_line

if TYPE_CHECKING:
    from minllama.training.progress import Progress


class ConsoleReporter(Reporter):
    """Prints messages and progress to stderr; stdout is for results.

    Args:
        quiet: print nothing, as all but the first of several processes do.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._bar: Any = None
        self._quiet = quiet

    def message(self, line: str) -> None:
        if self._quiet:
            return
        self.close()
        click.echo(one_line(line), err=True)

    def advance(self, title: str, total: int) -> Callable[[int], None]:
        self.close()
        if self._quiet:
            return super().advance(title, total)
        if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            click.echo(one_line(f"{title} ({total:,})"), err=True)
            return lambda done: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # results stay on stdout
        )
        task = self._bar.add_task(title, total=total)
        self._bar.start()
        bar, n_done = self._bar, 0

        def advanced(done: int) -> None:
            nonlocal n_done
            n_done += done
            bar.update(task, completed=n_done)
            if n_done >= total:
                bar.stop()

        return advanced

    def progress(self) -> "Progress | None":
        from minllama.training.progress import TrainingProgress

        self.close()
        return None if self._quiet else TrainingProgress()

    def close(self) -> None:
        """Remove the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
