"""Training texts as prompts that are encoded when they are needed.

Token ids of a million texts would take more memory than the model, and encoding a batch takes a
two-hundredth of a step. What stays is each prompt's length. `minllama.training.run` reads them.
"""

from collections.abc import Callable, Sequence
from typing import overload

from minllama.classification.prompts import EncodedPrompt
from minllama.data.rows import Column


class EncodedTexts(Sequence[EncodedPrompt]):
    """The prompts of N texts.

    Args:
        texts: N strings.
        encode: makes the prompt of one; each is encoded once at first, so that what cannot be
            encoded is known before training.

    Attributes:
        lengths: of the prompts, in tokens.

    Raises:
        MinllamaError: a text cannot be encoded.
    """

    def __init__(self, texts: Sequence[str], encode: Callable[[str], EncodedPrompt]) -> None:
        self._texts, self._encode = texts, encode
        lengths = Column("i")
        for text in texts:
            lengths.append(len(encode(text)))
        self.lengths = lengths.mapped()

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
