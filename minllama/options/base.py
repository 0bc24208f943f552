"""Define each option once: name, default, range and meaning in a frozen dataclass field.

The command line's parser and help pages, the Python API and its validation read the same fields.
The other modules of this package define the options, by purpose. None imports torch, so that
`--help` stays fast.
"""

import dataclasses
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from minllama.errors import OptionError

# The titles under which help pages list options, in this order.
GROUPS = (
    "Data",
    "Prompt",
    "Model",
    "Method",
    "Sampling",
    "Generation",
    "Training",
    "Adapters",
    "Evaluation",
    "Benchmark",
    "Scale",
    "Hardware",
    "Job",
    "Server",
    "Access",
    "Scheduling",
    "Limits",
    "Output",
)


MAX_ID_DIGITS = 18  # of a token id that is given as text


@dataclass(frozen=True)
class Range:
    """The interval that a number must be in; each end is included unless it is open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        # 2^32 - 1 has ten digits, and all must be shown.
        low, high = (f"{end:.10g}" for end in (self.low, self.high))
        return f"in {left}{low}, {high}{right}"


def option(
    default: Any,
    meaning: str,
    *,
    within: Range | None = None,
    choices: tuple[str, ...] = (),
    flag: str | None = None,
    group: str | None = None,
    common: bool = False,
) -> Any:
    """Define one option: a dataclass field with its meaning and range.

    Args:
        default: the value when none is given.
        meaning: one sentence for the help page, without initial capital and period.
        within: the interval that a number must be in; `None` for no limit.
        choices: the values that a string may have; empty for any string.
        flag: its name on the command line, if not the field's; a flag that is true by default is
            named after its opposite.
        group: the title under which help pages list it; one of GROUPS, by default its dataclass's.
        common: whether help pages list it first, among what most people need.
    """
    metadata = {
        "meaning": meaning,
        "within": within,
        "choices": choices,
        "flag": flag,
        "group": group,
        "common": common,
    }
    return dataclasses.field(default=default, metadata=metadata)


class CheckedOptions:
    """Base of the option dataclasses: checks every field's type and range on construction."""

    group: ClassVar[str]  # the title under which help pages list the fields; one of GROUPS

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            checked = _checked(field.name, value, hints[field.name], field.metadata.get("within"))
            choices = field.metadata.get("choices")
            if choices and checked is not None and checked not in choices:
                known = ", ".join(choices)
                raise OptionError(f"{field.name} must be one of {known}, not {checked!r}")
            if checked is not value:
                object.__setattr__(self, field.name, checked)


def _checked(name: str, value: Any, hint: Any, within: Range | None) -> Any:
    """Convert `value` to the type of `hint`; raise OptionError if it has another type."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        if typing.get_origin(typing.get_args(kind)[0]) is tuple:
            return _checked_biases(name, value, within)
        if int in typing.get_args(typing.get_args(kind)[0]):
            return _checked_tokens(name, value)
        if isinstance(value, str):  # one string instead of a list
            value = (value,)
        if not isinstance(value, tuple | list) or not all(isinstance(v, str) for v in value):
            raise OptionError(f"{name} must be a list of strings, not {value!r}")
        if not all(value):
            raise OptionError(f"{name} contains an empty string, which would match everywhere")
        return tuple(value)
    # bool is a subclass of int, but `top_k=True` is a mistake. NumPy's scalars are accepted.
    is_flag = isinstance(value, bool)
    if kind is int and not is_flag and isinstance(value, numbers.Integral):
        value = int(value)
    if kind is float and not is_flag and isinstance(value, numbers.Real):
        try:
            value = float(value)
        except OverflowError:  # an integer larger than any float
            value = math.inf
        if not math.isfinite(value):
            raise OptionError(f"{name} must be a finite number{_range_text(within)}, not {value}")
    elif type(value) is not kind:
        raise OptionError(f"{name} must be {_KIND_NAMES[kind]}{_range_text(within)}, not {value!r}")
    if within is not None and value not in within:
        raise OptionError(f"{name} must be {within}, not {value!r}")
    return value


def _checked_tokens(name: str, value: Any) -> tuple[int | str, ...]:
    """Convert `value` to a tuple of token ids and token texts; a string of digits is an id."""
    if hasattr(value, "tolist"):  # an array or a tensor of ids
        value = value.tolist()
    if isinstance(value, str | numbers.Integral):  # one instead of a list
        value = (value,)
    listed = isinstance(value, tuple | list | set | frozenset)
    if not listed or not all(isinstance(v, str | numbers.Integral) for v in value):
        raise OptionError(f"{name} must be a list of token ids or token texts, not {value!r}")
    return tuple(_checked_token(name, token) for token in value)


def _checked_token(name: str, token: Any) -> int | str:
    """Convert to a token's id or its text; a string of digits is an id."""
    if isinstance(token, bool) or token == "" or not isinstance(token, str | numbers.Integral):
        raise OptionError(f"{name} contains {token!r}, which is not a token")
    if isinstance(token, str) and not (token.isascii() and token.isdecimal()):
        return token
    if len(str(token)) > MAX_ID_DIGITS:
        raise OptionError(f"{name} contains {token!s:.{MAX_ID_DIGITS}}..., but no id is so long")
    if int(token) < 0:
        raise OptionError(f"{name} contains {token}, but token ids are >= 0")
    return int(token)


def _checked_biases(
    name: str, value: Any, within: Range | None
) -> tuple[tuple[int | str, float], ...]:
    """Convert a mapping of tokens to numbers, or pairs, or texts `ID=VALUE`, to sorted pairs."""
    wrong = f"{name} must be a mapping of tokens to numbers, not {reprlib.repr(value)}"
    pairs = value.items() if isinstance(value, Mapping) else value
    if not isinstance(pairs, Iterable) or isinstance(pairs, str | bytes):
        raise OptionError(wrong)
    biases: dict[int | str, float] = {}
    for pair in pairs:
        if isinstance(pair, str):  # as typed on a command line
            pair = _token_and_number(name, pair)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise OptionError(wrong)
        token = _checked_token(name, pair[0])
        if token in biases:
            raise OptionError(f"{name} holds the token {reprlib.repr(token)} twice; give it once")
        biases[token] = _checked(f"{name} of {reprlib.repr(token)}", pair[1], float, within)
    return tuple(sorted(biases.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))


def _token_and_number(name: str, text: str) -> tuple[str, float]:
    """The parts of `ID=VALUE`, of which the first may hold = too."""
    token, equals, number = text.rpartition("=")
    try:
        return token, float(number if equals else "")
    except ValueError:
        raise OptionError(
            f"{name} must be ID=VALUE, such as 42=-100, not {reprlib.repr(text)}"
        ) from None


_KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def _range_text(within: Range | None) -> str:
    return "" if within is None else f" {within}"


def group_of(options: type[CheckedOptions], field: "dataclasses.Field[Any]") -> str:
    """The title under which help pages list a field: its own, or that of its dataclass."""
    if (group := field.metadata["group"]) is not None:
        return str(group)
    # A subclass inherits fields, and a field the group of the class that defines it.
    classes = [
        kind for kind in options.__mro__ if field.name in vars(kind).get("__annotations__", ())
    ]
    return str(getattr(classes[-1], "group"))  # noqa: B009


def names_of(options: type[CheckedOptions]) -> tuple[str, ...]:
    """The field names of an option dataclass."""
    return tuple(field.name for field in dataclasses.fields(options))  # type: ignore[arg-type]
