"""`minllama chat`: an interactive conversation in the terminal."""

import sys
from typing import TYPE_CHECKING, Any

import click

from minllama.cli.chat_input import HELP, read_chat_input
from minllama.cli.generate import summary
from minllama.cli.grouped import GroupedCommand
from minllama.cli.open import (
    activations_option,
    base_option,
    check_sampling,
    chosen_template,
    dataclass_options,
    debug_option,
    ended_by_interrupts,
    generation_config_option,
    model_options,
    open_model,
    pick,
    quantize_option,
    recommended,
    template_options,
    warn_of_slow_dtype,
)
from minllama.cli.prompt_text import read_system
from minllama.errors import ContextError, MinllamaError
from minllama.options import GenerationOptions
from minllama.options.loading import LoadOptions
from minllama.text import escaped, one_line

if TYPE_CHECKING:
    from minllama.generation.conversation import Conversation


@click.command("chat", cls=GroupedCommand)
@template_options()
@model_options
@base_option
@quantize_option
@activations_option
@generation_config_option
@dataclass_options(
    GenerationOptions,
    defaults={"max_new_tokens": 1024},
    skip=("n", "logprobs", "prompt_logprobs", "ignore_eos", "json_schema", "regex", "special"),
)
@debug_option
def command(
    system: str | None,
    system_file: str | None,
    chat_template: str | None,
    source: str | None,
    generation_config: bool,
    **options: Any,
) -> None:
    """Chat with a model: /help lists the commands, Ctrl-C stops an answer."""
    loading = pick(LoadOptions, options)
    checked = GenerationOptions(**options)
    if not generation_config:
        check_sampling(checked.temperature)
    system = read_system(system, system_file)

    with ended_by_interrupts():
        from minllama.generation.conversation import Conversation

    warn_of_slow_dtype(loading.dtype, loading.device)
    model, words, checkpoint = open_model(source, loading)
    if generation_config:
        checked = recommended(options, checkpoint)
    template = chosen_template(chat_template, words)
    conversation = Conversation(model, words, checked, system=system, template=template)
    hint = "/help lists the commands, /exit or Ctrl-D quits"
    click.echo(one_line(f"{checkpoint.path.name}: {hint}"), err=True)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() a history and line editing)
    while True:
        try:
            entered = read_chat_input()
        except KeyboardInterrupt:
            click.echo("\n(/exit quits)", err=True)
            continue
        except EOFError:
            click.echo()
            return
        if entered.command == "exit":
            return
        if entered.command == "reset":
            conversation.reset()
            click.echo("(history cleared)", err=True)
        elif entered.command == "help":
            click.echo(HELP, err=True)
        elif entered.command is not None:
            shown = escaped("/" + entered.command)
            click.echo(
                f"{shown[:60]} is not a command; /help lists them, //text sends /text", err=True
            )
        elif entered.text:
            _answer(conversation, entered.text)


def _answer(conversation: "Conversation", text: str) -> None:
    pieces = conversation.answer(text)
    try:
        for piece in pieces:
            click.echo(piece.text, nl=False, color=True)
            sys.stdout.flush()
        click.echo()
        assert conversation.stream is not None
        click.echo(summary(conversation.stream.timings, conversation.stream.results), err=True)
    except KeyboardInterrupt:
        click.echo("\n(stopped)", err=True)
    except ContextError as error:
        click.echo(f"{error}; /reset clears the history", err=True)
    except MinllamaError as error:  # caused by this message: the conversation continues
        click.echo(str(error), err=True)
    finally:
        pieces.close()
