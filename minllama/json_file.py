"""Read JSON from untrusted files, with limits that are checked before parsing.

Python allocates sixty bytes for `{},`, and accepts lone surrogates that cannot be written again.
Readers of checkpoints, tokenizers and classifiers call it.
"""

import json
import re
from pathlib import Path
from typing import Any

from minllama.errors import CheckpointError

MAX_BYTES = 2**24  # ten times the longest config.json, index or adapter_config.json
MAX_ENTRIES = 2**20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, *, max_entries: int = MAX_ENTRIES) -> Any:
    """Parse a JSON document in UTF-8.

    Args:
        data: the document.
        max_entries: the most values, of lists and objects together, that it may have.

    Raises:
        ValueError: it is damaged, nested too deeply, has too many entries, or is not text.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > max_entries:
        raise ValueError(f"more than {max_entries:,} entries")
    try:
        text = data.decode("utf-8-sig")  # json.loads would let halves of characters pass
        content = json.loads(text)
        if _SURROGATE.search(text):  # escapes that may be halves of a character
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it contains half of a character (a lone surrogate)") from error
    return content


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, max_entries: int = MAX_ENTRIES) -> Any:
    """Parse a JSON file; see `parse_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or far larger than such a file should be.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(
            f"more than {max_bytes // 2**20} MiB, far larger than such a file should be"
        )
    return parse_json(data, max_entries=max_entries)


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a checkpoint's file of JSON; see `read_json`.

    Raises:
        CheckpointError: it cannot be read, is damaged or far too large, or is no object.
    """
    try:
        content = read_json(path, max_bytes=max_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; download it again")
    return content
