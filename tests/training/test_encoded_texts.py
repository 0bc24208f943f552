"""Training texts are encoded when they are needed; their lengths are known."""

import tracemalloc

import pytest

from minllama.classification.prompts import EncodedPrompt
from minllama.errors import MinllamaError
from minllama.options import TrainingOptions
from minllama.training.encoded_texts import EncodedTexts
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
