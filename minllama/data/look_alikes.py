"""Find names that look alike or mean the same.

Two names look alike if they differ only in case, white space, invisible characters, Unicode
normalization or the spelling of a number. They remain different; a notice reports them.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

from minllama.data.class_names import is_number_like
from minllama.text import first_few

# Invisible, in addition to the categories Cf and Cc: joiner, fillers, variation selectors.
_FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
_SELECTORS = (("\ufe00", "\ufe0f"), ("\U000e0100", "\U000e01ef"))


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """The groups of two or more look-alike names, in the order of the names."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[folded(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def folded(name: str) -> str:
    """The key that look-alike names share."""
    text = _without_spaces(_visible(unicodedata.normalize("NFKC", name))).casefold()
    text = unicodedata.normalize("NFKC", text)
    if not is_number_like(text):
        return text
    sign, digits = text[:1].strip("+0123456789"), text.lstrip("+-").lstrip("0")
    if "e" not in digits and "." in digits:
        digits = digits.rstrip("0").removesuffix(".")
    return f"{sign}{'0' if digits[:1] in ('', '.', 'e') else ''}{digits}"


def difference(names: list[str]) -> str:
    """How look-alike names differ, for a message."""
    if len({name.casefold() for name in names}) == 1:
        return "case"
    if len({_without_spaces(name) for name in names}) == 1:
        return "white space"
    if len({_visible(name) for name in names}) == 1:
        return "invisible characters"
    if len({unicodedata.normalize("NFKC", name) for name in names}) == 1:
        return "Unicode normalization"
    if all(map(is_number_like, names)):
        return "how a number is written"
    return "case, white space, invisible characters or Unicode normalization"


def distinguishable(names: list[str]) -> list[str]:
    """The names quoted, with escapes for invisible or differing characters."""
    common = set(names[0]).intersection(*names[1:])
    letters = difference(names) == "case"

    def shown(character: str) -> str:
        if character == " " or "!" <= character <= "~":
            return character
        if character.isprintable() and _visible(character) and (character in common or letters):
            return character
        return character.encode("unicode_escape").decode()

    return [f"'{''.join(map(shown, name[:100]))}'" for name in names]


def look_alike_message(names: list[str], counts: Mapping[str, int]) -> str:
    """A message about look-alike names, with their row counts.

    Args:
        names: two or more look-alikes.
        counts: rows of each; may lack names.
    """
    described = []
    for name, shown in zip(names, distinguishable(names), strict=True):
        n = counts.get(name)
        described.append(shown if n is None else f"{shown} ({n:,} row{'s' * (n != 1)})")
    return (
        f"{first_few(described)} are different labels that differ only in "
        f"{difference(names)}; are they the same?"
    )


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _visible(text: str) -> str:
    return "".join(c for c in text if not _is_invisible(c))


def _is_invisible(character: str) -> bool:
    if character.isspace():
        return False
    return (
        unicodedata.category(character) in ("Cf", "Cc")
        or character in _FILLERS
        or any(low <= character <= high for low, high in _SELECTORS)
    )
