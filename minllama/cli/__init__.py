"""The command `minllama`: parse, call, print.

Everything heavy is imported inside the commands, so that `--help` answers at once. What a user did
wrong is one line on stderr and exit status 2; a traceback only with `--debug`.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TextIO

import click

from minllama.cli.limits import keep_to_granted_cpus
from minllama.errors import CheckpointWarning, MinllamaError
from minllama.text import VERSION, one_line

COMMANDS = {
    "generate": "Continue a prompt; the text streams as it is made.",
    "chat": "Talk with a model that was trained to chat.",
    "train": "Train a classifier from a file of labelled texts, and evaluate it.",
    "evaluate": "Measure a classifier on labelled texts.",
    "classify": "Say the labels of texts, with a classifier or with label words alone.",
    "merge": "Make a classifier's adapter part of its weights.",
    "info": "Say what a checkpoint is.",
    "convert": "Write a checkpoint in another format.",
}


@dataclass
class State:
    """What the commands tell the door: whether tracebacks are wanted."""

    debug: bool = False


class _ReaderGone(Exception):
    """Who read our output has gone (`| head`), and has what was wanted."""


class _LazyGroup(click.Group):
    """Commands that are imported when they are called."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderGone from error  # click would take it for a failure

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"minllama.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table above: help for all needs no command's imports.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="minllama", message="%(prog)s %(version)s")
def cli() -> None:
    """Small Llamas that classify and generate, on the machine you have."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the user's mistake, 1 ours, 130 interrupted."""
    state = State()
    keep_to_granted_cpus()
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal cannot show is no reason to stop.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    status = _run(args, state)
    for stream in (sys.stdout, sys.stderr):
        _let_go(stream)
    sys.exit(status)


def _open_closed_streams() -> None:
    """Give the streams that the caller closed (`<&-`, `2>&-`) an end: the null device.

    Otherwise the next file that is opened, such as a half-written model, gets their number, and
    what libraries print goes into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115  (until exit)


def _as_notices(show: Callable[..., None]) -> Callable[..., None]:
    """A `warnings.showwarning` that shows our own as one line each, once, and others as before."""
    shown: set[str] = set()

    def show_once(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, CheckpointWarning):
            show(message, category, *where)
        elif (text := " ".join(str(message).split())) not in shown:
            shown.add(text)
            with suppress(OSError):  # where it goes is full or gone
                click.echo(f"minllama: {text}", err=True)

    return show_once


def _run(args: list[str] | None, state: State) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if state.debug else "ignore")
            warnings.simplefilter("always", CheckpointWarning)
            warnings.showwarning = _as_notices(warnings.showwarning)
            try:
                cli.main(args, prog_name="minllama", standalone_mode=False, obj=state)
            except click.exceptions.NoArgsIsHelpError as error:
                click.echo(error.format_message())
        # Here, where what fails is said: Python buffers what goes to a file.
        sys.stdout.flush()
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "minllama"
        return _complain(f"{error.format_message()} (see: {command} --help)", 2, state)
    except MinllamaError as error:
        return _complain(str(error), 2, state)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except (BrokenPipeError, _ReaderGone):
        return 0  # the reader has gone (`| head`)
    except OSError as error:
        return _complain(f"{error.filename or 'output'}: {error.strerror or error}", 2, state)
    except Exception as error:
        if _is_out_of_memory(error):
            return _complain(OUT_OF_MEMORY, 2, state)
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return _complain(
            f"internal error: {message}; --debug shows where, please report it", 1, state
        )
    return 0


OUT_OF_MEMORY = "out of memory; use a smaller model, fewer samples, or --dtype bfloat16"


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a class of its own for GPUs, and none for the CPU.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in str(error) for sign in ("can't allocate memory", "out of memory"))
    )


def _complain(message: str, status: int, state: State) -> int:
    with suppress(OSError):  # where errors go is full or gone: the status alone can tell
        if state.debug:
            traceback.print_exc()
        click.echo(f"minllama: {one_line(message)}", err=True)
    return status


def _let_go(stream: TextIO) -> None:
    """Drop what is still buffered and cannot be written, or Python fails again when it exits."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
