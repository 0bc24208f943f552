"""Decode bytes of any encoding to a UTF-8 stream, and guess the encoding of invalid UTF-8.

A byte order mark takes precedence over the given encoding.
"""

import codecs
import io
import unicodedata
from typing import BinaryIO, cast

from minllama.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_8 = "utf-8"
CHUNK = 2**16
# The longer ones first: UTF-32's mark begins with UTF-16's.
_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (BYTE_ORDER_MARK, UTF_8),
)
# The usual encodings of other files; if two fit equally well, the first.
_CANDIDATES = (
    "cp1252",
    "mac-roman",
    "cp850",
    "cp1250",
    "cp1251",
    "koi8-r",
    "cp1253",
    "shift_jis",
    "euc-jp",
    "gb18030",
    "euc-kr",
    "big5",
)
_ICONV_NAMES = {"mac-roman": "macintosh"}
_QUOTES_AND_DASHES = "\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u20ac\u00a3\u00b0\u00ab\u00bb"
_QUOTES_AND_DASHES += "\u00a9\u00ae\u2122\u00bf\u00a1\u2022\u00a7\u00bd\u00bc\u00be\u00b7"
_MARKED = "minllama.marked"


def encoding_of(head: bytes, requested: str | None, name: str) -> str:
    """The encoding of a stream that starts with `head`: by its byte order mark, as given, or UTF-8.

    Raises:
        DataError: it cannot have the given encoding.
    """
    for mark, marked in _MARKS:
        if head.startswith(mark):
            return marked
    if requested is not None and requested.startswith(UTF_8):
        requested = None
    family = (requested or "").removesuffix("-le").removesuffix("-be")
    if requested in ("utf-16", "utf-32"):
        return f"{requested}-{_byte_order(head, 2 if requested == 'utf-16' else 4)}"
    if family not in ("utf-16", "utf-32") and (wide := _wide_text(head)):
        raise DataError(
            f"{name}: is {wide.upper()} without a byte order mark; read it with --encoding {wide}"
        )
    return requested or UTF_8


def _byte_order(head: bytes, width: int) -> str:
    """The byte order of wide characters without a mark, from their ASCII spaces and line ends."""
    return "be" if head[::width].count(0) > head[width - 1 :: width].count(0) else "le"


def _wide_text(head: bytes) -> str | None:
    """Detect UTF-16 without a byte order mark: many of every other byte are zero."""
    start = head[:256]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if len(start) < 8 or 3 * max(even, odd) < len(start) or min(even, odd):
        return None
    return "utf-16-le" if odd else "utf-16-be"


def _is_single_byte(encoding: str) -> bool:
    try:
        return len(bytes(range(0xA1, 0xFF)).decode(encoding, "replace")) == 0x5E
    except (UnicodeError, LookupError):
        return False


def as_utf8(stream: io.BufferedReader, encoding: str, name: str) -> io.BufferedReader:
    """The same text in UTF-8.

    Bytes invalid in `encoding` become lone surrogates, U+DC00 plus the byte, which the line reader
    finds as invalid UTF-8 (`bad_bytes`). If the whole stream `name` turns out to be UTF-8 already,
    reading it ends with a DataError.
    """
    if encoding == UTF_8:
        return stream
    raw = _Transcoded(stream, encoding, name)
    return io.BufferedReader(cast(io.RawIOBase, raw), CHUNK)


class _Transcoded(io.RawIOBase):
    def __init__(self, stream: BinaryIO, encoding: str, name: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(_MARKED)
        self._check = _Utf8Check(encoding, name)
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        while not self._ready and not self._ended:
            data = self._stream.read1(CHUNK)  # type: ignore[attr-defined]
            self._ended = not data
            self._check.see(data)
            text = self._decoder.decode(data, self._ended)
            self._ready = memoryview(text.encode(UTF_8, "surrogatepass"))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


class _Utf8Check:
    """Whether bytes of another encoding are valid UTF-8, which is unlikely by chance if there are
    many.
    """

    def __init__(self, encoding: str, name: str) -> None:
        is_wide = encoding.startswith(("utf-16", "utf-32"))
        self._decoder = None if is_wide else codecs.getincrementaldecoder(UTF_8)()
        self._missing = 1 if _is_single_byte(encoding) else 8  # characters beyond ASCII
        self._encoding, self._name = encoding, name

    def see(self, data: bytes) -> None:
        """Check the next bytes; none at the end.

        Raises:
            DataError: it is the end, and all of them are UTF-8.
        """
        if self._decoder is None:
            return
        try:
            text = self._decoder.decode(data, not data)
        except UnicodeDecodeError:
            self._decoder = None
            return
        if self._missing > 0 and not text.isascii():
            self._missing -= sum(char > "\x7f" for char in text)
        if not data and self._missing <= 0:
            raise DataError(
                f"{self._name}: is valid UTF-8, not {self._encoding}; omit --encoding, and "
                "convert other files that need it"
            )


def _mark_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    bad = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in bad), error.end


codecs.register_error(_MARKED, _mark_bytes)


def bad_bytes(data: bytes, start: int, encoding: str, *, before: int = 0) -> str:
    """Describe the invalid bytes at `start` of a line in UTF-8, or converted to it.

    Args:
        data: the line, from `before` bytes of UTF-8, or characters of another encoding, on.
    """
    if encoding == UTF_8:
        return f"byte {before + start + 1} (0x{data[start]:02x}) is not UTF-8"
    marked = (
        data[start : start + 3].decode(UTF_8, "surrogatepass") if start + 3 <= len(data) else ""
    )
    byte = f" (byte 0x{(ord(marked[0]) - 0xDC00) & 0xFF:02x})" if marked else ""
    place = before + len(data[:start].decode(UTF_8, "replace")) + 1
    return f"character {place}{byte} is not {encoding}"


def advice_for(evidence: bytes) -> str:
    """Advice on how to read bytes that are not UTF-8."""
    guess = guessed_encoding(evidence)
    if guess is None:
        return "give its encoding with --encoding, such as cp1252 or shift_jis"
    iconv = _ICONV_NAMES.get(guess, guess)
    return f"read it with --encoding {guess}, or convert it with: iconv -f {iconv} -t utf-8"


def guessed_encoding(evidence: bytes) -> str | None:
    """The encoding in which these bytes look most like words; None if they do in none."""
    best, guess = 0.2, None
    for encoding in _CANDIDATES:
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(evidence)
        except UnicodeError:
            continue
        # If two fit, the first is far more common.
        score = _likeness(text, encoding) - (encoding != _CANDIDATES[0]) * 0.15
        if score > best + 1e-9:
            best, guess = score, encoding
    return guess


def _likeness(text: str, encoding: str) -> float:
    """How much the non-ASCII characters look like words, on average: 1 at most."""
    places = [i for i, c in enumerate(text) if c > "\x7f"]
    scores = [
        _score(text[i], text[i - 1 : i] or " ", text[i + 1 : i + 2] or " ", encoding)
        for i in places
    ]
    return sum(scores) / len(scores) if scores else 0.0


def _score(char: str, before: str, after: str, encoding: str) -> float:
    kind = unicodedata.category(char)
    if kind[0] == "C":
        return -3
    between_letters = before.isalpha() and after.isalpha()
    if kind[0] != "L":
        if char == "\u00a0":  # between words
            return 0.9 if before > " " and after > " " else 0.3
        if char in _QUOTES_AND_DASHES or "\u3000" <= char <= "\u303f" or "\uff00" < char < "\uff61":
            return 0.3 if between_letters and char not in "\u2019\u2014\u2013" else 0.9
        return -1.0
    script = unicodedata.name(char, "?").split()[0]
    if script in ("HIRAGANA", "KATAKANA", "HANGUL"):
        return 1.0
    if script == "HALFWIDTH":
        return -0.5
    if script == "CJK":
        return _score_of_han(char, encoding)
    if before.islower() and char.isupper():
        return -1.0
    near = {unicodedata.name(c, "?").split()[0] for c in (before, after) if c.isalpha()}
    if script == "LATIN":
        ascii_near = any(c.isascii() and c.isalpha() for c in (before, after))
        # A word without ASCII letters is in another script.
        return 1.0 if ascii_near else 0.2 if near else 0.5 if char.islower() else 0.4
    return 1.0 if near == {script} else 0.3 if not near else -2.0


def _score_of_han(char: str, encoding: str) -> float:
    """The score of a character: high on its character set's first level, of common ones."""
    rows = {
        "gb18030": (0xB0, 0xD7),
        "big5": (0xA4, 0xC6),
        "shift_jis": (0x88, 0x97),
        "euc-jp": (0xB0, 0xCF),
    }
    if encoding not in rows:
        return 0.0
    low, high = rows[encoding]
    return 0.9 if low <= char.encode(encoding, "replace")[0] <= high else -0.5
