"""What pydantic finds wrong with a body, as one line with the field and what it must be."""

from collections.abc import Mapping, Sequence
from typing import Any

from minllama.server.errors import RequestError

MOST_PARTS = 12  # of a field's place
# What stands in a place and is no field: kinds of values, of which one was meant.
_KINDS = frozenset({"str", "int", "float", "bool", "none", "dict[any,any]"})


def validation_error(errors: Sequence[Any]) -> RequestError:
    """The error of a body that pydantic has refused.

    Of values that may be of several kinds, what is said of the kind that came closest: the one
    whose fault lies deepest.
    """
    deepest = max(errors, key=lambda error: len(_place(error)))
    place = _place(deepest)
    same = [error for error in errors if _place(error) == place]
    words = " or ".join(dict.fromkeys(_words(error) for error in same[:4]))
    field = ".".join(place) or None
    message = f"{field}: {words}" if field else f"the body: {words}"
    return RequestError(message, param=field)


def _place(error: Mapping[str, Any]) -> tuple[str, ...]:
    """Where in the body it is: field names and numbers."""
    parts = [str(part) for part in error["loc"] if part != "body"]
    return tuple(part[:64] for part in parts if part not in _KINDS and not _is_kind(part))[
        :MOST_PARTS
    ]


def _is_kind(part: str) -> bool:
    """Whether it names a class or a type of ours: `list[int]`, `TextPart`, `constrained-str`."""
    return "[" in part or part.startswith("constrained") or part[:1].isupper()


def _words(error: Mapping[str, Any]) -> str:
    """What it must be; never the value itself."""
    text = str(error["msg"])
    return text[:1].lower() + text[1:]
