"""API keys: where they come from, and who has one.

Every path needs a key where there are keys, but those of `OPEN_PATHS`: a route cannot forget it.
"""

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from minllama.errors import OptionError
from minllama.options.server import ServerOptions
from minllama.text import first_line

VARIABLE = "MINLLAMA_API_KEY"
OPEN_PATHS = frozenset({"/health", "/ready", "/"})
MAX_FILE_BYTES = 2**20


@dataclass(frozen=True)
class Keys:
    """Digests of the keys that are valid; none where everybody may ask.

    Attributes:
        digests: SHA-256 of each.
    """

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, keys: Iterable[str]) -> "Keys":
        """Those keys.

        Raises:
            OptionError: one is empty, or not printable ASCII without spaces.
        """
        for key in keys:
            if not key or not (key.isascii() and key.isprintable()) or " " in key:
                raise OptionError("an API key must be of ASCII letters, digits and signs")
        return cls(tuple(dict.fromkeys(_digest(key.encode()) for key in keys)))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def partition(self, given: bytes | None) -> str | None:
        """A name for the key's owner; None where it is no valid key; empty where none is needed.

        Each key is compared, and each in constant time.
        """
        if not self.digests:
            return ""
        digest, found = _digest(given or b""), 0
        for known in self.digests:
            found |= hmac.compare_digest(digest, known)
        return digest.hex()[:16] if found and given else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(b"minllama" + key).digest()


def load_keys(options: ServerOptions, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of the options, of their file and of the environment.

    Raises:
        OptionError: a key is not valid, the file cannot be read or has none, or the server listens
            beyond this machine without a key and without being told to.
    """
    keys = [*options.api_key, *environment.get(VARIABLE, "").split()]
    if options.api_key_file is not None:
        keys += _read(options.api_key_file)
    if not keys and not options.is_local and not options.allow_unauthenticated:
        raise OptionError(
            f"anybody who reaches {options.host} could use this server; give --api-key or "
            "--api-key-file, or --allow-unauthenticated if that is meant"
        )
    return Keys.of(keys)


def _read(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise OptionError(f"--api-key-file {path}: more than {MAX_FILE_BYTES} bytes")
        lines = content.decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OptionError(f"--api-key-file {path}: cannot be read ({reason})") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise OptionError(f"--api-key-file {path}: holds no key; write one on each line")
    return keys


def key_in(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key that a request's headers hold: `Authorization: Bearer KEY`, or `X-API-Key: KEY`."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return key.strip()
        elif name == b"x-api-key":
            return value.strip()
    return None
