"""Bound what a downloaded tokenizer may do to a text, from its description alone.

The library runs whatever it is given: a normalizer that doubles a text forty times crashes the
process, and a regular expression with nested loops takes exponential time. Both are refused when a
tokenizer is loaded.
"""

import base64
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from minllama.tokenizer.patterns import has_nested_loops

Json = dict[str, Any]

MAX_GROWTH = 1024  # a text becomes this many times as long at most; a Llama's twelve
MAX_COMPONENTS = 32  # of one kind; a Llama has up to five
MAX_PATTERN_CHARS = 2**16
MAX_TOKEN_CHARS = 2**12  # of an added token
MAX_TEMPLATE_ITEMS = 2**10
# Of tokens that are cut into others, each and together, which takes time with the square of the
# length. SentencePiece's trainer stops at 16, and 256,000 tokens of 16 have as many.
MAX_PIECE_LEN = 2**9
MAX_PIECES_LEN = 2**22
_MAX_DEPTH = 8
# The longest that a step makes of one byte. Unicode's own forms: U+FDFA becomes 33 bytes of 3.
_UNICODE = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 3, "BertNormalizer": 5}
_NEVER_LONGER = ("Strip", "StripAccents", "Nmt")
_PRE_TOKENIZERS = {
    **dict.fromkeys(
        (
            *("BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation"),
            *("Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
        ),
        1,
    ),
    "ByteLevel": 3,  # two bytes for each, and a space
    "Metaspace": 6,
}


def find_excess(raw: Json) -> str | None:
    """A message about what in a tokenizer.json exceeds any Llama's; None if nothing does."""
    try:
        growth = 1
        for part in _parts(raw.get("normalizer"), "normalizers"):
            growth = _bounded(growth * _growth(part))
        for part in _parts(raw.get("pre_tokenizer"), "pretokenizers"):
            growth = _bounded(growth * _pre_tokenizer_growth(part))
        for part in _parts(raw.get("post_processor"), "processors"):
            for key in ("single", "pair", "special_tokens"):
                if len(part.get(key) or ()) > MAX_TEMPLATE_ITEMS:
                    raise _Excess(f"its post-processor adds {len(part[key])} tokens to a text")
        for _ in _parts(raw.get("decoder"), "decoders"):
            pass  # their number is limited instead: a table of ours decodes tokens
        for token in raw.get("added_tokens") or ():
            if len(token["content"]) > MAX_TOKEN_CHARS:
                raise _Excess(f"an added token has {len(token['content'])} characters")
    except _Excess as error:
        return str(error)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        return f"a component is damaged ({type(error).__name__}: {error})"
    return None


def long_pieces(lengths: Iterable[int]) -> str | None:
    """A message about tokens that take too long to be cut into parts; None if there are none."""
    total = 0
    for length in lengths:
        total += length
        if length > MAX_PIECE_LEN:
            return f"a token is {length} long, and no known one longer than {MAX_PIECE_LEN}"
    return f"its tokens are {total} long together" if total > MAX_PIECES_LEN else None


def charsmap_growth(charsmap: bytes) -> int:
    """How many bytes a SentencePiece normalizer's table makes of one at most.

    The table is the length of a trie, the trie, and texts with a NUL after each.
    """
    if len(charsmap) < 4:
        return 1
    (trie_bytes,) = struct.unpack_from("<I", charsmap)
    return max(map(len, charsmap[4 + trie_bytes :].split(b"\0")), default=1) or 1


class _Excess(Exception):
    pass


def _bounded(growth: int) -> int:
    if growth > MAX_GROWTH:
        raise _Excess(f"its normalizer makes a text more than {MAX_GROWTH} times as long")
    return growth


def _parts(component: Any, key: str) -> Iterator[Json]:
    """A component, or the components of a Sequence, nested ones included."""
    count = 0

    def nested_components(part: Any, depth: int) -> Iterator[Json]:
        nonlocal count
        if part is None:
            return
        count += 1
        if count > MAX_COMPONENTS or depth > _MAX_DEPTH:
            raise _Excess(f"it has more than {MAX_COMPONENTS} {key}")
        if part.get("type") != "Sequence":
            yield part
            return
        for item in part.get(key) or ():
            yield from nested_components(item, depth + 1)

    yield from nested_components(component, 0)


def _growth(part: Json) -> int:
    """How many times as long a text becomes by one normalizer."""
    match part.get("type"):
        case "Replace":
            content, pattern = part["content"].encode(), part["pattern"]
            if (literal := pattern.get("String")) is not None:
                _check_not_empty(literal)
                return max(1, -(-len(content) // len(literal.encode())))
            _check_pattern(pattern["Regex"])
            return 1 + len(content)  # next to each byte, if it matches the empty string
        case "Prepend":
            _check_not_empty(part["prepend"])
            return 1 + len(part["prepend"].encode())
        case "Precompiled":
            return charsmap_growth(
                base64.b64decode(part["precompiled_charsmap"] or "", validate=True)
            )
        case "ByteLevel":
            return _PRE_TOKENIZERS["ByteLevel"]
        case str(kind) if kind in _UNICODE:
            return _UNICODE[kind]
        case str(kind) if kind in _NEVER_LONGER:
            return 1
        case kind:
            raise _Excess(f"its normalizer {str(kind)[:40]!r} is not supported for a Llama")


def _pre_tokenizer_growth(part: Json) -> int:
    kind = str(part.get("type"))
    if kind not in _PRE_TOKENIZERS:
        raise _Excess(f"its pre-tokenizer {kind[:40]!r} is not supported for a Llama")
    if kind == "Split" and (pattern := part["pattern"].get("Regex")) is not None:
        _check_pattern(pattern)
    return _PRE_TOKENIZERS[kind]


def _check_not_empty(text: str) -> None:
    if not text:
        raise _Excess("a normalizer has an empty text, at which the library panics")


def _check_pattern(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise _Excess(f"a regular expression has {len(pattern)} characters")
    if has_nested_loops(pattern):
        raise _Excess(f"the regular expression {pattern[:80]!r} has nested loops")
