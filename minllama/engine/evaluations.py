"""Evaluations that wait for a scheduler's steps: which are computed together, and what they share.

A scheduler has one of these queues beside its sequences.
"""

import hashlib
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import islice

from minllama.engine.base import Engine
from minllama.engine.evaluation import Chunks, Evaluation, EvaluationRequest, read_into
from minllama.engine.prefix_cache import PrefixCache
from minllama.model.kv_cache import KVCache

# Padded tokens that are computed together. More are slower on a CPU: their activations leave its
# caches.
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ELSEWHERE = 16384
EXACT_CHUNK = 512  # tokens that are read at a time for an exact result
MOST_PREFIXES = 4  # shared prefixes that stay read, the latest used last
MOST_SEEN = 1024  # evaluations that are looked at for those that go with the first one


class SharedPrefix:
    """Tokens that texts begin with, read once, and rows of a cache that hold them.

    Args:
        engine: reads them.
        ids: the tokens.
        salt: of the requests that share it.
        known: holds as much of it as was read before; None for nothing.
        dtype: of keys and values.

    Attributes:
        n_free: of the next text to be answered, tokens that it did not have to read: those that
            were known, and then all.
    """

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        salt: str,
        one_row: KVCache,
        known: tuple[KVCache, int] | None,
    ) -> None:
        self.ids, self.salt, self.one_row = tuple(ids), salt, one_row
        if known is not None:
            self.one_row.load_prefix(0, *known)
        self.n_free = self.one_row.lengths[0]
        self.chunks: Chunks | None = read_into(engine, self.ids, self.one_row)
        next(self.chunks)
        self._rows: KVCache | None = None

    def rows(self, batch_size: int, new_len: int) -> KVCache:
        """A cache of `batch_size` rows with the prefix, and space for `new_len` more tokens.

        It is used for all batches: what the last one wrote after the prefix is truncated.
        """
        n = len(self.ids)
        if self._rows is None or self._rows.rows < batch_size:
            capacity = max(n + new_len, 0 if self._rows is None else self._rows.capacity)
            self._rows = self.one_row.repeated(batch_size, capacity)
        self._rows.lengths = [n] * batch_size
        self._rows.grow(n + new_len)
        return self._rows

    def drop_rows(self) -> None:
        """Give back the memory of all but the prefix."""
        self._rows = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.one_row.nbytes + (0 if self._rows is None else self._rows.nbytes)


class Evaluations:
    """A queue of evaluations, answered in order of arrival, together with others of their group.

    Args:
        engine: computes.
        batch_tokens: padded tokens to compute together; None for what suits the device.
        prefix_cache: has what generated sequences have read, and receives shared prefixes.
    """

    def __init__(
        self, engine: Engine, batch_tokens: int | None, prefix_cache: PrefixCache | None
    ) -> None:
        self._engine, self._prefix_cache = engine, prefix_cache
        if batch_tokens is None:
            batch_tokens = BATCH_TOKENS.get(engine.device.type, BATCH_TOKENS_ELSEWHERE)
        self._batch_tokens = batch_tokens
        # By salt, whether it is read exactly, and tokens.
        self._prefixes: OrderedDict[tuple[str, bool, tuple[int, ...]], SharedPrefix] = OrderedDict()
        self._long: tuple[Evaluation, Chunks, KVCache] | None = None  # is read chunk by chunk
        self.waiting: deque[Evaluation] = deque()

    def _one_row(self, capacity: int) -> KVCache:
        """An empty cache of one row.

        What goes through a prefix cache is of the dtype that generated sequences have, so that a
        hit equals a miss. Other keys and values are kept as they are computed.
        """
        engine = self._engine
        if self._prefix_cache is not None:
            return engine.new_cache(1, capacity)
        return KVCache(engine.config, 1, capacity, dtype=engine.llama.dtype, device=engine.device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        of_long = self._long[2].nbytes if self._long else 0
        return of_long + sum(prefix.nbytes for prefix in self._prefixes.values())

    def cancel(self, evaluations: Iterable[Evaluation]) -> None:
        """Take out some that have not been answered, and give back what only they needed."""
        for evaluation in evaluations:
            evaluation.has_ended = True
        self.waiting = deque(e for e in self.waiting if not e.has_ended)
        if self._long is not None and self._long[0].has_ended:
            self._long = None
        self._remove_answered(0)
        for key, prefix in list(self._prefixes.items()):
            is_wanted = any(e.request.prefix == prefix.ids for e in self.waiting)
            if prefix.chunks is not None and not is_wanted:
                del self._prefixes[key]

    def step(self, budget: float) -> tuple[list[Evaluation], int]:
        """Read at most so many tokens, for the first that waits and those that go with it.

        A text of a bidirectional model is read at once, whatever its length. Without a bound, one
        batch is read.

        Returns:
            What was answered, and how many tokens were read.
        """
        answered: list[Evaluation] = []
        n_read = 0
        while self.waiting and budget - n_read >= 1 and not (answered and budget == math.inf):
            some, n = self._read(budget - n_read)
            answered, n_read = answered + some, n_read + n
        return answered, n_read

    def _read(self, budget: float) -> tuple[list[Evaluation], int]:
        """One forward pass for the first that waits."""
        if self._long is not None:
            return self._read_long(budget)
        first = self.waiting[0]
        prefix = self._prefix_of(first.request)
        if prefix is not None and prefix.chunks is not None:
            return [], self._read_prefix(prefix, _allowed(first.request, budget))
        known = 0 if prefix is None else len(prefix.ids)
        most = _allowed(first.request, budget)
        if first.request.length - known > most and self._engine.config.causal:
            cache = self._one_row(first.request.length)
            if prefix is not None:
                cache.load_prefix(0, prefix.one_row, known)
            chunks = first.request.in_chunks(self._engine, cache)
            next(chunks)
            self._long = first, chunks, cache
            return self._read_long(budget)
        return self._compute(self._batch(budget, known), prefix)

    def _compute(
        self, batch: list[Evaluation], prefix: SharedPrefix | None
    ) -> tuple[list[Evaluation], int]:
        """Answer some evaluations in one forward pass."""
        self._engine.snapshot.check()
        requests = [evaluation.request for evaluation in batch]
        known = 0 if prefix is None else len(prefix.ids)
        longest = max(request.length for request in requests)
        cache = None if prefix is None else prefix.rows(len(batch), longest - known)
        results = requests[0].compute(self._engine, requests, cache)
        for evaluation, result in zip(batch, results, strict=True):
            if prefix is not None:
                evaluation.cached_tokens, prefix.n_free = prefix.n_free, known
            evaluation.finish(result)
        self._remove_answered(len(batch))
        return batch, sum(request.length - known for request in requests)

    def _batch(self, budget: float, known: int) -> list[Evaluation]:
        """The first that waits, and those of its group that fit beside it."""
        first = self.waiting[0].request
        batch: list[Evaluation] = []
        longest = n_new = 0
        for evaluation in islice(self.waiting, MOST_SEEN):
            request = evaluation.request
            if not self._goes_with(first, request):
                continue
            longest = max(longest, request.length)
            n_new += request.length - known
            is_over = n_new > budget
            if batch and (longest * (len(batch) + 1) > self._batch_tokens or is_over):
                break
            batch.append(evaluation)
        return batch

    def _goes_with(self, first: EvaluationRequest, other: EvaluationRequest) -> bool:
        """Whether two requests can be answered by one forward pass."""
        if first.is_exact and not self._engine.is_batch_invariant:
            return other is first
        keys = [(each.group, each.salt, each.prefix) for each in (first, other)]
        return keys[0] == keys[1]

    def _remove_answered(self, n: int) -> None:
        """Take out n evaluations that have ended."""
        while n and self.waiting[0].has_ended:
            self.waiting.popleft()
            n -= 1
        if n:
            self.waiting = deque(e for e in self.waiting if not e.has_ended)
        if not self.waiting:
            for prefix in self._prefixes.values():
                prefix.drop_rows()

    # What is read before

    def _prefix_of(self, request: EvaluationRequest) -> SharedPrefix | None:
        """The shared prefix of a request, which may have to be read yet."""
        ids = request.prefix
        key = request.salt, request.is_exact, ids
        if not ids or not self._engine.config.causal:
            return None
        if key not in self._prefixes:
            known, salt = None, _salt(request)
            if self._prefix_cache is not None:
                known = self._prefix_cache.find((*ids, -1), salt)  # all of it may be known
            while len(self._prefixes) >= MOST_PREFIXES:
                self._prefixes.popitem(last=False)
            self._prefixes[key] = SharedPrefix(
                self._engine, ids, salt, self._one_row(len(ids)), known
            )
        self._prefixes.move_to_end(key)
        prefix = self._prefixes[key]
        for other in self._prefixes.values():
            if other is not prefix:
                other.drop_rows()
        return prefix

    def _read_prefix(self, prefix: SharedPrefix, budget: float) -> int:
        assert prefix.chunks is not None
        try:
            return prefix.chunks.send(_count(budget))
        except StopIteration:
            prefix.chunks = None
        if self._prefix_cache is not None:
            self._prefix_cache.put(prefix.ids, prefix.one_row, 0, prefix.salt)
        return 0

    def _read_long(self, budget: float) -> tuple[list[Evaluation], int]:
        assert self._long is not None
        evaluation, chunks, _ = self._long
        try:
            return [], chunks.send(_count(_allowed(evaluation.request, budget)))
        except StopIteration as end:
            evaluation.finish(end.value)
        self._long = None
        self._remove_answered(1)
        return [evaluation], 0


def _allowed(request: EvaluationRequest, budget: float) -> float:
    """Tokens that may be read at once for a request."""
    return EXACT_CHUNK if request.is_exact else budget


def _salt(request: EvaluationRequest) -> str:
    """Of a request's prefix in the prefix cache.

    Another prefix that begins alike was read in other chunks.
    """
    if not request.is_exact:
        return request.salt
    return f"{request.salt}/{hashlib.sha256(repr(request.prefix).encode()).hexdigest()}"


def _count(budget: float) -> int:
    return 2**62 if budget == math.inf else int(budget)
