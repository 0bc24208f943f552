"""Cached keys and values of earlier sequences, so that a shared prefix is read once.

A scheduler looks here before it reads a prompt. Entries are found by comparing tokens, bounded in
bytes, and dropped least recently used first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from minllama.errors import OptionError
from minllama.model.kv_cache import KVCache


class _Entry(NamedTuple):
    """Tokens, and their keys and values in a full cache of one row."""

    salt: str
    ids: list[int]
    cache: KVCache


class PrefixCache:
    """Prefixes of one engine's earlier sequences, by their tokens.

    Keys and values belong to the weights that they were computed by, and to the dtype that an
    engine keeps them in: a prefix cache serves one engine, and another engine needs a new one.

    A prompt whose beginning is found gets the same logits as one that is read from its start, but
    for the last bits of a sum, which depend on how many tokens a forward pass reads at once: the
    same tokens in float32, and in half precision but for near ties. Dynamic RoPE scaling turns keys
    by the length of what was read: beyond the original context a hit is not a miss there.

    Args:
        max_bytes: of all entries together.

    Attributes:
        max_bytes: as given.
        nbytes: of all entries at present.

    Raises:
        OptionError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise OptionError(f"max_bytes of a prefix cache must be 0 or more, not {max_bytes}")
        self.max_bytes, self.nbytes = max_bytes, 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # the most recently used last
        self._next_key = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, ids: Sequence[int], salt: str = "") -> tuple[KVCache, int] | None:
        """The longest prefix that a prompt shares with an entry.

        Args:
            ids: of the prompt.
            salt: only entries of this salt are looked at.

        Returns:
            A cache of one row, to be copied from only, and how many of its tokens to take: never
            all of the prompt's, whose last one gives the logits. None where nothing is shared.
        """
        ids, best, longest = list(ids), None, 0
        for key, entry in self._entries.items():
            if entry.salt == salt:
                shared = min(common_length(entry.ids, ids), len(ids) - 1)
                if shared > longest:
                    best, longest = key, shared
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best].cache, longest

    def put(self, ids: Sequence[int], cache: KVCache, row: int, salt: str = "") -> None:
        """Store a copy of a row, unless it is cached already or exceeds the whole cache.

        Args:
            ids: the tokens of the row, of which it holds the first `cache.lengths[row]`.
            cache: holds the row; it is copied from.
            row: which.
            salt: of its request.
        """
        length = cache.lengths[row]
        ids = list(ids[:length])
        size = cache.nbytes // (cache.rows * cache.capacity) * length
        if not length or size > self.max_bytes:
            return
        for key, entry in list(self._entries.items()):
            if entry.salt == salt:
                shared = common_length(entry.ids, ids)
                if shared == length:
                    self._entries.move_to_end(key)
                    return
                if shared == len(entry.ids):  # it extends this entry, and replaces it
                    self._drop(key)
        while self.nbytes + size > self.max_bytes:
            self._drop(next(iter(self._entries)))
        entry = _Entry(salt, ids, cache.select_rows([row], length))
        self._entries[self._next_key] = entry
        self._next_key += 1
        self.nbytes += entry.cache.nbytes

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()
        self.nbytes = 0

    def _drop(self, key: int) -> None:
        self.nbytes -= self._entries.pop(key).cache.nbytes


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common prefix of two lists of tokens.

    By halving, since whole slices are compared sooner than single tokens.
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
