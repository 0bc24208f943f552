"""Read the object in a checkpoint's JSON file: config.json, an index, adapter_config.json."""

from pathlib import Path
from typing import Any

from minllama.errors import CheckpointError
from minllama.text import MAX_JSON_BYTES, read_json


def read_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a checkpoint's JSON file; see `read_json`.

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
