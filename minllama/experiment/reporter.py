"""The interface for messages and progress of a run.

`minllama.cli.waiting` implements it for the terminal.
"""

from collections.abc import Callable

from minllama.training.progress import Progress


class Say:
    """Hears what a run has to say; this one keeps it to itself."""

    def say(self, line: str) -> None:
        """Something to know."""

    def advance(self, title: str, total: int) -> Callable[[int], None]:
        """A part of the work begins; what is returned hears of each few of its `total` texts."""
        return lambda done: None

    def progress(self) -> Progress | None:
        """What hears of each training step."""
        return None
