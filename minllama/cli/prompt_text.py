"""The prompt of `minllama generate`: an argument or a file, after piped input."""

import codecs
import contextlib
import os
import select
import stat
import sys
from pathlib import Path

import click

from minllama.errors import MinllamaError, OptionError

MAX_INPUT_BYTES = 2**26  # more text than fits into the longest context
# A process that inherited an open pipe must not wait forever.
PIPE_SECONDS = 5.0
MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"  # U+FEFF, the byte order mark
# The little-endian mark of UTF-32 starts with that of UTF-16, so it comes first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)


class PromptText:
    """The prompt from an argument or a file, after piped input.

    Without either, piped input is the whole prompt. `-` means standard input in both places.
    Regular files are read on construction. A pipe is read in `whole`, which is called after the
    model is open, so that the writer has that time as well.

    Raises:
        MinllamaError: there is no prompt, or it cannot be read.
    """

    def __init__(self, prompt: str | None, prompt_file: str | None) -> None:
        if prompt is not None and prompt_file is not None:
            raise _no_prompt()
        self._is_whole = "-" in (prompt, prompt_file) or _is_standard_input(prompt_file)
        self._text = None if prompt is None else prompt.removeprefix(MARK)
        if "-" in (prompt, prompt_file):
            self._text = read_text(None)
        elif prompt_file is not None:
            self._text = read_text(prompt_file)
        if self._text is None and not _is_pipe():
            self._text = _piped()
            self._is_whole = True
            if not self._text:
                raise _no_prompt()

    def whole(self) -> str:
        """The prompt with piped input before it; a message reports when there are both.

        Raises:
            MinllamaError: it cannot be read, or there is no prompt at all.
        """
        piped = "" if self._is_whole else _piped(alone=self._text is None)
        if self._text is None and not piped:
            raise _no_prompt()
        if not self._text or not piped:
            return self._text or piped
        click.echo(
            f"putting {len(piped):,} characters of standard input before the prompt "
            "(</dev/null to prevent it)",
            err=True,
        )
        gap = "" if piped.endswith("\n\n") else "\n" if piped.endswith("\n") else "\n\n"
        return piped + gap + self._text


def read_system(system: str | None, system_file: str | None) -> str | None:
    """The system message from an argument or a file.

    Raises:
        MinllamaError: both are given, or the file cannot be read.
    """
    if system is not None and system_file is not None:
        raise OptionError("--system and --system-file exclude each other; give one")
    if system_file is not None:
        return read_text(system_file)
    return None if system is None else system.removeprefix(MARK)


def read_text(source: str | None) -> str:
    """The content of a file or of standard input, up to MAX_INPUT_BYTES."""
    source_name = "standard input" if source is None else source or repr(source)
    try:
        if source is None:
            content = _all_of_standard_input()
        else:
            with Path(source).open("rb") as file:
                content = file.read(MAX_INPUT_BYTES + 1)
    except (OSError, ValueError) as error:  # a null character in a name
        reason = error.strerror if isinstance(error, OSError) else error
        raise MinllamaError(f"{source_name}: cannot be read ({reason})") from error
    if len(content) > MAX_INPUT_BYTES:
        raise MinllamaError(f"{source_name}: more than {MAX_INPUT_BYTES // 2**20} MiB; shorten it")
    return _decoded(content, source_name)


def _all_of_standard_input() -> bytes:
    with contextlib.suppress(OSError, ValueError):  # a stream object without a file
        # The parent may have made it non-blocking; then it would seem to end early.
        os.set_blocking(sys.stdin.fileno(), True)
    return sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)


def _decoded(content: bytes, source_name: str) -> str:
    """Decode a file: UTF-8, or the encoding of its byte order mark, which is removed."""
    marked = (kind for kind in MARKS if content.startswith(kind[0]))
    _, codec, name = next(marked, (b"", "utf-8", "UTF-8"))
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        raise MinllamaError(
            f"{source_name}: not {name} at byte {error.start}; convert it to UTF-8"
        ) from error
    if "\0" in text:
        raise MinllamaError(
            f"{source_name}: contains null characters, so it is not UTF-8 text; convert it to UTF-8"
        )
    return text


def _is_standard_input(source: str | None) -> bool:
    """Whether a file is standard input, such as /dev/stdin."""
    if source is None:
        return False
    try:
        return os.path.samestat(Path(source).stat(), os.fstat(sys.stdin.fileno()))
    except (OSError, ValueError):
        return False


def _mode() -> int | None:
    """The `st_mode` of standard input; None if it is a stream object without a file."""
    try:
        return os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return None


def _is_pipe() -> bool:
    mode = _mode()
    return mode is not None and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))


def _piped(*, alone: bool = False) -> str:
    """Piped or redirected input; empty if it is only white space.

    A terminal and devices such as /dev/null give nothing, and so does a pipe without data for
    PIPE_SECONDS; `-` waits longer.
    """
    mode = _mode()
    if _is_pipe():
        if not select.select([sys.stdin.fileno()], [], [], PIPE_SECONDS)[0]:
            if not alone:
                click.echo(
                    f"no data on standard input within {PIPE_SECONDS:g} s: ignoring it "
                    "(- waits for it)",
                    err=True,
                )
            return ""
    elif mode is not None and not stat.S_ISREG(mode):
        return ""
    text = read_text(None)
    return text if text.strip() else ""


def _no_prompt() -> MinllamaError:
    return MinllamaError(
        "give one prompt: as an argument, with --prompt-file, or - for standard input"
    )
