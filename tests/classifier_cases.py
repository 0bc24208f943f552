"""Tiny classifiers and a tokenizer for them, whose every id is a character."""

import string
from typing import Any, ClassVar

from minllama.classification import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from minllama.model.llama import Llama
from tests.tiny import our_model

ALPHABET = string.printable
TEXTS = [
    "a fine film",
    "no",
    "it drags on and on and on",
    "so so",
    "what a mess: three hours",
    "ok",
]


class Characters:
    """What classifiers need of a tokenizer."""

    special_tokens: ClassVar[dict[str, str]] = {}

    def encode(self, text: str, *, eos: bool = False) -> list[int]:
        return [ALPHABET.index(character) for character in text]


def tiny_llama(**changes: Any) -> Llama:
    return our_model(**{"vocab_size": len(ALPHABET), "max_seq_len": 128, **changes})


def zero_shot(**options: Any) -> LlamaZeroShotClassifier:
    llama = options.pop("llama", None) or tiny_llama()
    labels = options.pop("labels", ("good", "bad", "a bore"))
    prompt = options.pop("prompt", "Text: {text}\nis")
    return LlamaZeroShotClassifier(llama, Characters(), labels, prompt, **options)


def embedding(**options: Any) -> LlamaEmbeddingClassifier:
    llama = options.pop("llama", None) or tiny_llama()
    labels = options.pop("labels", ("good", "bad", "dull"))
    return LlamaEmbeddingClassifier(llama, Characters(), labels, **options)
