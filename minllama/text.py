"""Format untrusted text for display.

Names and messages from files and libraries may contain escape sequences, line breaks or marks that
change the text direction; here they are escaped before a terminal shows them.
"""

JOINERS = "\u200c\u200d"  # invisible, and part of many scripts and emoji
MAX_LINE_CHARS = 2000
_TAIL_CHARS = 500  # of a message its end, which is the remedy


def printable(text: str) -> str:
    """The text on one line, without terminal control characters."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def escaped(text: str) -> str:
    """The text with escapes for unprintable characters."""
    return text if text.isprintable() else ascii(text)[1:-1]


def one_line(text: str, max_chars: int = MAX_LINE_CHARS) -> str:
    """`printable` text of at most so many characters: of longer ones the middle is left out."""
    if len(text) > max_chars:
        tail = min(_TAIL_CHARS, max_chars // 4)
        text = f"{text[: max_chars - tail - 5]} ... {text[-tail:]}"
    return printable(text)


def _shown(char: str) -> str:
    if char.isprintable() or char in JOINERS:
        return char
    return " " if char.isspace() else "\N{REPLACEMENT CHARACTER}"
