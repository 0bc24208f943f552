"""What pydantic finds wrong with a body, as one line with the field and what it must be."""

import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from minllama.server.errors import RequestError

MOST_PARTS = 12  # of a field's place
# What stands in a place and is no field: kinds of values, of which one was meant.
_KINDS = frozenset({"str", "int", "float", "bool", "none", "dict[any,any]"})


def validation_error(errors: Sequence[Any], body: type[BaseModel] | None = None) -> RequestError:
    """The error of a body that pydantic has refused.

    Where a value may be of several kinds, the message is about the kind that came closest: the one
    whose fault lies deepest.

    Args:
        errors: pydantic's.
        body: whose fields they are about, which knows their ranges.
    """
    deepest = max(errors, key=lambda error: len(_place(error)))
    place = _place(deepest)
    same = [error for error in errors if _place(error) == place]
    words = " or ".join(dict.fromkeys(_words(error) for error in same[:4]))
    field = ".".join(map(str, place)) or None
    if body is not None and len(place) == 1 and (range_ := range_of(body, str(place[0]))):
        words = f"must be {range_}"
    message = f"{field}: {words}" if field else f"the body: {words}"
    return RequestError(message, param=field, place=place)


def range_of(body: type[BaseModel], name: str) -> str | None:
    """The kind and the range of a field that is a number; None for another."""
    field = body.model_fields.get(name)
    if field is None:
        return None
    kinds = {int: "an integer", float: "a number"}
    kind = next((kinds[k] for k in typing.get_args(field.annotation) if k in kinds), None)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {bound}"
        for known in field.metadata
        for name, sign in signs.items()
        if (bound := getattr(known, name, None)) is not None
    ]
    return f"{kind} {' and '.join(bounds)}" if kind and bounds else None


def _place(error: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Where in the body it is: field names, and numbers in lists."""
    whole = error["loc"][error["loc"][:1] == ("body",) :]
    parts = [part for part in whole if isinstance(part, int) or not _is_kind(str(part))]
    return tuple(part if isinstance(part, int) else str(part)[:64] for part in parts)[:MOST_PARTS]


def _is_kind(part: str) -> bool:
    """Whether it names no field but a class or type: `list[int]`, `TextPart`, `constrained-str`."""
    return "[" in part or part.startswith("constrained") or part in _KINDS | _classes()


@functools.cache
def _classes() -> frozenset[str]:
    """The names of all bodies and their parts. (A name that a client chose may begin like one.)"""
    found: set[type[BaseModel]] = set()
    waiting = [BaseModel]
    while waiting:
        found.update(some := waiting.pop().__subclasses__())
        waiting += some
    return frozenset(each.__name__ for each in found)


def _words(error: Mapping[str, Any]) -> str:
    """What it must be; never the value itself."""
    text = str(error["msg"])
    return text[:1].lower() + text[1:]
