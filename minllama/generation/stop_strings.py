"""Convert generated tokens to the shown text, which ends before a stop string.

A stop string may hold special tokens, alone or among other text, whether or not the reader is shown
them. It takes the tokens of one sequence as they are generated.
"""

from collections.abc import Iterator

from minllama.tokenizer.tokenizer import Tokenizer

# The kind of each character of the spelled text: plain, or first or later in a special
# token's text.
PLAIN, FIRST, FURTHER = ".", "S", "s"


class RowText:
    """The text of one row, held back while it may be the beginning of a stop string.

    Two texts are looked through for stop strings: the one that is shown, and the one in which
    special tokens are spelled out. In the latter a special token that is not shown is matched whole
    or not at all.

    Args:
        tokenizer: of the model that generates.
        stop: strings before which the text ends.
        skip_special: special tokens are not shown.

    Attributes:
        stopped: a stop string has ended the text.
        offset: where the newest token begins in the text, were there no stop strings, in
            characters.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], *, skip_special: bool) -> None:
        self._decoder = tokenizer.stream_decoder(continuation=True, skip_special=skip_special)
        self._special = {i: text for text, i in tokenizer.special_tokens.items()}
        self._stop, self._hides = stop, skip_special
        self._begin = tuple({string[0] for string in stop})
        self._spelled, self._marks = "", ""  # of the text held back
        self._plain: list[str] = []
        self._length = self.offset = 0  # of the text that would be shown without stop strings
        self.stopped = False

    @property
    def plain(self) -> str:
        """The text so far without any special token."""
        return "".join(self._plain)

    def push(self, token_id: int) -> str:
        """The text that can be shown after this token; often empty."""
        text = self._decoder.push(token_id)
        self.offset = self._length
        self._length += len(text)
        if token_id not in self._special:
            if not self._spelled and not any(char in text for char in self._begin):
                self._plain.append(text)  # no stop string can have begun
                return text
            self._append(text)
        elif self._hides:
            self._append(self._special[token_id], special=True)
        else:  # the text of a previously incomplete character precedes it
            spelled = self._special[token_id]
            self._append(text.removesuffix(spelled))
            self.offset = self._length - len(spelled)
            self._append(spelled, special=True)
        return self._scanned()

    def end(self, token_id: int | None = None) -> str:
        """The remaining text when the row has ended.

        Args:
            token_id: the token that ended it, which is not text; a stop string may end with it.
        """
        self._append(self._decoder.flush())
        text = self._scanned()
        left = len(self._spelled)
        if not self.stopped and token_id in self._special:
            self._append(self._special[token_id], special=True)
            text += self._before_stop()
        return text if self.stopped else text + self._take(left)

    def _append(self, text: str, *, special: bool = False) -> None:
        self._spelled += text
        self._marks += (FIRST if special else PLAIN) * len(text[:1])
        self._marks += (FURTHER if special else PLAIN) * len(text[1:])

    def _scanned(self) -> str:
        """The text before a stop string, or that cannot begin one."""
        text = self._before_stop()
        return text if self.stopped else self._take(self._held_from())

    def _before_stop(self) -> str:
        """The text before a stop string, which ends the generation; empty without one."""
        first = min(self._stops(), default=None)
        if first is None:
            return ""
        self.stopped = True
        text = self._take(first)
        self._spelled, self._marks = "", ""
        return text

    def _take(self, n: int) -> str:
        """Remove the first n characters from the text held back; returns the shown ones."""
        spelled, marks = self._spelled[:n], self._marks[:n]
        self._spelled, self._marks = self._spelled[n:], self._marks[n:]
        plain = spelled
        if FIRST in marks:
            plain = "".join(c for c, mark in zip(spelled, marks, strict=True) if mark == PLAIN)
        self._plain.append(plain)
        return plain if self._hides else spelled

    def _stops(self) -> Iterator[int]:
        """Where stop strings begin in the text held back."""
        for stop in self._stop:
            start = self._spelled.find(stop)
            while start >= 0 and not self._is_whole(start, start + len(stop)):
                start = self._spelled.find(stop, start + 1)
            if start >= 0:
                yield start
        for text, offsets in self._without_special():
            for stop in self._stop:
                if (start := text.find(stop)) >= 0:
                    yield offsets[start]

    def _held_from(self) -> int:
        """The offset from which the text may be the beginning of a stop string."""
        length = len(self._spelled)
        first = length
        for stop in self._stop:
            for start in range(max(0, length - len(stop) + 1), first):
                if stop.startswith(self._spelled[start:]) and self._is_whole(start, length):
                    first = start
                    break
        for text, offsets in self._without_special():
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            if held:
                first = min(first, offsets[len(text) - held])
        return first

    def _is_whole(self, start: int, end: int) -> bool:
        """Whether this range splits no hidden special token."""
        return not self._hides or FURTHER not in (self._marks[start], self._marks[end : end + 1])

    def _without_special(self) -> Iterator[tuple[str, list[int]]]:
        """The shown text and its characters' offsets, if it differs from the spelled one."""
        if self._hides and FIRST in self._marks:
            offsets = [i for i, mark in enumerate(self._marks) if mark == PLAIN]
            yield "".join(self._spelled[i] for i in offsets), offsets


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
