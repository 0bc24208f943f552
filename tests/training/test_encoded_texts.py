"""Training texts are encoded when they are needed; their lengths are known."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from minllama.classification.prompts import EncodedPrompt
from minllama.distributed.launcher import Launch
from minllama.distributed.ranks import Ranks
from minllama.errors import MinllamaError
from minllama.options import TrainingOptions
from minllama.training import encoded_texts
from minllama.training.encoded_texts import HASH_BITS, EncodedTexts
from minllama.training.schedule import Schedule

BYTES_A_TEXT = 32  # at most: a length of 4 bytes, a place of 8 in the order, and some to sort by


def encode(text: str) -> EncodedPrompt:
    if not text:
        raise MinllamaError("the text is empty")
    return EncodedPrompt(tuple(ord(character) + 1000 for character in text))


def test_prompts_are_those_of_the_texts() -> None:
    texts = ["one", "a second", "and the third"]
    prompts = EncodedTexts(texts, encode)
    assert list(prompts) == [encode(text) for text in texts]
    assert prompts[1:] == [encode(text) for text in texts[1:]]
    assert prompts[-1] == encode(texts[-1])
    assert (len(prompts), prompts.lengths.tolist()) == (3, [3, 8, 13])
    with pytest.raises(IndexError):
        prompts[3]


def test_a_text_that_cannot_be_encoded_is_known_before_the_training() -> None:
    with pytest.raises(MinllamaError, match="the text is empty"):
        EncodedTexts(["one", ""], encode)


class Alone(Ranks):
    """One of three processes, to which the others say nothing."""

    def part_of_texts(self, texts: list[str]) -> list[str]:  # type: ignore[override]
        return texts[self.rank :: self.size]

    def joined_rows(self, mine: NDArray[np.float32], total: int) -> NDArray[np.float32]:
        rows = np.zeros(total, dtype=np.float32)
        rows[self.rank :: self.size] = mine
        return rows

    def collected(self, value: int) -> list[int]:  # type: ignore[override]
        return [value]


def test_each_process_encodes_its_part_and_all_have_one_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [f"text {'x' * i}" for i in range(11)]
    whole, encoded = EncodedTexts(texts, encode), list[str]()

    def counted(text: str) -> EncodedPrompt:
        encoded.append(text)
        return encode(text)

    parts = []
    for rank in range(3):
        alone = Alone(Launch(rank=rank, size=3))
        monkeypatch.setattr(encoded_texts, "current", lambda alone=alone: alone)
        parts.append(EncodedTexts(texts, counted))
    assert sorted(encoded) == sorted(texts)
    assert [sum(lengths) for lengths in zip(*(p.lengths for p in parts), strict=True)] == [
        len(text) for text in texts
    ]
    assert sum(int(part.digest, 16) for part in parts) % 2**HASH_BITS == int(whole.digest, 16)


def test_the_digest_is_of_the_tokens_in_their_order() -> None:
    digest = EncodedTexts(["one", "two"], encode).digest
    assert EncodedTexts(["one", "two"], encode).digest == digest
    assert EncodedTexts(["two", "one"], encode).digest != digest
    assert EncodedTexts(["one", "twO"], encode).digest != digest
    others = EncodedTexts(["one", "two"], lambda text: EncodedPrompt(encode(text).ids[:2]))
    assert others.digest != digest


def test_a_text_takes_a_few_bytes_beside_its_characters() -> None:
    def used(n: int) -> int:
        texts = [f"this is text number {i}" for i in range(n)]
        tracemalloc.start()
        prompts = EncodedTexts(texts, encode)
        schedule = Schedule(prompts.lengths, TrainingOptions(batch_size=16), 768)
        assert len(schedule.texts(1)) == 16
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    small, large = used(1000), used(21_000)
    assert (large - small) / 20_000 < BYTES_A_TEXT
