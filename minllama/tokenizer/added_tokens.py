"""Find added tokens in a text, before it is tokenized.

Follows the library `tokenizers` and transformers: leftmost and longest match first, including the
white space that a token's flags strip.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from minllama.tokenizer.vocabulary import TokenFlags

# The characters of Unicode's White_Space; Python counts the separators U+001C to U+001F as well.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_TRAILING_SPACES = re.compile(f"[{WHITE_SPACE}]*")
_NO_SPACE = re.compile(f"[^{WHITE_SPACE}]")
_ANYTHING = re.compile(r"[\s\S]")
_HIDDEN = "\U0010fffd"  # a private-use character: neither white space nor part of a word
_NO_FLAGS = TokenFlags()


class AddedToken(NamedTuple):
    """One token that is found in a text as a whole."""

    text: str
    token_id: int
    flags: TokenFlags = _NO_FLAGS


class Span(NamedTuple):
    """A stretch of a text, from `begin` to before `end`: an added token, or text between two."""

    begin: int
    end: int
    token_id: int | None


class AddedTokens:
    """Finds some added tokens in texts."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.text: token for token in tokens}
        lengths: dict[str, set[int]] = {}
        for text in self._tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        # First character -> lengths, the longest first. One pattern of all texts would take
        # seconds to compile where there are tens of thousands.
        self._lengths = {char: sorted(found, reverse=True) for char, found in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]" if lengths else "(?!)")

    def split(self, text: str) -> Iterator[Span]:
        """The parts of `text` in order, without empty ones between tokens.

        White space that a token takes in belongs to its span.
        """
        done = 0
        for begin, (found, token_id, flags) in self._matches(text):
            end = begin + len(found)
            if flags.single_word and _is_next_to_word(text, begin, end):
                continue
            if flags.lstrip:
                # Not those that another token has taken in.
                begin = max(_begin_of_spaces(text, begin), done)
            if flags.rstrip:
                end = _TRAILING_SPACES.match(text, end).end()  # type: ignore[union-attr]
            if begin > done:
                yield Span(done, begin, None)
            yield Span(begin, end, token_id)
            done = end
        if done < len(text):
            yield Span(done, len(text), None)

    def _matches(self, text: str) -> Iterator[tuple[int, AddedToken]]:
        """Where tokens occur, regardless of their flags; none overlaps another."""
        at = 0
        while match := self._first.search(text, at):
            at = match.start()
            for length in self._lengths[text[at]]:
                token = self._tokens.get(text[at : at + length])
                if token is not None:
                    yield at, token
                    at += length
                    break
            else:
                at += 1


def hidden(text: str, special_tokens: Iterable[str]) -> str:
    """A replacement of the same length for `text`, in which no special token can be found.

    White space stays, for tokens around it to take in; unless a token might be made up with it.
    """
    edges = any(_NO_SPACE.sub("", token[:1] + token[-1:]) for token in special_tokens)
    return (_ANYTHING if edges else _NO_SPACE).sub(_HIDDEN, text)


def _begin_of_spaces(text: str, end: int) -> int:
    while end > 0 and not _NO_SPACE.match(text, end - 1):
        end -= 1
    return end


def _is_next_to_word(text: str, begin: int, end: int) -> bool:
    return (begin > 0 and _is_word(text[begin - 1])) or (end < len(text) and _is_word(text[end]))


def _is_word(char: str) -> bool:
    r"""Unicode's definition of \w (UTS 18, annex C), which Python's differs from in marks."""
    category = unicodedata.category(char)
    return (
        category[0] in "LM"
        or category in ("Nd", "Nl", "Pc")
        or char in "\u200c\u200d"
        or "\u24b6" <= char <= "\u24e9"
    )
