"""Bodies of requests: JSON from strangers, checked before it is parsed and while it is.

Python's parser takes NaN and Infinity, halves of characters, and any depth until it runs out of
stack.
"""

import json
import math
import re
from typing import Any

from minllama.server.errors import RequestError

SHORT_BYTES = 2**16  # longer bodies are parsed in a thread
MAX_ENTRIES = 2**20  # values of lists and objects
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MAX_DIGITS = 400  # of an integer; Python refuses those of 4,300, and slowly


def parse_body(body: bytes, max_depth: int) -> Any:
    """The value of a JSON document.

    Raises:
        RequestError: it is empty, damaged, not UTF-8, nested deeper than `max_depth`, or holds a
            number that JSON has not.
    """
    if not body.strip():
        raise RequestError("the body is empty; send a JSON object")
    check_depth(body, max_depth)
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 (byte {error.start})") from error
    try:
        content = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
        )
        if _SURROGATE.search(text):  # escapes that may be halves of a character
            json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"the body is not JSON: {error.msg} ({where})") from error
    except UnicodeEncodeError as error:
        raise RequestError("the body holds half of a character (a lone surrogate)") from error
    return content


def check_depth(body: bytes, max_depth: int) -> None:
    """Refuse a document that is nested deeper than `max_depth`, or has far too many values.

    Raises:
        RequestError: it is, or has.
    """
    bare = _STRING.sub(b"", body)
    if bare.count(b",") > MAX_ENTRIES:
        raise RequestError(f"the body has more than {MAX_ENTRIES} values")
    depth = 0
    for bracket in bare.translate(None, _NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise RequestError(f"the body is nested more than {max_depth} levels deep")


def _no_constant(name: str) -> float:
    raise RequestError(f"the body holds {name}, which JSON does not have")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RequestError(f"the body holds the number {digits[:30]}, which is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise RequestError(f"the body holds an integer of {len(digits)} digits, which is too large")
    return int(digits)
