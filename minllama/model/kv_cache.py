"""Cached keys and values, so that each token is computed once however long the text becomes.

The caller owns the cache: it creates one, passes it to each forward pass, and may truncate, copy or
drop sequences in between.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minllama.errors import MinllamaError
from minllama.model.config import LlamaConfig


class KVCache:
    """Preallocated keys and values of a batch of texts of different lengths.

    Slot s of a sequence has the key and value at position s, so sequences are aligned at their
    start, and slots from a sequence's length on are free. A forward pass writes the new tokens'
    keys and values layer by layer (`update`), and the model then increases the lengths once
    (`advance`).

    Args:
        config: determines the number of layers and the heads' shape.
        batch_size: B, number of sequences.
        capacity: S, maximum length of a sequence in tokens.
        dtype: of keys and values: the model's activations', or one of fewer bits.
        device: of the model.

    Attributes:
        lengths: filled slots of each sequence, on the host, so that shapes need no device sync.
        engine_state: an engine's own data, such as tensor addresses; not part of the cache's
            content.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, config.n_kv_heads, capacity, config.head_dim)  # (B, K, S, C)
        # Zeros, not whatever memory holds: a masked slot still enters attention with weight 0, and
        # 0 x NaN is NaN. Ordinary tensors, which may be written to in any mode.
        with torch.inference_mode(False):
            self.keys = [
                torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)
            ]
            self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.capacity = capacity
        self.lengths = [0] * batch_size
        self.engine_state: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "engine_state": None}  # a copy has another address

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> int:
        """The number of allocated rows, of which the first `batch_size` are in use."""
        return len(self.keys[0])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return 2 * len(self.keys) * self.keys[0].nbytes

    @property
    def max_len(self) -> int:
        """Filled slots of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences have the same length, so that one slice is enough."""
        return min(self.lengths) == max(self.lengths)

    def reserve(self, new_len: int) -> None:
        """Check that `new_len` more tokens fit into every sequence.

        Raises:
            MinllamaError: they do not.
        """
        if self.max_len + new_len > self.capacity:
            raise MinllamaError(
                f"the cache has room for {self.capacity} tokens per sequence: {self.max_len} are "
                f"filled, and {new_len} more do not fit; make it with a larger capacity"
            )

    def check_serves(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Refuse a model of another shape, dtype or device with a MinllamaError.

        Keys and values may be in half precision, whatever the model's dtype.
        """
        keys = self.keys[0]
        if keys.dtype not in (dtype, torch.float16, torch.bfloat16) or keys.device != device:
            raise MinllamaError(
                f"the cache is {keys.dtype} on {keys.device} and the model {dtype} on {device}; "
                "make it with model.new_cache()"
            )
        actual = len(self.keys), keys.shape[1], keys.shape[3]
        expected = config.n_layers, config.n_kv_heads, config.head_dim
        if actual != expected:
            raise MinllamaError(
                "the cache is for another model: it has {} layers of {} heads of width "
                "{}, and this model {} of {} of {}; make it with model.new_cache()".format(
                    *actual, *expected
                )
            )

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, and return all up to now.

        Args:
            layer: index of the layer.
            keys, values: (B, K, T, C), at `positions` of their sequences.
            positions: (B, T), the slots to write to. Padding is written after a sequence's end,
                where the next tokens overwrite it.

        Returns:
            Keys and values, (B, K, S', C) with S' the longest sequence after this pass, in the
                dtype of
            the arguments: views, unless the cache has another dtype.

        Raises:
            MinllamaError: gradients are enabled; keys are written in place, which has no backward
                pass.
        """
        if keys.requires_grad:
            raise MinllamaError(
                "gradients do not flow through a cache; wrap the call in "
                "torch.inference_mode(), or omit the cache"
            )
        stored_keys, stored_values = self.keys[layer], self.values[layer]
        new_len = keys.shape[2]
        end = self.max_len + new_len
        batch = self.batch_size
        if self.is_uniform:
            stored_keys[:batch, :, end - new_len : end] = keys
            stored_values[:batch, :, end - new_len : end] = values
        else:
            rows = torch.arange(batch, device=positions.device).unsqueeze(-1)  # (B, 1)
            # Two index tensors around a slice put the indexed axes first: (B, T, K, C).
            stored_keys[rows, :, positions] = keys.transpose(1, 2).to(stored_keys.dtype)
            stored_values[rows, :, positions] = values.transpose(1, 2).to(stored_keys.dtype)
        return (
            stored_keys[:batch, :, :end].to(keys.dtype),
            stored_values[:batch, :, :end].to(keys.dtype),
        )

    def advance(self, new_lens: Sequence[int]) -> None:
        """Add `new_lens[b]` to the length of each sequence b; the model does it once per pass."""
        self.lengths = [old + new for old, new in zip(self.lengths, new_lens, strict=True)]

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Truncate all sequences to one length, or each to its own.

        Raises:
            MinllamaError: a length is negative, or there is not one per sequence.
        """
        if isinstance(lengths, int):
            lengths = [lengths] * self.batch_size
        if len(lengths) != self.batch_size or min(lengths, default=0) < 0:
            raise MinllamaError(
                f"a cache of {self.batch_size} sequences must be truncated to as many lengths >= "
                f"0, not {lengths}"
            )
        self.lengths = [min(old, new) for old, new in zip(self.lengths, lengths, strict=True)]

    def grow(self, capacity: int) -> None:
        """Grow to `capacity` tokens per sequence; the content stays."""
        if capacity > self.capacity:
            self.resize(self.rows, capacity)

    def resize(self, rows: int, capacity: int) -> None:
        """Reallocate for a number of rows of up to `capacity` tokens; the content stays.

        Args:
            rows: at least `batch_size`.
            capacity: at least `max_len`.
        """
        if rows <= self.rows and capacity <= self.capacity:
            # Tensor by tensor, so that less than one is needed besides. If any allocation fails it
            # is the first, before which nothing has changed: each gives back more than the next.
            for tensors in (self.keys, self.values):
                for layer, stored in enumerate(tensors):
                    tensors[layer] = self._copied(stored, rows, capacity)
        else:
            keys = [self._copied(stored, rows, capacity) for stored in self.keys]
            values = [self._copied(stored, rows, capacity) for stored in self.values]
            # Both or none: memory may run out between them.
            self.keys, self.values = keys, values
        self.capacity, self.engine_state = capacity, None  # which may hold what was stored before

    def append(self, other: "KVCache", capacity: int) -> None:
        """Add copies of another cache's rows after its own; memory for rows grows by doubling.

        Args:
            other: of the same model and dtype.
            capacity: at least so many tokens a row, and no less than there are.
        """
        batch, filled = self.batch_size, other.max_len
        end, capacity = batch + other.batch_size, max(capacity, self.capacity, filled)
        rows = self.rows if end <= self.rows else max(end, 2 * self.rows)
        if (rows, capacity) != (self.rows, self.capacity):
            self.resize(rows, capacity)
        for mine, theirs in zip(
            (*self.keys, *self.values), (*other.keys, *other.values), strict=True
        ):
            mine[batch:end, :, :filled] = theirs[: other.batch_size, :, :filled]
        self.lengths = self.lengths + other.lengths

    def load_prefix(self, row: int, source: "KVCache", length: int) -> None:
        """Let a row begin with the first `length` tokens of the only row of another cache."""
        for mine, theirs in zip(
            (*self.keys, *self.values), (*source.keys, *source.values), strict=True
        ):
            mine[row, :, :length] = theirs[0, :, :length]
        self.lengths[row] = length

    def drop_row(self, row: int) -> None:
        """Remove a sequence: the last one replaces it, and the batch shrinks by one."""
        last = self.batch_size - 1
        if row != last:
            filled = self.lengths[last]
            for stored in (*self.keys, *self.values):
                stored[row, :, :filled] = stored[last, :, :filled]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def repeated(self, n: int, capacity: int) -> "KVCache":
        """A new cache with every sequence repeated `n` times, and space for `capacity` tokens."""
        return self.select_rows([row for row in range(self.batch_size) for _ in range(n)], capacity)

    def select_rows(self, rows: Sequence[int], capacity: int) -> "KVCache":
        """A new cache with copies of these rows, and room for `capacity` tokens."""
        copy = object.__new__(KVCache)
        copy.capacity = capacity
        copy.engine_state = None
        copy.lengths = [self.lengths[row] for row in rows]
        copy.keys = [self._copied(stored, len(rows), capacity, rows) for stored in self.keys]
        copy.values = [self._copied(stored, len(rows), capacity, rows) for stored in self.values]
        return copy

    def _copied(
        self, stored: Tensor, n_rows: int, capacity: int, rows: Sequence[int] | None = None
    ) -> Tensor:
        """A copy (n_rows, K, capacity, C) of some rows, or of all that are in use."""
        _, heads, _, width = stored.shape
        if rows is None:
            filled = min(self.max_len, capacity)
            source = stored[: self.batch_size, :, :filled]
        else:
            filled = min(max((self.lengths[row] for row in rows), default=0), capacity)
            # A slice of one row is copied once, where indices would gather it first.
            chosen = slice(rows[0], rows[0] + 1) if len(rows) == 1 else list(rows)
            source = stored[chosen, :, :filled]
        with torch.inference_mode(False):
            copy = stored.new_empty(n_rows, heads, capacity, width)
        # Zeros where nothing is copied to, as in a new cache.
        copy[: len(source), :, :filled] = source
        copy[: len(source), :, filled:] = 0
        copy[len(source) :] = 0
        return copy
