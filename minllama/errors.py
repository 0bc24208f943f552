"""Errors and warnings for users: one line that says what, where and how to fix it.

`MinllamaError` and its subclasses are raised for anything that the user can fix; the command line
prints them as one line and exits with status 2. `warn_caller` issues warnings, at the caller's
line, for what works but may differ from what the user expects. Broken invariants of minllama itself
are `assert`s.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from minllama.text import one_line


class MinllamaError(Exception):
    """An error that the user can fix; its message says what, where and how to fix it.

    It may contain untrusted names, so it becomes one printable line of bounded length (`one_line`).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class CheckpointError(MinllamaError):
    """A checkpoint that is missing, damaged, unsafe, or not a Llama."""


class TokenizerError(MinllamaError):
    """A vocabulary that cannot be read, or text that cannot be encoded."""


class ContextError(MinllamaError):
    """A text that is longer than the model's context."""


class OptionError(MinllamaError):
    """An option out of its range, or of the wrong type."""


class DataError(MinllamaError):
    """A data file that cannot be read, or rows in it that cannot be used."""


class SlowDtypeWarning(UserWarning):
    """The requested half precision is only emulated on this machine."""


class CheckpointWarning(UserWarning):
    """A checkpoint contradicts itself; the message says which reading is used."""


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the line outside minllama that called it."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "minllama":
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(one_line(message), category, stacklevel=level)


@contextlib.contextmanager
def naming(where: Path) -> Iterator[None]:
    """Errors about the content of a file that do not name it yet, as errors that do.

    Raises:
        CheckpointError: replaces a MinllamaError inside, or an arithmetic error from values of the
            wrong type or absurd size.
    """
    try:
        yield
    except (TypeError, OverflowError, MinllamaError) as error:
        raise CheckpointError(f"{where}: {error}") from error
