"""The input of `minllama chat`: lines, multi-line messages and commands."""

import sys
from typing import NamedTuple

import click

from minllama.cli.prompt_text import MARK
from minllama.errors import MinllamaError

QUOTES = '"""'
HELP = """\
/reset     clear the history
/exit      quit (or Ctrl-D)
/help      show this help
\"\"\"        begin or end a multi-line message
\\          at the end of a line: continue the message on the next line
//text     send /text (or put a space before it)
Ctrl-C     stop an answer, or discard the current line"""


class ChatInput(NamedTuple):
    """What was typed: a command without its slash, or a message; an empty one is ignored."""

    text: str = ""
    command: str | None = None


def read_chat_input() -> ChatInput:
    """Read the next command or message.

    Raises:
        EOFError: standard input has ended.
        KeyboardInterrupt: Ctrl-C.
        MinllamaError: the input is not UTF-8.
    """
    line = _line(">>> ").removeprefix(MARK)
    if line.lstrip().startswith(QUOTES):
        return ChatInput(_quoted(line.lstrip().removeprefix(QUOTES)))
    if line.startswith("/") and not line.startswith("//"):
        words = line[1:].split()
        return ChatInput(command=words[0] if words else "")
    line = line[1:] if line.startswith("//") else line
    lines = []
    while _continues(line):
        lines.append(line[:-1])
        try:
            line = _line("... ")
        except EOFError:
            line = ""
    return ChatInput("\n".join([*lines, line]).strip())


def _continues(line: str) -> bool:
    """Whether a line ends with a backslash that is not escaped by another."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _quoted(line: str) -> str:
    """Read up to the closing triple quotes; `line` follows the opening ones."""
    lines = []
    while QUOTES not in line:
        lines.append(line)
        try:
            line = _line("... ")
        except EOFError:
            click.echo(f"the message has no closing {QUOTES}; sending what was read", err=True)
            return "\n".join(lines).strip("\n")
    text, _, after = line.partition(QUOTES)
    return "\n".join([*lines, text + after.rstrip()]).strip("\n")


def _line(prompt: str) -> str:
    try:
        return input(prompt if sys.stdin.isatty() else "").rstrip("\r")  # of a Windows file
    except UnicodeDecodeError as error:
        raise MinllamaError(f"standard input: not UTF-8 ({error.reason})") from error
