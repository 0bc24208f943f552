"""Damage to files: random bytes, sizes at their limits, and what each format invites.

A mutator takes a file and a source of randomness, and returns another file. The sizes are those
that overflowed in other readers: products of two, sums past the end, signs (CVE-2026-7482 and
CVE-2026-27940 in GGUF).
"""

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]

MAX_BYTES = 2**19
SIZES = (
    *(0, 1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 255, 256, 257, 1000, 4096),
    *(2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1),
    *(2**33, 2**40, 2**53, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**63 + 8),
    *(2**64 - 1, 2**64 - 2, 2**64 - 32, 2**64 - 4096),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 1000, 2**31, 2**32, 2**53, 2**63, 2**64),
    *(-(2**63), 10**400, 0.0, -0.0, 0.5, 1e-300, 1e300, -1e30, 1e9),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "0", "-1", "1e9", "true", "None", "\x00", "\x1b[31m", "\ud800", "\u202e"),
    *("\U0001f642", "a" * 5000, "../../../etc/passwd", "/", ".", "{}", "{{ x }}", "(a+)+$", "["),
    *("\\", "\n", "<s>", [], {}, [[]], [{}], {"": ""}, [None], [0], [1.5], ["a"], ["a"] * 40),
    *([[0] * 3] * 3, {"a": {"b": 1}}),
)
PIECES = (
    *(b"\x00", b"\xff", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\n", b"\r", b"\r\n", b"\t"),
    *(b",", b";", b'"', b"'", b"|||", b"{", b"}", b"[", b"]", b":", b"\\", b"\\u0000", b"\\ud800"),
    *(b"NaN", b"Infinity", b"1e999", b"-0", b"0x10", b"null", b"true", b"\x1b[2J", b"\xed\xa0\x80"),
    *(b"\xc0\x80", b"PK\x03\x04", b"GGUF", b"PAR1", b"\x1f\x8b\x08", b"\x80\x02", b"=1+1"),
    *(b"__label__a ", b"\xe2\x80\xa8", b"\x85", b"{% for x in range(10**9) %}", b"{{ x * 10**9 }}"),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", "x")


def binary(data: bytes, draw: random.Random) -> bytes:
    """Change, drop, repeat and move bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        _change(changed, draw)
    return bytes(changed[:MAX_BYTES])


def _change(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data) + 1)
    # Most formats have what matters at their beginning or end.
    if data and draw.random() < 0.5:
        near = draw.randrange(min(len(data), 200))
        at = near if draw.random() < 0.6 else len(data) - 1 - near
    length = min(draw.choice((1, 1, 2, 4, 8, 32, 500)), len(data) - at)
    match draw.randrange(10):
        case 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        case 1 if at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        case 2:
            del data[at:]
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length] * draw.choice((1, 2, 10, 1000))
        case 5:
            other = draw.randrange(len(data) + 1)
            data[at : at + length] = data[other : other + length]
        case 6:
            data[at:at] = draw.choice(PIECES)
        case 7:
            data[at : at + length] = draw.randbytes(length)
        case _:
            _write_size(data, at, draw)


def _write_size(data: bytearray, at: int, draw: random.Random) -> None:
    """A number at its limits, in one of the widths and byte orders that formats have."""
    width = draw.choice((1, 2, 4, 4, 8, 8, 8))
    value = draw.choice(SIZES) + draw.choice((0, 0, 0, 1, -1))
    order = draw.choice(("little", "little", "big"))
    data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, order)


def text(data: bytes, draw: random.Random) -> bytes:
    """Change lines, separators, quotes and characters."""
    if draw.random() < 0.3:
        return binary(data, draw)
    lines = data.split(b"\n")
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(lines))
        line = lines[at]
        cut = draw.randrange(len(line) + 1)
        match draw.randrange(6):
            case 0:
                lines[at] = line[:cut] + draw.choice(PIECES) + line[cut:]
            case 1:
                lines[at:at] = [draw.choice(lines)] * draw.choice((1, 3, 100))
            case 2:
                lines[at : at + 1] = []
                lines = lines or [b""]
            case 3:
                lines[at] = line[:cut] + line[cut + draw.choice((1, 2, 8)) :]
            case 4:
                lines[at] = line * draw.choice((2, 50)) + draw.choice(PIECES)
            case 5:
                lines[at] = line[:cut] + str(draw.choice(VALUES)).encode("utf-8", "replace")
    return b"\n".join(lines)[:MAX_BYTES]


def json_values(data: bytes, draw: random.Random) -> bytes:
    """Change values, keys and structure of a JSON document, or of one of its lines."""
    if draw.random() < 0.2:
        return text(data, draw)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        lines = data.split(b"\n")
        at = draw.randrange(len(lines))
        try:
            lines[at] = _dumped(_changed(json.loads(lines[at]), draw))
        except (ValueError, RecursionError):
            return text(data, draw)
        return b"\n".join(lines)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = _changed(content, draw)
    if draw.random() < 0.01:
        return b"[" * draw.choice((500, 100_000)) + _dumped(content)
    return _dumped(content)


def _dumped(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=True).encode()


def _changed(content: Any, draw: random.Random) -> Any:
    """One value, wherever it is, replaced, removed, repeated or moved."""
    places = list(_places(content))
    if not places:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)
    match draw.randrange(7):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[str(draw.choice(VALUES))[:2000]] = holder[key]
        case 1:
            holder += holder[:1000]
        case 2:
            other, other_key = draw.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
        case 3:
            holder[key] = draw.choice(([holder[key]], {"x": holder[key]}, str(holder[key])[:5000]))
        case 4 if type(holder[key]) in (int, float):
            holder[key] = draw.choice((-1, 2, 0)) * holder[key] + draw.choice((0, 1, -1))
        case 4 if isinstance(holder[key], str):
            word, new = holder[key], str(draw.choice(VALUES))[:100]
            at = draw.randrange(len(word) + 1)
            holder[key] = word[:at] + new + word[at + draw.choice((0, 1)) :]
        case _:
            holder[key] = draw.choice(VALUES)
    return content


def _places(content: Any, most: int = 4000) -> list[tuple[Any, Any]]:
    """Holder and key of the values in a document; the outer ones first, and more often."""
    found: list[tuple[Any, Any]] = []
    waiting = [content] if isinstance(content, dict | list) else []
    while waiting and len(found) < most:
        holder = waiting.pop(0)
        keys = list(holder) if isinstance(holder, dict) else [*range(len(holder))]
        found += [(holder, key) for key in keys[:500]]
        waiting += [holder[key] for key in keys[:500] if isinstance(holder[key], dict | list)]
    n_outer = len(content) if isinstance(content, dict | list) else 0
    return found + found[: min(n_outer, 100)] * 3


def safetensors(data: bytes, draw: random.Random) -> bytes:
    """Change the JSON header of a safetensors file, with its length made right; or any bytes."""
    if draw.random() < 0.3 or len(data) < 9:
        return binary(data, draw)
    length = min(int.from_bytes(data[:8], "little"), len(data) - 8)
    header = data[8 : 8 + length]
    try:
        content = json.loads(header)
        if not isinstance(content, dict):
            raise ValueError
    except (ValueError, RecursionError):
        return binary(data, draw)
    names = [name for name in content if isinstance(content[name], dict) and name != "__metadata__"]
    if names and draw.random() < 0.6:
        entry = content[draw.choice(names)]
        match draw.randrange(3):
            case 0:
                rank = draw.choice((0, 1, 2, 2, 3, 64))
                entry["shape"] = [draw.choice(SIZES) for _ in range(rank)]
            case 1:
                entry["data_offsets"] = [draw.choice(SIZES), draw.choice(SIZES)]
            case 2:
                entry["dtype"] = draw.choice(DTYPES)
        header = _dumped(content)
    else:
        header = json_values(header, draw)
    rest = data[8 + length :]
    if draw.random() < 0.1:
        rest = rest[: draw.randrange(len(rest) + 1)]
    return struct.pack("<Q", len(header)) + header + rest


def gguf(data: bytes, draw: random.Random) -> bytes:
    """Write sizes, types and offsets into the header of a GGUF file, aligned to its fields."""
    if draw.random() < 0.3:
        return binary(data, draw)
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = gguf_numbers(bytes(changed))
        if not places or draw.random() < 0.1:
            _change(changed, draw)
            continue
        at, width = draw.choice(places)
        if width == 4 and draw.random() < 0.5:
            value = draw.randrange(32)  # a type
        else:
            value = draw.choice(SIZES) + draw.choice((0, 0, 1, -1))
        changed[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(changed[:MAX_BYTES])


def gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """Offset and width of the numbers in a GGUF header: counts, lengths, types, sizes, offsets."""
    places, at = [(4, 4), (8, 8), (16, 8)], 24
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def number(width: int) -> int:
        nonlocal at
        places.append((at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    try:
        n_tensors, n_fields = struct.unpack_from("<QQ", data, 8)
        for _ in range(min(n_fields, 100)):
            at += number(8)
            kind = number(4)
            count = 1
            if kind == 9:
                kind, count = number(4), number(8)
            for _ in range(count if kind == 8 else min(count, 2)):
                if at > len(data):
                    return places
                if kind == 8:
                    length = int.from_bytes(data[at : at + 8], "little")
                    places.append((at, 8))
                    at += 8 + length
                else:
                    number(widths[kind])
            if kind != 8 and count > 2:
                at += (count - 2) * widths[kind]
        for _ in range(min(n_tensors, 100)):
            at += number(8)
            for _ in range(min(number(4), 8)):
                number(8)
            number(4)
            number(8)
    except (struct.error, KeyError):
        pass
    return [(at, width) for at, width in places[:3000] if at + width <= len(data)]
