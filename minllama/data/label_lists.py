"""Parse lists of labels in a string: in table cells and on the command line.

Lists as Python, JSON and NumPy print them are parsed in one pass by a grammar; nothing is
evaluated.
"""

import re
from collections.abc import Sequence
from typing import Any

from minllama.text import shown

_CLOSING = {"[": "]", "(": ")", "{": "}"}
_CALL = re.compile(r"(?:np\.|numpy\.)?(?:array|set|frozenset|list|tuple)\(")
_SPACE = re.compile(r"\s*")
_QUOTED = re.compile(r"""[uU]?(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')""", re.DOTALL)
_WRAPPED = re.compile(r"(?:np|numpy)\.\w+\(([^()]*)\)")  # np.str_('a'), np.int64(1): numpy 2
_BARE = re.compile(r"[^,\"'\[\](){}]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)
_ESCAPE = re.compile(
    r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U000[0-9a-fA-F]{5}|U0010[0-9a-fA-F]{4}|.)", re.DOTALL
)
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_WORDS = {"true": True, "false": False, "none": None, "null": None, "nan": None, "<na>": None}
_MARKS = {'"': '"', "'": "'", "\N{LEFT DOUBLE QUOTATION MARK}": "\N{RIGHT DOUBLE QUOTATION MARK}"}


def read_list(text: str, *, bare_words: bool) -> list[Any] | None:
    """The list written in a text: `['a', 'b']`, `["a"]`, `[1 0]`, `{'a', 'b'}`, `('a',)`, `[]`.

    Args:
        text: of one cell.
        bare_words: whether `[a, b]` is a list, too, and not the name of something.

    Returns:
        Strings, numbers, booleans and None; None for a text that is not a list.

    Raises:
        ValueError: it starts like a list but is none, is abbreviated by `...`, or is nested.
    """
    text = text.strip()
    if text.endswith(")") and (call := _CALL.match(text)) is not None:  # array(['a'], dtype=object)
        end = text.rfind(", dtype=")
        text = text[call.end() : end if end > 0 else -1].strip() or "[]"
    opening, inside = text[:1], text[1:-1].strip()
    if opening not in _CLOSING:
        return None
    first = inside or text[1:].strip()
    is_quoted = _QUOTED.match(first) is not None or first[:1] in ('"', "'")
    if len(text) < 2 or text[-1] != _CLOSING[opening]:
        if opening == "[" and is_quoted:
            raise ValueError(
                f"{shown(text)} begins like a list of labels, but does not end like one"
            )
        return None
    if opening == "(" and not is_quoted and "," not in inside and inside:
        return None  # (1) and (none) are not tuples
    items = _items(inside)
    has_bare_words = any(isinstance(item, _Bare) for item in items or ())
    if items is None or (opening == "{" and is_quoted and has_bare_words):
        is_nested = opening == "[" and first[:1] in _CLOSING
        if is_quoted or is_nested or "..." in re.split(r"[,\s]+", inside):
            raise ValueError(
                f"{shown(text)} is not a list of labels: write it as ['a', 'b'], complete and "
                "without nested lists"
            )
        return None
    if has_bare_words and not (bare_words and opening == "["):
        return None
    return [str(item) if isinstance(item, _Bare) else item for item in items]


class _Bare(str):
    """An unquoted list element."""


def _items(inside: str) -> list[Any] | None:
    """The text between the brackets; None if it is not a list."""
    items: list[Any] = []
    position, size = 0, len(inside)
    while position < size:
        if (match := _QUOTED.match(inside, position)) is not None:
            items.append(_unescaped(match[1] if match[1] is not None else match[2]))
        elif (match := _WRAPPED.match(inside, position)) is not None:
            within = _items(match[1].strip())
            if within is None or len(within) != 1:
                return None
            items += within
        elif (match := _BARE.match(inside, position)) is not None:
            words = match[0].strip()
            if not words:
                return None
            number_texts = words.split()
            if "..." in number_texts:
                return None
            if all(map(_NUMBER.fullmatch, number_texts)):
                items += map(_number, number_texts)  # separated by spaces, as NumPy prints them
            else:
                lower = words.lower()
                items.append(_WORDS[lower] if lower in _WORDS else _Bare(words))
        else:
            return None
        position = _skip(inside, match.end())
        if inside.startswith(",", position):
            position = _skip(inside, position + 1)
    return items


def _skip(text: str, position: int) -> int:
    """The index of the next character other than white space."""
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _number(text: str) -> Any:
    """A number by value if it is in normal spelling; else the text: 007, 4.50."""
    if re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", text, re.ASCII):
        return int(text)
    value = float(text) if len(text) < 30 else 0.0
    plain = f"{text}0" if text.endswith(".") else text
    return value if repr(value) == plain else text


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text

    def character(match: re.Match[str]) -> str:
        code = match[1]
        if len(code) > 1:
            return chr(int(code[1:], 16))
        return _CONTROL.get(code, code)

    text = _ESCAPE.sub(character, text)
    # JSON writes characters beyond U+FFFF as two escapes.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_names(text: str, separator: str = ",") -> list[str]:
    """Split names at a separator; a quoted name may contain it, as in CSV.

    Args:
        text: `good,bad`, or `very good,"bad, awful"`. Quotes within a name are part of it.
        separator: one or more characters.

    Returns:
        The stripped names, including empty ones.

    Raises:
        ValueError: a quote is not closed, or text follows a closing quote.
    """
    names, position = [], 0
    while True:
        quoted = _quoted_name(text, _skip(text, position), separator)
        if quoted is not None:
            name, position = quoted
        else:
            end = text.find(separator, position)
            end = len(text) if end < 0 else end
            name, position = text[position:end].strip(), end
        names.append(name)
        if position >= len(text):
            return names
        position += len(separator)


def _quoted_name(text: str, start: int, separator: str) -> tuple[str, int] | None:
    """A quoted name and its end; None if none starts here."""
    closing = _MARKS.get(text[start : start + 1])
    if closing is None:
        return None
    parts, position = [], start + 1
    while True:
        end = text.find(closing, position)
        if end < 0:
            if closing == "'":
                return None  # an apostrophe
            raise ValueError(f"{shown(text[start:])}: a quote is not closed")
        parts.append(text[position:end])
        position = end + 1
        if not text.startswith(closing, position):
            break
        parts.append(closing)  # doubled, it is a literal quote
        position += 1
    after = position if text.startswith(separator, position) else _skip(text, position)
    if after < len(text) and not text.startswith(separator, after):
        if closing == "'":
            return None
        raise ValueError(f"{shown(text[start:])}: no {separator!r} after the closing quote")
    return "".join(parts).strip(), min(after, len(text))


def joined_names(names: Sequence[str]) -> str:
    """Join names as `split_names` reads them: separated by commas, quoted if needed."""

    def quoted(name: str) -> str:
        doubled = name.replace('"', '""')
        needs_quotes = "," in name or name[:1] in _MARKS or name[:1] in _CLOSING
        return f'"{doubled}"' if needs_quotes else name

    return ",".join(map(quoted, names))
