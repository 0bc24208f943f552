"""Match PEFT's `rank_pattern` and `alpha_pattern` against module names.

The patterns are untrusted regular expressions, which can take exponential time: anything but a
plain name is matched in a separate process with limits on time and memory.
`minllama.checkpoints.peft_config` calls it.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from minllama.errors import CheckpointError

MAX_SECONDS = 10
MAX_PATTERNS = 10_000
MAX_LENGTH = 1_000
# A name with dots for any character, anchored or not: matching takes time linear in its length.
_NAME = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)*\$?", re.ASCII)
_PROGRAM = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
except ImportError:
    pass
keys, names = json.load(sys.stdin)
compiled = []
for number, key in enumerate(keys):
    try:
        compiled.append(re.compile(rf"(.*\\.)?({key})$"))
    except re.error as error:
        print(json.dumps({"bad": number, "reason": str(error)}))
        sys.exit()
first = lambda name: next((n for n, one in enumerate(compiled) if one.match(name)), None)
print(json.dumps({"found": [first(name) for name in names]}))
"""


def first_matches(setting: str, keys: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Index of the first key that matches each module's name, as in PEFT 0.21.

    PEFT matches a key, after an optional `.*` that ends in a dot, with the full name: so it matches
    the full name or what follows a dot in it; a dot in the key matches any character, and `^` the
    start of the name.

    Raises:
        CheckpointError: a key is not a regular expression, or takes too long.
    """
    if len(keys) > MAX_PATTERNS:
        raise CheckpointError(
            f"{setting}: {len(keys)} keys, but at most {MAX_PATTERNS} are supported"
        )
    if too_long := [key for key in keys if len(key) > MAX_LENGTH]:
        raise CheckpointError(
            f"{setting}: {too_long[0][:40]!r}... has {len(too_long[0])} characters, but at most "
            f"{MAX_LENGTH} are supported; write the names of the modules instead"
        )
    if all(_NAME.fullmatch(key) for key in keys):
        compiled = [re.compile(rf"(.*\.)?({key})$") for key in keys]
        return [
            next((index for index, pattern in enumerate(compiled) if pattern.match(name)), None)
            for name in names
        ]
    return _match_in_subprocess(setting, keys, names)


def _match_in_subprocess(
    setting: str, keys: Sequence[str], names: Sequence[str]
) -> list[int | None]:
    try:
        finished = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _PROGRAM],
            input=json.dumps([list(keys), list(names)]),
            capture_output=True,
            text=True,
            timeout=MAX_SECONDS,
        )
        answer = json.loads(finished.stdout) if finished.returncode == 0 else None
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{setting}: its regular expressions take longer than {MAX_SECONDS} seconds; write the "
            "names of the modules instead"
        ) from None
    if answer is None:
        raise CheckpointError(
            f"{setting}: its regular expressions take too much memory; write the names of the "
            "modules instead"
        )
    if "bad" in answer:
        raise CheckpointError(
            f"{setting}: {keys[answer['bad']]!r} is not a regular expression ({answer['reason']})"[
                :300
            ]
        )
    indices: list[int | None] = answer["found"]
    return indices
