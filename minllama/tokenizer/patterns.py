"""Recognize regular expressions that take exponential time, by their syntax.

`(a+)+` tries 2^n ways for n characters. `minllama.tokenizer.bounds` calls it.
"""

import re

# An escape, a character class, a quantifier, the ends of a group; anything else is one atom.
_PARTS = re.compile(
    r"(?P<escape>\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|.))"
    r"|(?P<quantifier>[*+?]|\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\})[?+]?"
    r"|(?P<open>\()|(?P<close>\))|(?P<set>\[)|(?P<atom>.)",
    re.DOTALL,
)


def has_nested_loops(pattern: str) -> bool:
    """Whether a regular expression nests variable repetitions."""
    groups = [False]  # whether each open one contains a loop
    last_has_loop = False  # of the atom before
    at = 0
    while at < len(pattern):
        part = _PARTS.match(pattern, at)
        assert part is not None
        at = part.end()
        if part["set"]:
            at = _end_of_set(pattern, at)
            last_has_loop = False
        elif part["open"]:
            groups.append(False)
        elif part["close"]:
            last_has_loop = groups.pop() if len(groups) > 1 else False
            groups[-1] |= last_has_loop
        elif part["quantifier"] and part["quantifier"] != "?" and _varies(part):
            if last_has_loop:
                return True
            groups[-1] = True
        elif not part["quantifier"]:
            last_has_loop = False
    return False


def _varies(part: re.Match[str]) -> bool:
    """Whether a quantifier, `*`, `{2,}`, repeats an atom a variable number of times."""
    if part["quantifier"] in "*+":
        return True
    if not part["comma"]:
        return False
    most = int(part["most"] or 2**31)
    return most > 1 and most > int(part["least"] or 0)


def _end_of_set(pattern: str, at: int) -> int:
    """The end of a character class, `[...]`, which may be nested; `at` is after its `[`."""
    depth, first = 1, at + (pattern[at : at + 1] == "^")
    while at < len(pattern) and depth:
        char = pattern[at]
        if char == "\\":
            at += 1
        elif char == "[":
            depth += 1
        elif char == "]" and at != first:
            depth -= 1
        at += 1
    return at
