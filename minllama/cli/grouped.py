"""Help pages in titled groups, and suggestions for mistyped commands and options.

The commands declare their options with `option`, or make them from option dataclasses, which name
the group of each field (`minllama.options.base.option`).
"""

import difflib
import gettext
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from minllama.options.base import GROUPS

Command = TypeVar("Command", bound=Callable[..., Any])
COMMON = "Common options"  # what most people need first; each option is listed once
OTHER = "Other options"
COLUMN = 30  # of help texts, in every group


class GroupedOption(click.Option):
    """An option with the title under which the help page lists it."""

    def __init__(self, *names: Any, group: str = OTHER, common: bool = False, **settings: Any):
        super().__init__(*names, **settings)
        self.title = COMMON if common else group


class GroupedCommand(click.Command):
    """A command whose help page lists options by group, the most used ones first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in (COMMON, *GROUPS, OTHER)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                rows[getattr(parameter, "title", OTHER)].append(record)
        for title, records in rows.items():
            if records:
                # A first entry as wide as the column lines up the texts of all groups.
                (names, text), *rest = records
                with formatter.section(title):
                    formatter.write_dl([(names.ljust(COLUMN), text), *rest], col_max=COLUMN)


def option(
    *names: str, group: str = OTHER, common: bool = False, **settings: Any
) -> Callable[[Command], Command]:
    """`click.option`, listed under the title `group`, or among the most used options."""
    return click.option(*names, cls=GroupedOption, group=group, common=common, **settings)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean generate?` for a name close to a known one, else nothing."""
    spelled = name.lower().replace("_", "-")
    by_spelling = {word.lower(): word for word in known}
    near = [word for word in by_spelling if len(spelled) > 2 and word.startswith(spelled)]
    near = near or difflib.get_close_matches(spelled, by_spelling, n=1)
    return f"; did you mean {by_spelling[near[0]]}?" if near else ""


def usage_message(error: click.ClickException) -> str:
    """A usage error in one line, with the nearest name where one was mistyped."""
    context = getattr(error, "ctx", None)
    hint = f"(see: {context.command_path if context else 'minllama'} --help)"
    if isinstance(error, click.NoSuchOption) and context is not None:
        known = [
            name
            for parameter in context.command.get_params(context)
            for name in parameter.opts
            if name.startswith("--")
        ]
        name = gettext.gettext("No such option {name!r}.").format(name=error.option_name)
        return f"{name.rstrip('.')}{did_you_mean(error.option_name, known)} {hint}"
    return f"{error.format_message()} {hint}"
