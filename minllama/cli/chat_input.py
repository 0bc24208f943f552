"""What a person says in `minllama chat`: lines, texts of several lines, and commands."""

import sys
from typing import NamedTuple

import click

from minllama.cli.prompt_text import MARK
from minllama.errors import MinllamaError

QUOTES = '"""'
HELP = """\
/reset     forget the conversation
/exit      leave (or Ctrl-D)
/help      show this
\"\"\"        begin and end a text of several lines
\\          at the end of a line: the text goes on in the next one
//text     say /text (so does a space in front of it)
Ctrl-C     stop an answer, or drop what is being typed"""


class Said(NamedTuple):
    """What was typed: a command without its slash, or a text; an empty text says nothing."""

    text: str = ""
    command: str | None = None


def read_said() -> Said:
    """The next command or text.

    Raises:
        EOFError: standard input has ended.
        KeyboardInterrupt: Ctrl-C.
        MinllamaError: it is not UTF-8.
    """
    line = _line(">>> ").removeprefix(MARK)
    if line.lstrip().startswith(QUOTES):
        return Said(_quoted(line.lstrip().removeprefix(QUOTES)))
    if line.startswith("/") and not line.startswith("//"):
        words = line[1:].split()
        return Said(command=words[0] if words else "")
    line = line[1:] if line.startswith("//") else line
    lines = []
    while _goes_on(line):
        lines.append(line[:-1])
        try:
            line = _line("... ")
        except EOFError:
            line = ""
    return Said("\n".join([*lines, line]).strip())


def _goes_on(line: str) -> bool:
    """Whether it ends with a backslash that is not itself behind one."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _quoted(line: str) -> str:
    """What stands between triple quotes, of which the first have been read."""
    lines = []
    while QUOTES not in line:
        lines.append(line)
        try:
            line = _line("... ")
        except EOFError:
            click.echo(f"the text has no closing {QUOTES}, and is said as far as it came", err=True)
            return "\n".join(lines).strip("\n")
    text, _, behind = line.partition(QUOTES)
    return "\n".join([*lines, text + behind.rstrip()]).strip("\n")


def _line(prompt: str) -> str:
    try:
        return input(prompt if sys.stdin.isatty() else "").rstrip("\r")  # of a Windows file
    except UnicodeDecodeError as error:
        raise MinllamaError(f"standard input: is not UTF-8 ({error.reason})") from error
