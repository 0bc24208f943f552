"""The command `minllama`: its entry point, exit statuses and error messages.

Heavy libraries are imported inside the commands, so that `--help` is fast. A user's mistake is one
line on stderr and exit status 2; `--debug` shows the traceback.
"""

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TextIO

import click

from minllama.cli.grouped import did_you_mean, usage_message
from minllama.cli.limits import keep_to_granted_cpus
from minllama.distributed.launcher import launch
from minllama.errors import CheckpointWarning, MinllamaError
from minllama.text import VERSION, one_line

COMMANDS = {
    "generate": "Continue a prompt, and print the text as it is generated.",
    "chat": "Chat with a model that was trained for it.",
    "train": "Train a classifier from a file of labeled texts, and evaluate it.",
    "evaluate": "Evaluate a classifier on labeled texts.",
    "classify": "Label texts with a trained classifier, or zero-shot.",
    "serve": "Serve models and classifiers over HTTP.",
    "merge": "Merge a classifier's adapter into its weights.",
    "info": "Describe a checkpoint.",
    "bench": "Measure a model's speed on this machine.",
    "plan": "Plan what fits into memory, and how long a job takes.",
    "convert": "Write a checkpoint in another format.",
}
TOGETHER = ("train", "evaluate")  # commands that several processes run together
TURN_SECONDS = 2.0  # that the first process has to print an error that all of them meet


@dataclass
class State:
    """What the commands report to `main`: whether to show tracebacks."""

    debug: bool = False


class _OutputClosed(Exception):
    """The reader of standard output has closed it (as `| head` does)."""


class _LazyGroup(click.Group):
    """Imports each command when it is called."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _OutputClosed from error  # click would treat it as a failure

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            raise click.UsageError(f"No such command {name!r}{did_you_mean(name, COMMANDS)}", ctx)
        if name not in TOGETHER and (size := launch().size) > 1:
            raise MinllamaError(
                f"minllama {name} runs in one process, not in {size}; start it without torchrun"
            )
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"minllama.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table above, without importing the commands.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="minllama", message="%(prog)s %(version)s")
def cli() -> None:
    """Run, train and evaluate small Llama models for generation and classification."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 2 user error, 1 internal error, 130 interrupted."""
    state = State()
    keep_to_granted_cpus()
    _open_closed_streams()
    _print_log()
    for stream in (sys.stdout, sys.stderr):
        # Replace characters that the terminal cannot show.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    status = _run(args, state)
    for stream in (sys.stdout, sys.stderr):
        _discard(stream)
    sys.exit(status)


def _open_closed_streams() -> None:
    """Connect standard streams that the caller closed (`<&-`, `2>&-`) to the null device.

    Otherwise the next file that is opened, such as a model being written, gets their descriptor,
    and libraries print into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115  (until exit)


def _print_log() -> None:
    """Print the library's log messages to stderr, one line each."""
    import logging

    class Printer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(OSError):  # stderr is full or closed
                click.echo(f"minllama: {one_line(record.getMessage())}", err=True)

    log = logging.getLogger("minllama")
    if not log.handlers:
        log.addHandler(Printer())


def _as_messages(show: Callable[..., None]) -> Callable[..., None]:
    """A `warnings.showwarning` that prints minllama's own warnings as one line each, once."""
    shown: set[str] = set()

    def show_once(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, CheckpointWarning):
            show(message, category, *where)
        elif not launch().is_first:
            pass  # the first process prints it
        elif (text := " ".join(str(message).split())) not in shown:
            shown.add(text)
            with suppress(OSError):  # stderr is full or closed
                click.echo(f"minllama: {text}", err=True)

    return show_once


def _run(args: list[str] | None, state: State) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if state.debug else "ignore")
            warnings.simplefilter("always", CheckpointWarning)
            warnings.showwarning = _as_messages(warnings.showwarning)
            try:
                cli.main(args, prog_name="minllama", standalone_mode=False, obj=state)
            except click.exceptions.NoArgsIsHelpError as error:
                click.echo(error.format_message())
        # Flush here, where errors are reported: Python buffers output to files.
        sys.stdout.flush()
    except click.ClickException as error:
        return _report(usage_message(error), 2, state)
    except MinllamaError as error:
        return _report(str(error), 2, state)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except (BrokenPipeError, _OutputClosed):
        return 0  # the reader has closed the pipe (`| head`)
    except OSError as error:
        return _report(f"{error.filename or 'output'}: {error.strerror or error}", 2, state)
    except Exception as error:
        if _is_out_of_memory(error):
            return _report(OUT_OF_MEMORY, 2, state)
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return _report(
            f"internal error: {message}; please report it, with the traceback that --debug shows",
            1,
            state,
        )
    return 0


OUT_OF_MEMORY = "out of memory; use a smaller model, fewer samples, or --dtype bfloat16"


def _is_out_of_memory(error: Exception) -> bool:
    # torch has an exception class for GPUs, but none for the CPU.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in str(error) for sign in ("can't allocate memory", "out of memory"))
    )


def _wait_for_turn() -> None:
    """Let the first of several processes print an error that all meet, such as a wrong option.

    Its launcher then ends the others. Errors in what they do together are printed once anyway.
    """
    ranks = sys.modules.get("minllama.distributed.ranks")
    if ranks is not None and ranks.have_met():
        return
    with suppress(MinllamaError):
        if not launch().is_first:
            time.sleep(TURN_SECONDS)


def _report(message: str, status: int, state: State) -> int:
    _wait_for_turn()
    with suppress(OSError):  # stderr is full or closed: only the status remains
        if state.debug:
            traceback.print_exc()
        click.echo(f"minllama: {one_line(message)}", err=True)
    return status


def _discard(stream: TextIO) -> None:
    """Flush a stream; discard what cannot be written, or Python fails again at exit."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
