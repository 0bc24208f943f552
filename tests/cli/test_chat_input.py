"""What is typed in `minllama chat`: texts of one line and of several, commands, and ends."""

import io
import sys
from typing import Any

import pytest

from minllama.cli.chat_input import HELP, ChatInput, read_chat_input


def everything_said(typed: str, monkeypatch: pytest.MonkeyPatch) -> list[ChatInput]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed, newline="\n"))
    said = []
    try:
        while True:
            said.append(read_chat_input())
    except EOFError:
        return said


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("hello\n", "hello"),
        ("  hello  \n", "hello"),
        ("\ufeffhello\n", "hello"),
        ("//etc/hosts\n", "/etc/hosts"),
        (" /etc/hosts is a file\n", "/etc/hosts is a file"),
        ("//\n", "/"),
        ("///x\n", "//x"),
        ('"""one\ntwo"""\n', "one\ntwo"),
        ('"""\none\n\n  two\n"""\n', "one\n\n  two"),
        ('  """one"""\n', "one"),
        ('"""\n/reset\n//x\nends with \\\n"""\n', "/reset\n//x\nends with \\"),
        ('"""a\nb""" c\n', "a\nb c"),
        ('""""""\n', ""),
        ("one\\\ntwo\\\nthree\n", "one\ntwo\nthree"),
        ("one\\\n/reset\n", "one\n/reset"),
        ('one\\\n"""\n', 'one\n"""'),
        ("C:\\\\\n", "C:\\\\"),
        ("one\\\\\\\ntwo\n", "one\\\\\ntwo"),
        ("one\\", "one"),
        ("one\\\r\ntwo\r\n", "one\ntwo"),
        ('"""one\r\ntwo"""\r\n', "one\ntwo"),
        ('say """x"""\n', 'say """x"""'),
        ("\n", ""),
    ],
)
def test_a_text(typed: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert everything_said(typed, monkeypatch) == [ChatInput(said)]


def test_commands_and_texts_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = '/help\n/reset now\n/\n"""\na\n"""\nb\\\nc\n/exit\n/etc/hosts\n'
    assert everything_said(typed, monkeypatch) == [
        ChatInput(command="help"),
        ChatInput(command="reset"),
        ChatInput(command=""),
        ChatInput("a"),
        ChatInput("b\nc"),
        ChatInput(command="exit"),
        ChatInput(command="etc/hosts"),
    ]


def test_a_text_without_its_closing_quotes_is_said_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert everything_said('"""\none\ntwo\n', monkeypatch) == [ChatInput("one\ntwo")]
    assert capsys.readouterr().err == ('the message has no closing """; sending what was read\n')


def test_help_fits_a_terminal() -> None:
    assert max(map(len, HELP.splitlines())) < 80
