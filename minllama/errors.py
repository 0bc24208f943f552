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
from importlib import import_module
from pathlib import Path
from typing import Any

from minllama.text import one_line

# The library of a module, if their names differ.
LIBRARY_OF = {
    "scipy": "scikit-learn",
    "sklearn": "scikit-learn",
    "threadpoolctl": "scikit-learn",
    "torch": "tensorboard",  # which torch.utils.tensorboard needs
}


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


def optional_import(
    name: str, needs: str, *, extra: str = "train", kind: type[MinllamaError] = MinllamaError
) -> Any:
    """A module of a library that is installed with one of minllama's extras only.

    Args:
        name: of the module, such as "sklearn.linear_model".
        needs: what needs it, with its verb: "reports need".
        extra: the extra.
        kind: of the error.

    Raises:
        MinllamaError: of that kind; the library is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise missing_library(name, needs, extra=extra, kind=kind) from error


def missing_library(
    name: str, needs: str, *, extra: str = "train", kind: type[MinllamaError] = MinllamaError
) -> MinllamaError:
    """The error of a library that is not installed; see `optional_import`."""
    root = name.partition(".")[0]
    return kind(
        f"{needs} the library {LIBRARY_OF.get(root, root)}; install it with: "
        f"python -m pip install 'minllama[{extra}]'"
    )


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
