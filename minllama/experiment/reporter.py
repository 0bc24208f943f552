"""The interface for messages and progress of a run.

`minllama.cli.waiting` implements it for the terminal.
"""

from collections.abc import Callable

from minllama.training.progress import Progress


class Reporter:
    """Receives messages of a run; this one discards them."""

    def message(self, line: str) -> None:
        """Report a message."""

    def advance(self, title: str, total: int) -> Callable[[int], None]:
        """Start a part of the work; the returned function receives counts of texts done."""
        return lambda done: None

    def progress(self) -> Progress | None:
        """The object that receives each training step."""
        return None
