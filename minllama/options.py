"""Options that are defined once: name, default, range and meaning in one frozen dataclass field.

The command line's help and parsing, the Python API and its validation all read the same fields.
Knows nothing of what the options are for, and imports no torch, so that `--help` stays instant.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

from minllama.errors import OptionError


@dataclass(frozen=True)
class Range:
    """The closed or half-open interval that a number must lie in."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"


def option(default: Any, meaning: str, *, within: Range | None = None) -> Any:
    """Define one option: a dataclass field that carries its meaning and range.

    Args:
        default: the value when nothing is said.
        meaning: one sentence, as the command line's help prints it.
        within: the interval that a number must lie in; `None` for no limit.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, "within": within})


class CheckedOptions:
    """Base of the option dataclasses: checks every field against its type and range at birth."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            checked = _checked(field.name, value, hints[field.name], field.metadata.get("within"))
            if checked is not value:
                object.__setattr__(self, field.name, checked)


def _checked(name: str, value: Any, hint: Any, within: Range | None) -> Any:
    """`value`, as the type that `hint` names; an OptionError where it is not one."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):  # one string where several may stand
            value = (value,)
        if not isinstance(value, tuple | list) or not all(isinstance(v, str) for v in value):
            raise OptionError(f"{name} must be a list of strings, not {value!r}")
        if not all(value):
            raise OptionError(f"{name} holds an empty string, which would match everywhere")
        return tuple(value)
    # bool is an int to Python, but `top_k=True` is a mistake.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number:
        value = float(value)
        if not math.isfinite(value):
            raise OptionError(f"{name} must be a finite number{_range_text(within)}, not {value}")
    elif type(value) is not kind:
        raise OptionError(f"{name} must be {_KIND_NAMES[kind]}{_range_text(within)}, not {value!r}")
    if within is not None and value not in within:
        raise OptionError(f"{name} must be {within}, not {value!r}")
    return value


_KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _range_text(within: Range | None) -> str:
    return "" if within is None else f" {within}"
