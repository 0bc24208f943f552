"""Training texts as prompts that are encoded when they are needed.

Token ids of a million texts would take more memory than the model, and encoding a batch takes a
two-hundredth of a step. What stays is each prompt's length. `minllama.training.run` reads them.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import overload

import numpy as np

from minllama.classification.prompts import EncodedPrompt
from minllama.data.rows import Column
from minllama.distributed.ranks import current

HASH_BITS = 256


def _hashed(row: int, prompt: EncodedPrompt) -> int:
    """The hash of a row's prompt."""
    data = f"{row} {prompt!r}".encode("utf-8", "backslashreplace")
    return int.from_bytes(blake2b(data, digest_size=HASH_BITS // 8).digest(), "big")


class EncodedTexts(Sequence[EncodedPrompt]):
    """The prompts of N texts.

    Args:
        texts: N strings.
        encode: makes the prompt of one; each is encoded once at first, so that what cannot be
            encoded is known before training. Several processes that train together divide them.

    Attributes:
        lengths: of the prompts, in tokens.
        digest: of all prompts in their order, the same for any number of processes.

    Raises:
        MinllamaError: a text cannot be encoded.
    """

    def __init__(self, texts: Sequence[str], encode: Callable[[str], EncodedPrompt]) -> None:
        self._texts, self._encode = texts, encode
        ranks, lengths, total = current(), Column("i"), 0
        rows = range(ranks.rank, len(texts), ranks.size)
        for row, text in zip(rows, ranks.part_of_texts(texts), strict=True):
            prompt = encode(text)
            lengths.append(len(prompt))
            total += _hashed(row, prompt)
        self.lengths = lengths.mapped()
        if ranks.size > 1:
            mine = np.asarray(self.lengths).astype(np.float32)
            self.lengths = ranks.joined_rows(mine, len(texts)).astype(np.int32).data
        # A sum, to which each process contributes: the place of a prompt is in its hash.
        self.digest = f"{sum(ranks.collected(total)) % 2**HASH_BITS:x}"

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> EncodedPrompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedPrompt]: ...
    def __getitem__(self, index: int | slice) -> EncodedPrompt | list[EncodedPrompt]:
        if isinstance(index, slice):
            return [self._encode(text) for text in self._texts[index]]
        return self._encode(self._texts[index])
