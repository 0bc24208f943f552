"""What a user did that cannot work, said in one line: what, where, remedy.

Knows nothing of torch, files or models. A broken invariant of our own is an `assert`, not one of
these: the command line prints a `MinllamaError` as a single line and exits with status 2.
"""

from minllama.text import one_line


class MinllamaError(Exception):
    """Something that the user can mend; its message names what, where and the remedy.

    Names in it come from outside: it is made one printable line of bounded length (`one_line`).
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
    """A file of examples that cannot be read, or rows in it that cannot be used."""


class SlowDtypeWarning(UserWarning):
    """A half precision that was asked for, and that the machine only emulates."""
