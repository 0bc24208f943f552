"""docs/cli.md, written from the parser: `python -m minllama.cli.docs > docs/cli.md`."""

import click

from minllama.cli import COMMANDS, cli


def cli_reference() -> str:
    """The help of the program and of every command, as Markdown."""
    parts = ["# The command line\n", "Written by `make docs` from the parser; do not edit.\n"]
    program = click.Context(cli, info_name="minllama", terminal_width=80, **cli.context_settings)
    parts.append(_section("minllama", cli.get_help(program)))
    for name in COMMANDS:
        command = cli.get_command(program, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=program, terminal_width=80)
        parts.append(_section(f"minllama {name}", command.get_help(context)))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    print(cli_reference(), end="")
