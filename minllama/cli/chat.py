"""`minllama chat`: an interactive session with history."""

import sys
from typing import Any

import click

from minllama.cli.common import (
    check_sampling,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    model_options,
    open_model,
    quantize_option,
    warn_of_slow_dtype,
)
from minllama.cli.generate import summary
from minllama.errors import ContextError, MinllamaError
from minllama.options import GenerationOptions

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


@click.command("chat")
@click.option("--system", metavar="TEXT", help="Instructions that stand before the conversation.")
@model_options
@quantize_option
@dataclass_options(
    GenerationOptions,
    defaults={"max_new_tokens": 1024},
    skip=("n", "logprobs", "ignore_eos", "json_schema", "regex"),
)
@debug_option
def command(
    system: str | None,
    source: str | None,
    tokenizer: str | None,
    dtype: str | None,
    device: str | None,
    quantize: str,
    **options: Any,
) -> None:
    """Talk with a model: /reset forgets, /exit leaves, Ctrl-C stops an answer."""
    checked = GenerationOptions(**options)
    check_sampling(checked.temperature)

    with ended_by_interrupts():
        from minllama.conversation import Conversation

    warn_of_slow_dtype(dtype, device)
    model, words, checkpoint = open_model(source, tokenizer, dtype, device, quantize)
    conversation = Conversation(model, words, checked, system=system)
    click.echo(f"{checkpoint.path.name}. {HELP}", err=True)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() a history and line editing)
    while True:
        try:
            text = input(">>> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            click.echo("\n(/exit leaves)", err=True)
            continue
        except EOFError:
            click.echo()
            return
        except UnicodeDecodeError as error:
            raise MinllamaError(f"standard input: is not UTF-8 ({error.reason})") from error
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            click.echo("(forgotten)", err=True)
        elif text.startswith("/"):
            click.echo(f"{text.split()[0]} is no command. {HELP}", err=True)
        elif text:
            _answer(conversation, text)


def _answer(conversation: Any, text: str) -> None:
    pieces = conversation.answer(text)
    try:
        for piece in pieces:
            click.echo(piece.text, nl=False, color=True)
            sys.stdout.flush()
        click.echo()
        click.echo(summary(conversation.stream.timings, conversation.stream.results), err=True)
    except KeyboardInterrupt:
        click.echo("\n(stopped)", err=True)
    except ContextError as error:
        click.echo(f"{error}; /reset begins anew", err=True)
    except MinllamaError as error:  # what was said is at fault: the session goes on
        click.echo(str(error), err=True)
    finally:
        pieces.close()
